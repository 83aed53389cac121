"""Small models laid out as the published ones are, written from the papers for the tests: the names
of modules are the published ones', the code is not.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dit_lens.families import Condition, alive
from dit_lens.families.layouts import DiTLayout, SiTLayout, UViTLayout


class Embed(nn.Module):
    """Patches, and where they lie."""

    def __init__(self, channels, d, patch=2):
        super().__init__()
        self.proj = nn.Conv2d(channels, d, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Times(nn.Module):
    """Fourier features of the time, and two layers; in the original's order, cosines first."""

    def __init__(self, d, width=256):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t):
        half = self.width // 2
        rates = 10000 ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Classes(nn.Module):
    def __init__(self, n, d):
        super().__init__()
        self.num_classes, self.embedding_table = n, nn.Embedding(n + 1, d)

    def forward(self, y, train):
        return self.embedding_table(y)


class Attention(nn.Module):
    """`written` says how: by the fused kernel, or out in full, in two ways."""

    def __init__(self, d, heads, bias=True, written="fused"):
        super().__init__()
        self.num_heads, self.written = heads, written
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        if self.written == "fused":
            z = F.scaled_dot_product_attention(q, k, v)
        elif self.written == "queries":
            z = ((q * scale) @ k.mT).softmax(-1) @ v
        else:
            z = ((q @ k.mT) * scale).softmax(-1) @ v
        return self.proj(z.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaBlock(nn.Module):
    def __init__(self, d, heads, written, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = Attention(d, heads, written=written), Mlp(d)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.skip_linear = nn.Linear(2 * d, d) if skip else None

    def forward(self, x, c, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        a, b, gate1, e, f, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(self.norm1(x), a, b))
        return x + gate2[:, None] * self.mlp(modulated(self.norm2(x), e, f))


class Last(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(d, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(
        self, channels=4, classes=10, layers=3, d=16, heads=2, sigma=True, written="fused", side=8
    ):
        super().__init__()
        self.learn_sigma, self.in_channels = sigma, channels
        self.x_embedder, self.t_embedder = Embed(channels, d), Times(d)
        self.y_embedder = Classes(classes, d)
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // 2) ** 2, d))
        self.blocks = nn.ModuleList(self.block(i, layers, d, heads, written) for i in range(layers))
        self.final_layer = Last(d, 4 * channels * (2 if sigma else 1))

    def block(self, i, layers, d, heads, written):
        return AdaBlock(d, heads, written)

    def through(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x

    def forward(self, x, t, y):
        side = x.shape[-1] // 2
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        x = self.final_layer(self.through(self.x_embedder(x) + self.pos_embed, c), c)
        x = x.unflatten(1, (side, side)).unflatten(3, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
        return self.answer(x.reshape(len(x), -1, 2 * side, 2 * side))

    def answer(self, x):
        return x

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Guidance in one batch, both halves of one x."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        cond, null = eps.chunk(2)
        mixed = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)


class SiT(DiT):
    def answer(self, x):
        return x.chunk(2, dim=1)[0] if self.learn_sigma else x


class SkipDiT(DiT):
    """DiT's blocks with U-ViT's skips."""

    def block(self, i, layers, d, heads, written):
        return AdaBlock(d, heads, written, skip=i > layers // 2)

    def through(self, x, c):
        left = []
        for i, block in enumerate(self.blocks):
            x = block(x, c, left.pop()) if i > len(self.blocks) // 2 else block(x, c)
            if i < len(self.blocks) // 2:
                left.append(x)
        return x


class PlainBlock(nn.Module):
    def __init__(self, d, heads, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn, self.mlp = Attention(d, heads, bias=False), Mlp(d)
        self.skip_linear = nn.Linear(2 * d, d) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    def __init__(self, channels=4, classes=11, layers=5, d=16, heads=2, side=8):
        super().__init__()
        self.patch_embed, self.time_embed = Embed(channels, d), Times(d, d)
        if classes:
            self.label_emb = nn.Embedding(classes, d)
        self.extras = 2 if classes else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (side // 2) ** 2, d))
        half = layers // 2
        self.in_blocks = nn.ModuleList(PlainBlock(d, heads) for _ in range(half))
        self.mid_block = PlainBlock(d, heads)
        self.out_blocks = nn.ModuleList(PlainBlock(d, heads, skip=True) for _ in range(half))
        self.norm, self.decoder_pred = nn.LayerNorm(d), nn.Linear(d, 4 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, timesteps, y=None):
        side, before = x.shape[-1] // 2, [self.time_embed(timesteps)[:, None]]
        if self.extras == 2:
            before.insert(0, self.label_emb(y)[:, None])
        x = torch.cat([*before, self.patch_embed(x)], dim=1) + self.pos_embed
        left = []
        for block in self.in_blocks:
            x = block(x)
            left.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, left.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        x = x.unflatten(1, (side, side)).unflatten(3, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(x.reshape(len(x), -1, 2 * side, 2 * side))


MODELS = {
    "dit": [
        lambda: DiT(),
        lambda: DiT(channels=1, sigma=False, written="queries"),
        lambda: DiT(classes=1000, layers=4, written="scores"),
    ],
    "sit": [
        lambda: SiT(),
        lambda: SiT(channels=1, sigma=False, heads=4),
        lambda: SiT(layers=2, side=4),
    ],
    "skips": [
        lambda: SkipDiT(layers=5),
        lambda: SkipDiT(channels=1, layers=3),
        lambda: SkipDiT(layers=7, sigma=False),
    ],
    "uvit": [lambda: UViT(), lambda: UViT(channels=1, classes=0), lambda: UViT(layers=7, heads=4)],
}
LABELS = {"dit": "y", "sit": "y", "skips": "y", "uvit": "y"}


def small_of(kind, variant):
    """A small model with all weights alive, and a condition for two items."""
    with torch.random.fork_rng():
        torch.manual_seed(variant)
        model = alive(MODELS[kind][variant](), seed=variant)
    labels = {} if getattr(model, "extras", 2) == 1 else {"y": torch.tensor([3, 7])}
    return model, Condition(labels)


def family_of_kind(kind):
    """The family with small models, as the contract wants it."""
    base = {"dit": DiTLayout, "sit": SiTLayout, "skips": DiTLayout, "uvit": UViTLayout}[kind]

    class Tested(base):
        def small(self, variant):
            return small_of(kind, variant)

    return Tested(small_of(kind, 0)[0])
