"""A transformer of one's own: a SiT (Ma et al. 2024, arXiv 2401.08740) in sixty lines of torch,
opened in three, and its synchronization gap.

    python examples/own_sit.py                     # trains for a minute on digits that it draws
    python examples/own_sit.py --pairs 32 --steps 50
"""

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional as F

import dit_lens
from dit_lens.experiments import measure_gap

SIDE, PATCH, WIDTH, HEADS, CLASSES = 16, 2, 64, 4, 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, stream, cond):
        a, b, gate_attn, c, d, gate_mlp = self.modulation(cond)[:, None].chunk(6, dim=2)
        h = self.norm1(stream) * (1 + a) + b
        stream = stream + gate_attn * self.attention(h, h, h, need_weights=False)[0]
        return stream + gate_mlp * self.mlp(self.norm2(stream) * (1 + c) + d)


class SiT(nn.Module):
    """The velocity towards the data at time t, 0 for noise and 1 for data."""

    def __init__(self, layers=8):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.time = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.classes = nn.Embedding(CLASSES + 1, WIDTH)  # the last one stands for no class
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, x, t, y):
        waves = t[:, None] * 2 ** torch.linspace(0, 8, 16, device=x.device)
        cond = F.silu(self.time(torch.cat([waves.sin(), waves.cos()], 1)) + self.classes(y))
        stream = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.layers:
            stream = block(stream, cond)
        patches = self.last(self.norm(stream)).transpose(1, 2).unflatten(2, (SIDE // PATCH, -1))
        return F.pixel_shuffle(patches, PATCH)


def train(model, steps, batch=64):
    """Flow matching on what the bundled model draws, which needs no download."""
    drawn = dit_lens.sample(dit_lens.load("digits"), [i % 10 for i in range(256)], steps=12)
    data, labels = drawn.latents[-1], drawn.labels
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,))
        x, y, t, noise = (
            data[rows],
            labels[rows],
            torch.rand(batch),
            torch.randn(batch, 1, SIDE, SIDE),
        )
        mixed = t[:, None, None, None] * x + (1 - t)[:, None, None, None] * noise
        loss = F.mse_loss(model(mixed, t, y), x - noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=400, help="steps of training")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of twins")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    sit = train(SiT(), args.train)

    # three lines: how it is called, the model, its gap
    adapter = dit_lens.Adapter((1, SIDE, SIDE), labels=10, time=(1.0, 0.0), output=torch.neg)
    model = dit_lens.HookedDiT(
        sit, FlowMatchEulerDiscreteScheduler(), blocks="layers", adapter=adapter
    )
    gap = measure_gap(model, pairs=args.pairs, steps=args.steps)

    print(model)
    print(gap.attrs["headline"])
