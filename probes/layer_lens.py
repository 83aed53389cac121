"""What the model would answer if it stopped at layer l: every layer's stream read through the final
layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, Run, Site, sample, trace
from dit_lens.errors import InvalidState, InvalidValue


class LayerLens(Probe):
    """Each layer's predicted clean x0, and how well it agrees, band by band, with how the images
    end.

    The logit lens (nostalgebraist 2020) for DiTs: the stream after block l goes through the last
    layer, with the conditioning of that step, and the output is turned into x0. At the last layer
    this is the model's own prediction; layer -1 is the embedding. Kept are only these x0, one
    latent a layer, step and item.

    Args:
        bands: a `Bands` of the latents' pixel grid; by default six radial bands.

    Raises:
        ValueError: at the start if the model has no scheduler.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> LayerLens(Bands.radial((16, 16), cut=0.1)).run(model, [3, 3], steps=2).agreement.sizes
    Frozen({'layer': 29, 'step': 2, 'band': 2})
    """

    names = ("hook_embed", "resid_post")

    def __init__(self, bands: Bands | None = None) -> None:
        self.wanted_bands = bands

    def start(self, model: HookedDiT) -> None:
        """Forget earlier runs.

        Args:
            model: what is traced; it needs a scheduler.
        """
        if model.scheduler is None:
            raise InvalidValue(
                "LayerLens needs the model's scheduler to turn outputs into x0: "
                "HookedDiT(transformer, scheduler=...)."
            )
        self.model = model
        self.bands = self.wanted_bands or Bands.radial(model.cfg.pixels)
        self.x0: dict[tuple[int, int], Tensor] = {}
        self.labels: Tensor | None = None
        self.timesteps: dict[int, Tensor] = {}

    def observe(self, activation: Tensor, site: Site) -> None:
        """Keep the x0 that the stream stands for.

        Args:
            activation: the residual stream, [batch, token, d_model].
            site: where and when it was seen.
        """
        layer = -1 if site.layer is None else site.layer
        with torch.no_grad():
            output = self.model.unembed(activation, site.t, site.condition)
        self.x0[layer, site.step] = self.model.predict_x0(output, site.x, site.t)
        self.labels = site.labels
        self.timesteps[site.step] = site.t[0]

    def run(self, model: Any, labels: Any = None, **settings: Any) -> xr.Dataset:
        """Sample under observation, and compare with the finished latents; see `result`.

        Args:
            model: a `HookedDiT`, or what it wraps.
            labels: one an image; by default 16, classes or prompts in turn, two images of each.
            **settings: those of `dit_lens.sample`: steps, seeds, guidance, scheduler, ...
        """
        model = HookedDiT.of(model)
        if labels is None:
            labels = [i // 2 % model.conditions.n for i in range(16)]
        given = model.conditions.numbers(labels).tolist()
        alone = [label for label in given if given.count(label) == 1]
        if alone:
            raise InvalidValue(
                f"Label {alone[0]} stands once; expected each two times or more, since the mean of "
                "a label's images is taken off."
            )
        with trace(model, probes=[self]):
            run = sample(model, labels, **settings)
        return self.result(finished(run, len(self.x0[-1, 0])))

    def of_run(self, run: Run, by_label: bool = True) -> xr.Dataset:
        """Go through a finished run, with its own edits: one forward for each step on its stored
        x_t, compared with its finished latents; see `result`.

        Args:
            run: what `dit_lens.sample` gave.
            by_label: as for `result`.
        """
        with trace(run.model, probes=[self]):
            for step in range(run.settings.steps):
                run.forward(step)
        return self.result(finished(run, len(self.x0[-1, 0])), by_label)

    def result(self, target: Tensor | None = None, by_label: bool = True) -> xr.Dataset:
        """How well each layer's x0 agrees with a target, band by band.

        Args:
            target: [batch, channel, height, width], the finished latents in the run's batch order;
                by default the last layer's own x0 at that step.
            by_label: whether the mean of each label by itself is taken off, and not that of the
                whole batch: what all images of a class share is no decision.

        Returns:
            Dataset with `xy`, `xx`, `yy` [layer, step, batch, band], band-wise products of lens and
            target, and `agreement` [layer, step, band], the correlation sum xy / sqrt(sum xx sum
            yy).

        Raises:
            RuntimeError: if nothing was seen.
            ValueError: for a target of another shape.
        """
        if not self.x0:
            raise InvalidState(
                "LayerLens has seen nothing: use its run(model, ...), or `with "
                "dit_lens.trace(model, probes=[...])`."
            )
        layers, steps = sorted({k[0] for k in self.x0}), sorted({k[1] for k in self.x0})
        shape = self.x0[layers[0], steps[0]].shape
        if target is not None and target.shape != shape:
            raise InvalidValue(
                f"LayerLens's target has shape {list(target.shape)}; the run's latents have "
                f"{list(shape)}."
            )
        groups = (
            self.labels.expand(shape[0]).cpu().numpy()
            if by_label and self.labels is not None
            else None
        )
        found = np.array(
            [
                [
                    products(
                        self.x0[i, s],
                        self.x0[layers[-1], s] if target is None else target,
                        self.bands,
                        groups,
                    )
                    for s in steps
                ]
                for i in layers
            ]
        )
        variables: dict[str, Any] = {
            name: (("layer", "step", "batch", "band"), found[:, :, i])
            for i, name in enumerate(("xy", "xx", "yy"))
        }
        xy, xx, yy = (variables[name][1].sum(2) for name in ("xy", "xx", "yy"))
        with np.errstate(invalid="ignore", divide="ignore"):
            variables["agreement"] = (("layer", "step", "band"), xy / np.sqrt(xx * yy))
        timesteps = [float(self.timesteps[s]) for s in steps]
        return xr.Dataset(
            variables,
            coords={
                "layer": layers,
                "step": steps,
                "band": list(self.bands.names),
                "timestep": ("step", timesteps),
            },
        )


def finished(run: Run, batch: int) -> Tensor:
    """A run's finished latents, [batch, ...]: with guidance, where the batch is [cond | null], once
    for each half.
    """
    return torch.cat([run.latents[-1]] * (batch // len(run.labels)))


def products(a: Tensor, b: Tensor, bands: Bands, groups: Any) -> np.ndarray[Any, Any]:
    """<a, b>, |a|², |b|² of each item and band, [3, batch, band], less the mean of the item's
    group.

    n / (n - 1) puts back what a group of n loses with its mean, so that sums over items are those
    of `dit_lens.measures.agreement`; its rows are made for resampling, these are the items' own.
    """
    labels = torch.zeros(len(a)) if groups is None else torch.as_tensor(groups)
    x, y = a.detach().double().clone(), b.detach().double().clone()
    share = torch.ones(len(a), dtype=torch.float64)
    for label in labels.unique():
        here = (labels == label).nonzero().flatten()
        if len(here) < 2:
            raise InvalidValue(
                f"Label {int(label)} has one image; to remove a label's mean it needs two or more "
                "(by_label=False removes the mean of all)."
            )
        for z in (x, y):
            z[here] -= z[here].mean(0)
        share[here] = len(here) / (len(here) - 1)
    pairs = ((x, y), (x, x), (y, y))
    found = [bands.cross(p, q).reshape(len(a), -1, bands.n).sum(1).cpu() for p, q in pairs]
    return np.stack([(each * share[:, None]).numpy() for each in found])
