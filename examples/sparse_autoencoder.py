"""A sparse autoencoder on the residual stream of `digits`: record, train, splice in.

    python examples/sparse_autoencoder.py [FOLDER]

Activations of one layer go to disk (FOLDER, by default a temporary one; a recording that is there
already is used). A TopK autoencoder (Gao et al. 2024, arXiv 2406.04093) learns to write each
token's vector as a sum of few of many directions. Then it takes the layer's place while new images
are sampled: how far do they move, beside leaving the layer's stream at its mean, and two images
that have nothing to do with each other? Takes two minutes on one core.
"""

import sys
import tempfile

import torch
from torch import Tensor, nn

import dit_lens

torch.set_num_threads(1)
torch.manual_seed(0)
NAME = "blocks.14.hook_resid_post"
STEPS, AT = 20, range(6, 20, 2)
DIRECTIONS, ACTIVE = 512, 16


class TopK(nn.Module):
    """Vectors [..., d] as sums of `ACTIVE` of `DIRECTIONS` directions, around a mean and scale."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.encoder = nn.Linear(len(mean), DIRECTIONS)
        self.decoder = nn.Linear(DIRECTIONS, len(mean), bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(nn.functional.normalize(self.encoder.weight.T, dim=0))

    def codes(self, x: Tensor) -> Tensor:
        """How much of each direction, [..., DIRECTIONS]; all but the largest few are 0."""
        strength = self.encoder((x - self.mean) / self.scale).relu()
        largest = strength.topk(ACTIVE, dim=-1)
        return torch.zeros_like(strength).scatter(-1, largest.indices, largest.values)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.codes(x)) * self.scale + self.mean


def unexplained(sae: TopK, x: Tensor) -> Tensor:
    """The share of the vectors' variance that the reconstruction leaves."""
    return (x - sae(x)).square().sum() / (x - sae.mean).square().sum()


# Activations of 80 images on disk, the last 16 of them kept for judging.
model = dit_lens.load("digits")
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
labels = [i % 10 for i in range(80)]
data = dit_lens.record(model, NAME, labels, folder, steps=STEPS, at=AT, batch=16)
print(data)

items = torch.cat([batch["item"] for batch in data.batches(8192)])
seen = data.take(items < 64)["activation"]
unseen = data.take(items >= 64)["activation"]

# Train on shuffled batches.
sae = TopK(seen.mean(0), seen.std())
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
for epoch in range(10):
    for batch in data.batches(1024, seed=epoch):
        x = batch["activation"][batch["item"] < 64]
        if len(x):
            loss = unexplained(sae, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
with torch.no_grad():
    left = float(unexplained(sae, unseen))
    used = int((sae.codes(unseen) > 0).any(0).sum())
print(f"unseen images: {1 - left:.1%} of the variance explained by {ACTIVE} of {DIRECTIONS}")
print(f"directions that are ever active there: {used}")


# In the layer's place, at the steps that it has learnt from, on seeds that it has not.
def sampled(edit=None) -> Tensor:
    with dit_lens.trace(model) as t:
        if edit is not None:
            t.edit(NAME, edit, steps=AT)
        run = dit_lens.sample(model, list(range(10)) * 2, seeds=1000, steps=STEPS)
    return run.latents[-1]


def spliced(activation, hook):
    with torch.no_grad():
        return sae(activation)


plain = sampled()
strangers = (plain[:10] - plain[10:]).square().mean()
for what, edit in (
    ("the autoencoder", spliced),
    ("the mean", lambda activation, hook: sae.mean.expand_as(activation)),
):
    moved = (sampled(edit) - plain).square().mean() / strangers
    print(
        f"{what} in the layer's place moves the images by {moved:.1%} of what strangers differ by"
    )
