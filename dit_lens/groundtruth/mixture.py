"""The exact answer E3 of docs/checks.md as a real DiT: the exact denoiser of data that decide two
bits, a global one and one in every token.

In an orthonormal basis of the latents, with N values in T patches, two kinds of modes decide
between two sides,

- low: the zero frequency, 1 / sqrt(N) everywhere; its coefficient [b] is drawn from N(+-m_low,
  sigma²);
- high: in each patch a checkerboard of unit norm; its coefficients [b, token], independent, from
  N(+-m_high, sigma²);

and all others are N(0, sigma²). Modes are independent, so the posterior mean goes mode by mode:
x0hat = sigma² sqrt(abar) / Gamma x + m (1 - abar) / Gamma tanh(u x), u = m sqrt(abar) / Gamma,
Gamma = 1 - abar + sigma² abar. With eps = (x - sqrt(abar) x0hat) / sqrt(1 - abar) this is

    eps = sqrt(1 - abar) / Gamma (x - m sqrt(abar) tanh(u x)),      m = 0 where nothing is decided,

which is how the model computes it. The final layer's scale is the factor in front, the same for all
modes. The MLP of one layer subtracts the low bit, that of another the high bits: adaLN's scale is
u(t), the neurons are the tanh, adaLN's gate is m sqrt(abar). The low layer's attention first brings
the mean over all tokens to where its MLP reads.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import fold, gelu, unfold

from .. import arguments
from ..errors import InvalidValue
from . import construction as build
from .closed_forms import MOST_WIDTH, alphas_of, commitment_timestep
from .models import GroundTruth, plain_scheduler

UNITS = 128  # neurons of one tanh: half of what a block has, so that one block can carry both bits
REACH = 7.0  # tanh is 1 beyond, to 2e-6
# What a block's conditioning carries besides build.LOW, build.HIGH and build.FINAL: scale, gate.
LOW_BIT, HIGH_BIT = (3, 4), (5, 6)


def mixture_eps(
    x: Tensor, abar: Tensor, m_low: float, m_high: float, sigma: float, patch_size: int = 2
) -> Tensor:
    """The exact noise prediction for the two-scale mixture (E3 in docs/checks.md): in each mode
    sqrt(1 - abar) / Gamma (x - m sqrt(abar) tanh(u x)), u = m sqrt(abar) / Gamma, Gamma = 1 - abar
    + sigma² abar, with m = 0 where nothing is decided. `two_scale` says which modes there are.

    Args:
        x: noised latents [b, c, h, w].
        abar: the cumulative alpha of each, [b].
        m_low: size of the global bit.
        m_high: size of each token's bit.
        sigma: the width of a side.
        patch_size: rows and columns of a patch; even.

    Returns:
        The noise, [b, c, h, w].

    Raises:
        ValueError: for patches that do not fill the latents.

    >>> noise = torch.ones(1, 1, 2, 2)
    >>> mixture_eps(noise, torch.tensor([0.0]), 4.0, 1.0, 0.25)[0, 0, 0].tolist()
    [1.0, 1.0]
    """
    m_low, m_high = arguments.number("m_low", m_low), arguments.number("m_high", m_high)
    sigma = arguments.number("sigma", sigma, above=0, most=MOST_WIDTH)
    patch_size = arguments.whole("patch_size", patch_size, 2)
    low, high = coefficients(x, patch_size)
    flat, checkers = _patterns(x.shape[1], patch_size, x)
    alpha = alphas_of(x, abar).to(x).view(-1, 1)
    gamma = 1 - alpha + sigma**2 * alpha

    def pull(m: float, coefficient: Tensor) -> Tensor:
        return m * alpha.sqrt() * torch.tanh(m * alpha.sqrt() / gamma * coefficient)

    # the low mode's share of each patch [b, 1]
    mean = pull(m_low, low[:, None]) / high.shape[1] ** 0.5
    decided = mean[:, None] * flat[:, None] + pull(m_high, high)[:, None] * checkers[:, None]
    factor = ((1 - alpha).sqrt() / gamma)[..., None, None]
    return factor * (
        x - fold(decided.expand(-1, -1, high.shape[1]), x.shape[2:], patch_size, stride=patch_size)
    )


def coefficients(x: Tensor, patch_size: int = 2) -> tuple[Tensor, Tensor]:
    """Latents in the orthonormal modes of the two-scale mixture.

    Args:
        x: latents [b, c, h, w].
        patch_size: rows and columns of a patch; even.

    Returns:
        The low mode's coefficient [b] and the high modes' [b, token].

    Raises:
        ValueError: for patches that do not fill the latents.

    >>> low, high = coefficients(torch.ones(1, 1, 4, 4)); low.tolist(), high.tolist()
    ([4.0], [[0.0, 0.0, 0.0, 0.0]])
    """
    arguments.tensor("x", x, [None] * 4)
    patch_size = arguments.whole("patch_size", patch_size, 2)
    if patch_size % 2 or any(size % patch_size for size in x.shape[2:]):
        raise InvalidValue(
            f"patch_size is {patch_size}; expected an even one whose patches fill latents of "
            f"{list(x.shape[2:])}."
        )
    # [b, values, token], values as (channel, row, column)
    patches = unfold(x, patch_size, stride=patch_size)
    flat, checkers = _patterns(x.shape[1], patch_size, x)
    return (flat @ patches).sum(-1) / patches.shape[-1] ** 0.5, checkers @ patches


def sides(latents: Tensor, truth: GroundTruth) -> tuple[Tensor, Tensor]:
    """Which side finished latents ended on, 1 or -1.

    The sign is the likelier side; it is the wrong one with the chance answer["misread"], Phi(-m /
    sigma).

    Args:
        latents: [b, c, h, w].
        truth: what `two_scale` gave.

    Returns:
        The low bit [b] and the high bits [b, token].

    Raises:
        ValueError: for a model of another kind, or latents of another shape.

    >>> truth = two_scale(n_layers=2, low_layer=0, high_layer=1)
    >>> low, high = sides(torch.ones(1, 1, 8, 8), truth); low.tolist()
    [1]
    """
    arguments.instance("truth", truth, GroundTruth, "what two_scale gave")
    arguments.tensor("latents", latents)
    config = truth.transformer.config
    wanted = (config["in_channels"], config["sample_size"], config["sample_size"])
    if truth.answer.get("kind") != "two_scale":
        raise InvalidValue(
            f"truth is of kind {truth.answer.get('kind')!r}; expected 'two_scale', which alone has "
            "sides."
        )
    if latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        raise InvalidValue(
            f"latents has shape {list(latents.shape)}; expected [b, {', '.join(map(str, wanted))}]."
        )
    low, high = coefficients(latents, config["patch_size"])
    return low.sign().long().add(low == 0), high.sign().long().add(high == 0)


def two_scale(
    m_low: float = 4.0,
    m_high: float = 1.0,
    sigma: float = 0.25,
    low_layer: int = 10,
    high_layer: int = 20,
    n_layers: int = 28,
    *,
    sample_size: int = 8,
    patch_size: int = 2,
    in_channels: int = 1,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """The exact denoiser of a mixture with a global bit, subtracted by `low_layer`, and one a
    token, by `high_layer` (E3 in docs/checks.md).

    Knock a layer's MLP out and its modes are denoised as N(0, sigma²): that bit is not decided.
    `mixture_agreement` with m and sigma of the answer gives phi, `sides` reads the bits. Bits are
    decided (phi = 0.7752) where m sqrt(abar) = sqrt(Gamma), at log SNR -log(m² - sigma²), so m has
    to exceed sigma.

    Args:
        m_low: size of the global bit.
        m_high: size of each token's bit.
        sigma: the width of a side.
        low_layer: whose MLP subtracts the global bit; any layer, also the same as the other.
        high_layer: whose MLP subtracts the tokens' bits.
        n_layers: blocks of the model.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch; even.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, which knows class 0 only; the answer's `deviation` is the largest relative error
        of its output, over low mode, high modes and rest.

    Raises:
        ValueError: for what can't be built.

    >>> truth = two_scale(m_low=4.0, m_high=1.0, sigma=0.25, n_layers=2, low_layer=0, high_layer=1)
    >>> round(truth.answer["gap_log_snr"], 3)   # log(4² - 1/16) - log(1² - 1/16)
    2.833
    """
    sigma = arguments.number("sigma", sigma, above=0, why="the width of a side")
    m_low, m_high = (
        arguments.number(
            name, size, above=sigma, most=MOST_WIDTH, why="over sigma, or no side is decided"
        )
        for name, size in (("m_low", m_low), ("m_high", m_high))
    )
    n_layers, *sizes = build.checked_sizes(n_layers, sample_size, patch_size, in_channels)
    sample_size, patch_size, in_channels = sizes
    low_layer, high_layer = (
        arguments.whole(name, layer, -n_layers, n_layers - 1) % n_layers
        for name, layer in (("low_layer", low_layer), ("high_layer", high_layer))
    )
    build.check_dtype(dtype)
    if patch_size % 2:
        raise InvalidValue(
            f"patch_size is {patch_size!r}; expected an even one, for a checkerboard has as many "
            "+1 as -1."
        )
    m = {"low": m_low, "high": m_high}
    scheduler = plain_scheduler()
    abars = scheduler.alphas_cumprod.double()
    log_snr = {band: -math.log(m[band] ** 2 - sigma**2) for band in m}
    decided = {band: commitment_timestep(m[band] ** 2 - sigma**2, abars) for band in m}

    transformer = build.blank(n_layers, sample_size, patch_size, in_channels)
    signal, scratch = build.directions(transformer, 2)
    flat, checkers = _patterns(in_channels, patch_size, signal)
    # [half, d_model, 1]
    low, high, mean = (signal @ flat)[..., None], (signal @ checkers)[..., None], scratch[..., :1]
    tokens = (sample_size // patch_size) ** 2
    build.embed(transformer, build.both(signal))
    # the low coefficient is sqrt(T) times the mean
    gathered = {build.LOW: torch.full_like(abars, tokens**0.5)}
    build.act(transformer, low_layer, gathered, low, build.both(mean))
    _decide(
        transformer,
        low_layer,
        LOW_BIT,
        m_low,
        sigma,
        abars,
        mean[..., 0],
        low[..., 0] / tokens**0.5,
    )
    _decide(transformer, high_layer, HIGH_BIT, m_high, sigma, abars, high[..., 0], high[..., 0])
    build.unembed(
        transformer, build.both(signal), (1 - abars).sqrt() / (1 - abars + sigma**2 * abars)
    )
    build.finish(transformer, dtype)
    answer = {
        "kind": "two_scale",
        "m": m,
        "sigma": sigma,
        "layers": sorted({low_layer, high_layer}),
        "low_layer": low_layer,
        "high_layer": high_layer,
        "decision_log_snr": log_snr,
        "decision_timestep": decided,
        "gap_log_snr": log_snr["high"] - log_snr["low"],
        "gap_timesteps": decided["low"] - decided["high"],
        "misread": {band: math.erfc(m[band] / sigma / 2**0.5) / 2 for band in m},
        "deviation": mixture_error(transformer, abars, m_low, m_high, sigma),
    }
    description = (
        f"Exact denoiser of a two-scale mixture of width {sigma:g}: a global bit of size {m_low:g} "
        f"in layer {low_layer}, "
        f"one of {m_high:g} in every token in layer {high_layer}."
    )
    return GroundTruth(transformer, scheduler, answer, description)


@torch.no_grad()
def mixture_error(
    transformer: build.DiT, abars: Tensor, m_low: float, m_high: float, sigma: float
) -> float:
    """The largest relative error of the output, over the low mode, the high modes, the rest, and 41
    timesteps.

    `abars` [timestep]. It is measured on noised data; each norm is over 16 samples, for an eps of
    one mode may be near 0.

    >>> truth = two_scale(low_layer=0, high_layer=0, n_layers=1)
    >>> abars = truth.scheduler.alphas_cumprod.double()
    >>> mixture_error(truth.transformer, abars, 4.0, 1.0, 0.25) < 1e-2
    True
    """
    steps = torch.cat(
        [
            torch.arange(0, 16),
            torch.arange(16, build.TIMESTEPS, 41),
            torch.tensor([build.TIMESTEPS - 1]),
        ]
    )
    config, batch = transformer.config, 16
    side, size, channels = config["sample_size"], config["patch_size"], config["in_channels"]
    t, draw = steps.repeat_interleave(batch), torch.Generator().manual_seed(0)
    abar, tokens = abars[t].view(-1, 1, 1), (side // size) ** 2
    x0 = sigma * torch.randn(
        len(t), channels * size**2, tokens, generator=draw, dtype=torch.float64
    )
    flat, checkers = _patterns(channels, size, x0)
    signs = torch.randint(0, 2, (len(t), 1, tokens + 1), generator=draw).double() * 2 - 1
    x0 += (
        m_low / tokens**0.5 * signs[..., :1] * flat[:, None]
        + m_high * signs[..., 1:] * checkers[:, None]
    )
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn(
        x0.shape, generator=draw, dtype=torch.float64
    )
    x = fold(noisy, (side, side), size, stride=size).to(transformer.dtype)
    out = transformer(x, timestep=t, class_labels=torch.zeros_like(t)).sample.double()
    exact = mixture_eps(x.double(), abars[t], m_low, m_high, sigma, size)
    (low, high), whole = coefficients(exact, size), exact.flatten(1)
    (low_error, high_error), error = coefficients(out - exact, size), (out - exact).flatten(1)

    def energy(v: Tensor) -> Tensor:
        return v.square().reshape(len(steps), -1).sum(1)

    pairs = [(energy(low_error), energy(low)), (energy(high_error), energy(high))]
    pairs.append(
        (energy(error) - sum(e for e, _ in pairs), energy(whole) - sum(e for _, e in pairs))
    )
    return max(float((wrong.clamp(min=0) / right).sqrt().max()) for wrong, right in pairs)


def _patterns(channels: int, patch_size: int, like: Tensor) -> Tensor:
    # [flat and checkerboard, values], orthonormal; a patch's values are (channel, row, column)
    place = torch.arange(patch_size)
    checkers = (1.0 - 2 * ((place[:, None] + place) % 2)).expand(channels, -1, -1)
    found = torch.stack([torch.ones_like(checkers), checkers]).flatten(1).to(like)
    return found / found.shape[1] ** 0.5


def _decide(
    transformer: build.DiT,
    layer: int,
    slots: tuple[int, int],
    m: float,
    sigma: float,
    abars: Tensor,
    read: Tensor,
    write: Tensor,
) -> None:
    # The MLP adds -m sqrt(abar) tanh(u x) `write`, x the stream along `read` (both [half,
    # d_model]). The low bit goes through the first half of the channels and of the neurons, the
    # high one through the second: adaLN's scale and gate are per channel, so one block can have
    # both. Whoever reads both halves finds half of √2 √2.
    block, half = transformer.transformer_blocks[layer], int(slots == HIGH_BIT)
    channels = [half * build.HALF + i for i in build.SIGNAL]
    neurons = slice(half * UNITS, (half + 1) * UNITS)
    adaln = block.norm1.linear
    scale, gate = (slice(part * build.WIDTH, (part + 1) * build.WIDTH) for part in (4, 5))
    adaln.bias[scale][channels] = -1.0  # the factor is then u
    for part, slot, values in (
        (scale, slots[0], m * abars.sqrt() / (1 - abars + sigma**2 * abars)),
        (gate, slots[1], m * abars.sqrt()),
    ):
        build.carry(block, slot, values)
        rows = adaln.weight[part][channels]
        build.route(rows, slot)
        adaln.weight[part][channels] = rows
    slope, knots, weights = _tanh_units()
    first, second = block.ff.net[0].proj, block.ff.net[2]
    first.weight[neurons] = slope * 2**0.5 * build.norm_size(transformer) * read[half]
    first.bias[neurons] = -slope * knots
    second.weight[:, neurons] = -(2**0.5) * write[half][:, None] * weights
    second.bias += 2**0.5 * write[half]  # tanh begins at -1, the neurons at 0


@cache
def _tanh_units() -> tuple[float, Tensor, Tensor]:
    # tanh(z) = -1 + sum of weights * gelu(slope (z - knots)), to about 1e-6. Far to the left every
    # gelu is 0, and the basis is of neighbours' differences, which are constant far to the right:
    # both tails are flat however large z is.
    knots = torch.linspace(-REACH, REACH, UNITS, dtype=torch.float64)
    slope = 1 / float(knots[1] - knots[0])
    z = torch.linspace(-2 * REACH, 2 * REACH, 4001, dtype=torch.float64)
    units = gelu(slope * (z[:, None] - knots), approximate="tanh")
    steps = units[:, :-1] - units[:, 1:]
    found = torch.linalg.lstsq(
        steps, (torch.tanh(z) + 1)[:, None], rcond=1e-7, driver="gelsd"
    ).solution[:, 0]
    nothing = torch.zeros(1, dtype=torch.float64)
    return slope, knots, torch.cat([found, nothing]) - torch.cat([nothing, found])
