"""Tricks that put a formula into the weights of a stock diffusers DiT.

- *LayerNorm*: two channels hold the constants +C and -C, so every LayerNorm divides by very nearly
  the same number.
- *Positions* are added to the stream and cannot be switched off. The signal lives in directions of
  channel space that are orthogonal to every position, to the ones (which LayerNorm subtracts) and
  zero in the constant channels.
- *Time*: silu(z) - silu(-z) = z, so a pair of units carries a value through a nonlinearity
  untouched. A function of t is then a linear fit on the 256 sinusoids of the timestep embedding,
  plus a few units silu(-t/tau) for the end t = 0.
- *Two gains at once*: the signal is stored twice, once in each half of the channels. adaLN's scale
  is per channel, so the two copies reach the attention with different factors: the first feeds the
  low band, the second the high band.
- *High band*: x - mean(x), where a second head, which lets each token look at itself alone, gives
  x.

What comes out is exact up to rounding, the fit (about 1e-5) and LayerNorm (about |signal|^2 / 4
C^2).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue

DiT = Any  # a DiTTransformer2DModel: diffusers' types do not show a model's attributes
TIMESTEPS = 1000
# the constant C: LayerNorm's error is about |signal|^2 / 4 C^2, float32 does not mind
MASSIVE = 1e4
WIDTH, HEADS = 64, 2
HALF, HEAD = WIDTH // 2, WIDTH // HEADS
# The position embedding of one axis fills one half: sin of 16 frequencies, then cos of the same.
# the fastest: they tell tokens apart
PLACE = [half + i for half in (0, HALF) for i in (0, 1, 2, 3, 16, 17, 18, 19)]
ONE = HALF - 2  # cos of a slow frequency: 1 for every token
# cos of the slowest, of the two axes: +C and -C, their positions cancel
CONSTANT = (HALF - 1, WIDTH - 1)
SIGNAL = [*range(4, 16), *range(20, HALF - 2)]  # in each half, the channels that may hold signal
EDGES = [0.5 * 2**k for k in range(8)]  # the taus, in timesteps
MOST_LAYERS, MOST_SIDE = 256, 128  # more would take minutes to build
LOW, HIGH, FINAL = range(3)  # what a block's conditioning carries


def checked_sizes(
    n_layers: int, sample_size: int, patch_size: int, in_channels: int
) -> tuple[int, int, int, int]:
    """The sizes of a model that can be built, in Python's own type."""
    n_layers = arguments.whole("n_layers", n_layers, 1, MOST_LAYERS)
    patch_size = arguments.whole("patch_size", patch_size, 1, WIDTH)
    sample_size = arguments.whole(
        "sample_size", sample_size, 2 * patch_size, MOST_SIDE, "two or more patches a side"
    )
    if sample_size % patch_size:
        raise InvalidValue(
            f"sample_size is {sample_size} and patch_size {patch_size}; expected 2 or more whole "
            "patches a side."
        )
    return n_layers, sample_size, patch_size, arguments.whole("in_channels", in_channels, 1, WIDTH)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what can't hold a signal next to LayerNorm's large constants."""
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise arguments.refusal(
            "dtype",
            dtype,
            "torch.float32 or torch.float64, in which alone these models are exact",
            wrong_type=not isinstance(dtype, torch.dtype),
        )


def blank(n_layers: int, sample_size: int, patch_size: int, in_channels: int) -> DiT:
    """A float64 DiT of width 64, all its weights zero: each block is the identity and the output is
    0.
    """
    n_layers, *sizes = checked_sizes(n_layers, sample_size, patch_size, in_channels)
    sample_size, patch_size, in_channels = sizes
    with torch.random.fork_rng(devices=[]):  # the layers draw initial weights
        transformer: DiT = DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            in_channels=in_channels,
            num_layers=n_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=1,
        )
    for parameter in transformer.parameters():
        parameter.detach().zero_()
    transformer.pos_embed.proj.bias.detach()[list(CONSTANT)] = torch.tensor([MASSIVE, -MASSIVE])
    return transformer.double().eval().requires_grad_(False)


def finish(transformer: DiT, dtype: torch.dtype) -> DiT:
    """The built model in `dtype`; half precision cannot hold a signal next to LayerNorm's
    large constants.
    """
    check_dtype(dtype)
    # diffusers' own `to` warns about layers this model does not have
    return torch.nn.Module.to(transformer, dtype)


def directions(transformer: DiT, sets: int) -> Tensor:
    """Signal directions [set, half, d_model, patch values], orthonormal and untouched by positions
    and LayerNorm.
    """
    positions = transformer.pos_embed.pos_embed[0].double()
    count = transformer.config["in_channels"] * transformer.config["patch_size"] ** 2
    found = torch.zeros(2, WIDTH, sets * count, dtype=torch.float64)
    for half in (0, 1):
        channels = [half * HALF + i for i in SIGNAL]
        fixed = torch.cat(
            [positions[:, channels], torch.ones(1, len(channels), dtype=torch.float64)]
        )
        _, size, right = torch.linalg.svd(fixed)
        size = torch.nn.functional.pad(size, (0, len(channels) - len(size)))
        room = int((size < 1e-6).sum())
        if sets * count > room:
            raise InvalidValue(
                f"in_channels * patch_size^2 is {count}; expected at most {room // sets}, the "
                f"values a patch that fit next to the positions of a {len(positions)}-token model "
                f"of width {WIDTH}."
            )
        found[half, channels] = right[-sets * count :].T
    return found.view(2, WIDTH, sets, count).permute(2, 0, 1, 3)


def both(copies: Tensor) -> Tensor:
    """The signal's directions [d_model, values]: both copies [half, d_model, values] at once, of
    unit length.
    """
    return (copies[0] + copies[1]) / 2**0.5


def norm_size(transformer: DiT) -> float:
    """The number that LayerNorm divides by, the same at every token but for the signal."""
    stream = transformer.pos_embed.pos_embed[0].double() + transformer.pos_embed.proj.bias
    return float((stream.var(-1, unbiased=False) + 1e-6).sqrt().mean())


def embed(transformer: DiT, direction: Tensor, factor: float = 1.0) -> None:
    """Let the patch values enter the stream along `direction` [d_model, values]."""
    transformer.pos_embed.proj.weight += factor * direction.view_as(
        transformer.pos_embed.proj.weight
    )


def unembed(transformer: DiT, direction: Tensor, values: Tensor) -> None:
    """Let the output be the stream along `direction` [d_model, values], times the function of t
    `values` [timestep].
    """
    config = transformer.config
    carry(transformer.transformer_blocks[0], FINAL, values - 1)  # adaLN's factor is 1 + scale
    route(transformer.proj_out_1.weight[WIDTH:], FINAL)
    # a patch comes in as (channel, row, column) and leaves as (row, column, channel)
    place = (
        torch.arange(direction.shape[1])
        .view(config["in_channels"], config["patch_size"], -1)
        .permute(1, 2, 0)
    )
    transformer.proj_out_2.weight += norm_size(transformer) * direction.T[place.flatten()]


def carry(block: Any, slot: int, values: Tensor) -> None:
    """Make the block's conditioning hold the function of t `values` [timestep], in units 2 slot and
    2 slot + 1.
    """
    embedder = block.norm1.emb.timestep_embedder
    sinusoids, ramp, curves = _time_features()
    edge = slice(WIDTH - len(EDGES), WIDTH)
    embedder.linear_1.weight[edge] = -ramp / torch.tensor(EDGES, dtype=torch.float64)[:, None]

    start = values[-1]  # apart, so that a constant is exact
    factor = (1 + values).abs()  # what adaLN makes of it
    size = factor + 0.01 * factor.max()  # a small factor is fitted as closely as a large one
    solution = torch.zeros(256 + len(EDGES) + 1, dtype=torch.float64)
    if (values != start).any():
        features = torch.cat([sinusoids, curves, torch.ones(TIMESTEPS, 1, dtype=torch.float64)], 1)
        solution = _fit(features / size[:, None], (values - start) / size)
    here = [2 * slot, 2 * slot + 1]
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    embedder.linear_1.weight[here] = sign[:, None] * solution[:256]
    embedder.linear_1.bias[here] = sign * (solution[-1] + start)
    embedder.linear_2.weight[here, 2 * slot] = sign
    embedder.linear_2.weight[here, 2 * slot + 1] = -sign
    embedder.linear_2.weight[here, edge] = sign[:, None] * solution[256:-1]


def route(weight: Tensor, slot: int) -> None:
    """Make rows of an adaLN projection, `weight` [rows, d_model], give out what `carry` put in
    `slot`.
    """
    weight[:, 2 * slot], weight[:, 2 * slot + 1] = 1.0, -1.0


@cache
def _time_features() -> tuple[Tensor, Tensor, Tensor]:
    # [timestep, 256], the weights that make t of them, and the units silu(-t/tau) [timestep, tau]
    time = torch.arange(TIMESTEPS)
    sinusoids = get_timestep_embedding(time, 256, flip_sin_to_cos=True).double()
    ramp = _fit(sinusoids, time.double())
    taus = torch.tensor(EDGES, dtype=torch.float64)
    return sinusoids, ramp, torch.nn.functional.silu(-(sinusoids @ ramp)[:, None] / taus)


def _fit(features: Tensor, target: Tensor) -> Tensor:
    # Cut off where float32 would: larger coefficients fit no better and round worse.
    return torch.linalg.lstsq(features, target[:, None], rcond=1e-7, driver="gelsd").solution[:, 0]


def act(
    transformer: DiT, layer: int, gains: dict[int, Tensor], read: Tensor, write: Tensor
) -> None:
    """Let a layer's attention add gains[LOW](t) mean(x) + gains[HIGH](t) (x - mean(x)) of the
    signal x to the stream.

    `read` are the two copies [half, d_model, values]; `write` [d_model, values] where the sum goes.
    Head 0 looks at all tokens alike, head 1 at its own token alone.
    """
    block, count, size = (
        transformer.transformer_blocks[layer],
        read.shape[-1],
        norm_size(transformer),
    )
    adaln = block.norm1.linear
    adaln.bias[2 * WIDTH : 3 * WIDTH] = 1.0  # the gate
    scale, scale_bias = adaln.weight[WIDTH : 2 * WIDTH], adaln.bias[WIDTH : 2 * WIDTH]
    for band, half in ((LOW, 0), (HIGH, HALF)):
        channels = [half + i for i in SIGNAL]
        scale_bias[channels] = -1.0  # the factor is then the gain
        if band in gains:
            carry(block, band, gains[band])
            rows = scale[channels]
            route(rows, band)
            scale[channels] = rows
    attention = block.attn1
    attention.to_v.weight[:count] = 2**0.5 * read[0].T
    attention.to_out[0].weight[:, :count] = size * write
    if HIGH in gains:
        attention.to_v.weight[count : 2 * count] = attention.to_v.weight[HEAD : HEAD + count] = (
            2**0.5 * read[1].T
        )
        attention.to_out[0].weight[:, count : 2 * count] = -size * write
        attention.to_out[0].weight[:, HEAD : HEAD + count] = size * write
        _look_at_itself(transformer, layer, size)


def _look_at_itself(transformer: DiT, layer: int, size: float) -> None:
    # The place channels of a token have the same length everywhere, so their inner product is
    # largest with itself.
    # LayerNorm took the token's mean off them; the channel that is 1 everywhere gives it back.
    place = transformer.pos_embed.pos_embed[0].double()[:, PLACE]
    products = place @ place.T
    apart = (products.diag()[:, None] - products + 1e9 * torch.eye(len(place))).min()
    sharpness = (50 * HEAD**0.5 / apart).sqrt()  # exp(-50) of the attention goes elsewhere
    rows = range(HEAD, HEAD + len(PLACE))
    for project in (
        transformer.transformer_blocks[layer].attn1.to_q,
        transformer.transformer_blocks[layer].attn1.to_k,
    ):
        project.weight[rows, PLACE] = sharpness * size
        project.weight[rows, ONE] = -sharpness * size
        project.bias[rows] = sharpness


def add_noise(transformer: DiT, signal: Tensor, noise: float, draw: torch.Generator) -> None:
    """Give every block a random MLP that reads the signal [d_model, values] and adds `noise` times
    its answer to it.
    """
    size, count = norm_size(transformer), signal.shape[1]
    for block in transformer.transformer_blocks:
        block.norm1.linear.bias[5 * WIDTH :] = 1.0  # the gate
        into, out = block.ff.net[0].proj.weight, block.ff.net[2].weight
        reading = torch.randn(len(into), count, generator=draw, dtype=torch.float64) / count**0.5
        writing = (
            torch.randn(count, len(into), generator=draw, dtype=torch.float64) / len(into) ** 0.5
        )
        into.copy_(size * reading @ signal.T)
        out.copy_(noise * signal @ writing)
