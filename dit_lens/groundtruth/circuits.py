"""Causes that are harder to find than E6's, and the exact effect of taking any of them away.

`gaussian` has causes that add up. Here the work of the causing layer is done by two layers that
know of each other: `redundant`, either of which suffices, and `relayed`, where one part goes
straight to the output and the other through a later layer. All of these models, with any layers
taken out, are linear in each band, so what their gap becomes is computed and not sampled:
`exact_agreement`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import arguments
from ..errors import InvalidValue
from . import construction as build
from .closed_forms import commitment_log_snr, linear_chain
from .models import GroundTruth, plain_scheduler


def redundant(
    lam_low: float = 4.0,
    lam_high: float = 0.25,
    layers: Sequence[int] = (1, 3),
    n_layers: int = 5,
    *,
    sample_size: int = 4,
    patch_size: int = 1,
    in_channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """The exact denoiser of `gaussian`, whose gap is made by either of two layers: the second does
    what the first would have done, less what the first has done.

    Knock out one of them: the gap stays. Knock out both: it is 0.

    Args:
        lam_low: variance of the token mean.
        lam_high: variance of the rest.
        layers: the two, the earlier one first.
        n_layers: blocks of the model.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, as `gaussian` gives it.

    Raises:
        ValueError: for what can't be built.

    >>> redundant().answer["without"]
    {'1': 'the gap', '3': 'the gap', '1, 3': 'none'}
    """
    first, second = _two(layers, n_layers)
    transformer, scheduler, gain, signal, spare = _exact(
        lam_low, lam_high, n_layers, sample_size, patch_size, in_channels, spare=2
    )
    untouched, note = spare
    build.embed(transformer, build.both(untouched))
    wide = build.both(signal)
    build.act(transformer, first, {build.LOW: gain}, signal, wide + build.both(note))
    build.act(transformer, second, {build.LOW: gain}, untouched, wide)
    # the second's other half of the channels reads the first's note, at every time, to take it off
    block, half = transformer.transformer_blocks[second], build.HALF
    build.carry(block, build.HIGH, torch.ones_like(gain))
    scale = block.norm1.linear.weight[build.WIDTH : 2 * build.WIDTH]
    for channel in build.SIGNAL:
        build.route(scale[half + channel : half + channel + 1], build.HIGH)
    block.attn1.to_v.weight[: note.shape[-1]] -= 2**0.5 * note[1].T
    build.finish(transformer, dtype)
    without = {str(first): "the gap", str(second): "the gap", f"{first}, {second}": "none"}
    answer = _answer("redundant", lam_low, lam_high, [first, second]) | {"without": without}
    return GroundTruth(
        transformer, scheduler, answer, f"Either of layers {first} and {second} makes all the gap."
    )


def relayed(
    lam_low: float = 4.0,
    lam_high: float = 0.25,
    layers: Sequence[int] = (1, 3),
    n_layers: int = 5,
    direct: float = 0.5,
    *,
    sample_size: int = 4,
    patch_size: int = 1,
    in_channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """The exact denoiser of `gaussian`, the difference between the bands made by one layer, of
    which a part is read by the output and the rest only by a later layer, which hands it on.

    Args:
        lam_low: variance of the token mean.
        lam_high: variance of the rest.
        layers: the maker and the one that hands on.
        n_layers: blocks of the model.
        direct: the part that the output reads of the maker itself, from 0 to 1.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, as `gaussian` gives it.

    Raises:
        ValueError: for what can't be built.

    >>> relayed(direct=0.25).answer["direct"]
    0.25
    """
    maker, hands_on = _two(layers, n_layers)
    direct = arguments.number("direct", direct, 0, 1)
    transformer, scheduler, gain, signal, (unread,) = _exact(
        lam_low, lam_high, n_layers, sample_size, patch_size, in_channels, spare=1
    )
    wide, aside = build.both(signal), build.both(unread)
    split = direct * wide + (1 - direct) * aside
    build.act(transformer, maker, {build.LOW: gain}, signal, split)
    build.act(transformer, hands_on, {build.LOW: torch.ones_like(gain)}, unread, wide)
    build.finish(transformer, dtype)
    answer = _answer("relayed", lam_low, lam_high, [maker, hands_on]) | {"direct": float(direct)}
    return GroundTruth(
        transformer,
        scheduler,
        answer,
        f"Layer {maker} makes the gap: {direct:.0%} of it directly, the rest through {hands_on}.",
    )


def _two(layers: Sequence[int], n_layers: int) -> tuple[int, int]:
    layers = arguments.layers(layers, arguments.whole("n_layers", n_layers, 1, build.MOST_LAYERS))
    if len(layers) != 2 or not layers[0] < layers[1]:
        raise InvalidValue(f"layers is {list(layers)}; expected two, the earlier one first.")
    return layers[0], layers[1]


def _exact(
    lam_low: float,
    lam_high: float,
    n_layers: int,
    sample_size: int,
    patch_size: int,
    in_channels: int,
    spare: int,
) -> tuple[Any, Any, Any, Any, Any]:
    """A model that answers c_high for both bands, its scheduler, the gain of the low band that is
    yet to be made, the signal's directions, and so many unused ones.
    """
    lam_low = arguments.number("lam_low", lam_low, above=0)
    lam_high = arguments.number("lam_high", lam_high, above=0)
    scheduler = plain_scheduler()
    abars = scheduler.alphas_cumprod.double()
    transformer = build.blank(n_layers, sample_size, patch_size, in_channels)
    signal, *unused = build.directions(transformer, 1 + spare)
    build.embed(transformer, build.both(signal))
    high = lam_high * abars + 1 - abars
    build.unembed(transformer, build.both(signal), (1 - abars).sqrt() / high)
    return transformer, scheduler, high / (lam_low * abars + 1 - abars) - 1, signal, unused


def _answer(kind: str, lam_low: float, lam_high: float, layers: list[int]) -> dict[str, Any]:
    low, high = (float(commitment_log_snr(lam)) for lam in (lam_low, lam_high))
    return {
        "kind": kind,
        "lam": {"low": lam_low, "high": lam_high},
        "layers": layers,
        "commitment_log_snr": {"low": low, "high": high},
        "gap_log_snr": high - low,
    }


def exact_agreement(
    truth: GroundTruth,
    steps: int,
    removed: Sequence[int] = (),
    window: Sequence[int] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """corr²(predicted x0 at each step, finished latents) of DDIM runs (eta 1) of any number of
    images, with layers taken out of the model: computed, not sampled.

    A model that is linear in each band answers eps = c(t) x in it, so x_t is a Gaussian chain. c is
    measured on a copy of the model in which the removed layers' weights are 0; nothing of the
    answer, and nothing of how a tool knocks layers out, is used.

    Args:
        truth: of `gaussian`, `redundant`, `relayed` or `planted`.
        steps: of denoising.
        removed: layers whose attention and MLP add nothing.
        window: the steps in which they don't; None is all.

    Returns:
        The agreement, [step, band] (low, high), and log SNR, [step].

    Raises:
        ValueError: for a model that is not linear in each band.

    >>> agreement, log_snr = exact_agreement(redundant(), 10)
    >>> agreement.shape, bool((np.diff(agreement, axis=0) > 0).all())
    ((10, 2), True)
    """
    arguments.instance("truth", truth, GroundTruth, "what a model of this namespace gave")
    steps = arguments.whole("steps", steps, 1, build.TIMESTEPS)
    n_layers = truth.transformer.config["num_layers"]
    removed = arguments.layers(removed, n_layers, name="removed", fewest=0)
    if window is not None:
        window = arguments.wholes("window", window, 0, steps - 1)
    scheduler = copy.deepcopy(truth.scheduler)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    abars = scheduler.alphas_cumprod.double().numpy()
    abar = np.append(abars[times.numpy()], float(scheduler.final_alpha_cumprod))[:, None]
    c = _coefficients(truth.transformer, times)
    if len(removed):
        gone = np.zeros(steps, bool)
        gone[list(range(steps) if window is None else window)] = True
        c = np.where(gone[:, None], _coefficients(_without(truth.transformer, removed), times), c)
    signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
    x0 = (1 - noise[:-1] * c) / signal[:-1]
    _, agreement = linear_chain(x0, c, signal, noise, eta=1.0)
    return agreement[:-1], 2 * np.log(signal[:-1] / noise[:-1])[:, 0]


def _without(transformer: build.DiT, layers: Sequence[int]) -> build.DiT:
    """A copy whose layers add nothing."""
    found = copy.deepcopy(transformer)
    with torch.no_grad():
        for layer in layers:
            block = found.transformer_blocks[layer]
            for out in (block.attn1.to_out[0], block.ff.net[2]):
                out.weight.zero_()
                out.bias.zero_()
    return found


@torch.no_grad()
def _coefficients(transformer: build.DiT, times: torch.Tensor) -> NDArray[np.float64]:
    """c of eps = c x at each timestep for both bands, [step, band]."""
    config, n = transformer.config, len(times)
    shape = (n, config["in_channels"], config["sample_size"], config["sample_size"])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    low = x.mean((2, 3), keepdim=True).expand_as(x)
    found = np.empty((n, 2))
    for band, part in enumerate((low, x - low)):
        given = part.to(transformer.dtype)
        out = transformer(given, timestep=times, class_labels=torch.zeros(n, dtype=torch.long))
        eps = out.sample[:, : shape[1]].double()
        c = (eps * part).flatten(1).sum(1) / part.square().flatten(1).sum(1)
        left = (eps - c.view(-1, 1, 1, 1) * part).flatten(1).norm(dim=1)
        size = (eps.flatten(1).norm(dim=1)).clamp_min(1e-3)
        if not bool((left / size < 0.02).all()):
            raise InvalidValue(
                f"The model is not linear in each band: up to {float((left / size).max()):.1%} of "
                "its answer is no multiple of the input."
            )
        found[:, band] = c.numpy()
    return found
