"""A probe of your own: how much of each layer's attention stays within three tokens of the query,
over a denoising run.

    python examples/custom_probe.py
"""

import torch
import xarray as xr

import dit_lens

torch.set_num_threads(1)


class Locality(dit_lens.Probe):
    """Mean attention to keys at most `radius` tokens away, [layer, step]."""

    names = "pattern"

    def __init__(self, radius: float = 3.0):
        self.radius = radius

    def start(self, model):
        h, w = model.cfg.grid
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
        self.near = (torch.cdist(place, place) <= self.radius).to(model.device)
        self.share = {}

    # [batch, head, query, key], inside the forward pass: reduce, keep little
    def observe(self, activation, site):
        self.share[site.layer, site.step] = (activation * self.near).sum(-1).mean()

    def result(self):
        layers, steps = (sorted({key[i] for key in self.share}) for i in (0, 1))
        table = torch.stack(
            [torch.stack([self.share[layer, step] for step in steps]) for layer in layers]
        )
        return xr.Dataset(
            {"near": (("layer", "step"), table.cpu().numpy())}, {"layer": layers, "step": steps}
        )


# so that `dit-lens check examples/custom_probe.py:Locality` can import the class
if __name__ == "__main__":
    model = dit_lens.load("digits")
    near = Locality().run(model, labels=range(10), steps=20, seeds=0)["near"]
    print("attention within three tokens: layer, first step, last step")
    for layer in near.layer.values:
        print(f"  {layer:2d}  {near.sel(layer=layer)[0]:.3f}  {near.sel(layer=layer)[-1]:.3f}")
