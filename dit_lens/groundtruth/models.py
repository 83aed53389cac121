"""Real DiTs whose answer is known.

Every model is a stock `DiTTransformer2DModel` with the weights that `construction` explains: it can
be saved, loaded, hooked and traced like any other. `gaussian` is the causal ground truth: its
planted layers make the difference between the bands, and without them there is none. `planted` is
the ground truth for profiles: its planted layers amplify a band of the stream and nothing else
happens, for the output reads a faint copy of the input that no layer touches and is the exact
denoiser of white data. So its trajectories are sane, known, and the same with the layers knocked
out.

The low band is `token_mean`, the high band the rest. With patch size 1 it is the latent's zero
frequency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from ..errors import InvalidValue
from ..storage import replacing
from . import construction as build
from .closed_forms import commitment_log_snr, commitment_timestep, planted_gain
from .measured import denoiser_error, gain_error

BANDS = {"low": build.LOW, "high": build.HIGH}
# size of the copy that `planted` reads its output from: its energy, 4e-6, is the error of the gains
FAINT = 1 / 512


@dataclass(frozen=True)
class GroundTruth:
    """A model and what is known about it.

    Attributes:
        transformer: a `DiTTransformer2DModel`.
        scheduler: a `DDIMScheduler`.
        answer: what is known, by name, in plain numbers, strings and lists only.
        description: the same as a sentence.

    >>> truth = planted(layers=(1,), n_layers=2)
    >>> truth.answer["onset"]
    1
    """

    transformer: build.DiT
    scheduler: Any
    answer: dict[str, Any]
    description: str

    def save(self, folder: str | Path) -> Path:
        """Write a folder that loads like any diffusers transformer: its weights, scheduler/, and
        answer.json.

        Args:
            folder: where; made if it is not there.

        Returns:
            The folder.
        """
        folder = Path(folder)
        self.transformer.save_pretrained(folder)
        self.scheduler.save_pretrained(folder / "scheduler")
        text = json.dumps({**self.answer, "description": self.description}, indent=2)
        with replacing(folder / "answer.json") as part:
            part.write_text(text + "\n")
        return folder


def gaussian(
    lam_low: float = 4.0,
    lam_high: float = 0.25,
    layers: Sequence[int] = (14,),
    n_layers: int = 28,
    *,
    shares: Sequence[float] | None = None,
    decoys: Sequence[int] = (),
    noise: float = 0.0,
    seed: int = 0,
    sample_size: int = 8,
    patch_size: int = 1,
    in_channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """The exact denoiser of Gaussian data with two bands, whose gap is made by `layers` and by
    nothing else (E6 in docs/checks.md).

    The final layer applies c_high(t) to everything; the attention of `layers`, the same to all
    tokens, brings the token mean to c_low(t). Layer k multiplies it by (c_low / c_high)^share.
    Knock all of them out: c_high for both bands, gap 0.

    Args:
        lam_low: variance of the token mean.
        lam_high: variance of the rest.
        layers: those that make the gap.
        n_layers: blocks of the model.
        shares: of each of `layers`, summing to 1; one may be negative. By default equal ones.
        decoys: layers that write the low band, at full strength, where it is never read: they show
            a difference and cause nothing.
        noise: every other layer multiplies both bands alike by 1 + f(t), f a random smooth function
            of about this size. That is no difference between the bands, and makes the denoiser
            inexact: `exact_agreement` says what each of them does to the gap.
        seed: of the noise.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, which knows class 0 only; the answer holds the commitment of both bands and the
        gap, as `commitment_log_snr` gives them.

    Raises:
        ValueError: for what can't be built.

    >>> truth = gaussian(4.0, 0.25, layers=(1,), n_layers=2)
    >>> round(truth.answer["gap_log_snr"], 3)   # log 4 - log 0.25
    2.773
    """
    check_layers(layers, n_layers, "layers")
    if decoys:
        check_layers(decoys, n_layers, "decoys", taken=layers)
    if not 0 <= noise < 1:
        raise InvalidValue(f"noise is {noise!r}; expected a share of the signal from 0 to below 1.")
    split = (
        [1 / len(layers)] * len(layers) if shares is None else [float(share) for share in shares]
    )
    if len(split) != len(layers) or not math.isclose(sum(split), 1.0, abs_tol=1e-9):
        raise InvalidValue(
            f"shares is {shares!r}; expected {len(layers)} numbers, one a layer, that sum to 1."
        )
    scheduler = plain_scheduler()
    abars = scheduler.alphas_cumprod.double()
    commit = {
        band: commitment_timestep(lam, abars)
        for band, lam in (("low", lam_low), ("high", lam_high))
    }
    log_snr = {
        band: float(commitment_log_snr(lam)) for band, lam in (("low", lam_low), ("high", lam_high))
    }

    transformer = build.blank(n_layers, sample_size, patch_size, in_channels)
    signal, *unread = build.directions(transformer, 2 if decoys else 1)
    write = build.both(signal)
    build.embed(transformer, write)
    ratio = (lam_high * abars + 1 - abars) / (lam_low * abars + 1 - abars)  # c_low / c_high
    for layer, share in zip(layers, split, strict=True):
        build.act(transformer, layer, {build.LOW: ratio**share - 1}, signal, write)
    for layer in decoys:
        build.act(
            transformer, layer, {build.LOW: torch.ones_like(abars)}, signal, build.both(unread[0])
        )
    if noise:
        draw = torch.Generator().manual_seed(seed)
        for layer in sorted(set(range(n_layers)) - {*layers, *decoys}):
            both_alike = noise * _wave(draw)
            bands = {build.LOW: both_alike, build.HIGH: both_alike}
            build.act(transformer, layer, bands, signal, write)
    build.unembed(transformer, write, (1 - abars).sqrt() / (lam_high * abars + 1 - abars))
    build.finish(transformer, dtype)
    answer = {
        "kind": "gaussian",
        "lam": {"low": lam_low, "high": lam_high},
        "layers": list(layers),
        "shares": split,
        "decoys": list(decoys),
        "noise": noise,
        "commitment_log_snr": log_snr,
        "commitment_timestep": commit,
        "gap_log_snr": log_snr["high"] - log_snr["low"],
        "gap_timesteps": commit["low"] - commit["high"],
        "gap_without_layers": 0.0,
        "deviation": denoiser_error(transformer, abars, lam_low, lam_high),
    }
    description = (
        f"Exact denoiser of Gaussian data, variance {lam_low:g} in the token mean and {lam_high:g} "
        "in the rest; "
        f"the difference is made by {_named(layers)} alone."
    )
    return GroundTruth(transformer, scheduler, answer, description)


def planted(
    layers: Sequence[int] = (23, 24, 25, 26, 27),
    a: float = 0.3,
    n_layers: int = 28,
    band: str = "low",
    *,
    switch: Mapping[str, int] | None = None,
    switch_width: float = 20.0,
    noise: float = 0.0,
    seed: int = 0,
    sample_size: int = 8,
    patch_size: int = 1,
    in_channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """A model in which each of `layers` multiplies a band of the stream's signal by 1 + a (E4 in
    docs/checks.md).

    It does so by attention alone, so twins coupled with strength g see 1 + rho(g) a
    (`planted_gain`).

    Args:
        layers: those that amplify.
        a: by how much, the gain less 1.
        n_layers: blocks of the model.
        band: "low", "high" or "both".
        switch: each band's timestep at which its gain comes on, a(t) = a sigmoid((switch - t) /
            switch_width), full when clean; None is always on.
        switch_width: in timesteps.
        noise: if above 0 every layer has a random MLP that adds about that fraction of the signal.
        seed: of these MLPs.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, which knows class 0 only; the answer's `deviation` is the largest relative error
        of the measured gain from layer to layer.

    Raises:
        ValueError: for what can't be built.

    >>> round(planted(layers=(1, 2), n_layers=4).answer["gain"], 2)
    1.69
    """
    check_layers(layers, n_layers, "layers")
    bands = list(BANDS) if band == "both" else [band]
    if not set(bands) <= set(BANDS):
        raise InvalidValue(f"band is {band!r}; expected 'low', 'high' or 'both'.")
    if not (math.isfinite(a) and a > -1):
        raise InvalidValue(
            f"a is {a!r}; expected a gain 1 + a that is finite and above 0, for instance a=0.3."
        )
    if switch is not None and set(switch) != set(bands):
        raise InvalidValue(
            f"switch is {dict(switch)!r}; expected a timestep for exactly the bands {bands}."
        )
    if not noise >= 0:
        raise InvalidValue(f"noise is {noise!r}; expected a fraction of the signal, at least 0.")
    scheduler = plain_scheduler()
    abars = scheduler.alphas_cumprod.double()
    transformer = build.blank(n_layers, sample_size, patch_size, in_channels)
    signal, faint = build.directions(transformer, 2)
    write = build.both(signal)
    build.embed(transformer, write)
    build.embed(transformer, build.both(faint), FAINT)
    time = torch.arange(build.TIMESTEPS, dtype=torch.float64)
    gains = {
        name: torch.full_like(time, a)
        if switch is None
        else a * torch.sigmoid((switch[name] - time) / switch_width)
        for name in bands
    }
    for layer in layers:
        build.act(
            transformer, layer, {BANDS[name]: gain for name, gain in gains.items()}, signal, write
        )
    if noise:
        build.add_noise(transformer, write, noise, torch.Generator().manual_seed(seed))
    build.unembed(transformer, build.both(faint) / FAINT, (1 - abars).sqrt())
    build.finish(transformer, dtype)
    answer = {
        "kind": "planted",
        "layers": list(layers),
        "onset": min(layers),
        "band": band,
        "a": a,
        "gain": float(planted_gain(a, layers)),
        "switch": None if switch is None else dict(switch),
        "gap_timesteps": switch["low"] - switch["high"]
        if switch is not None and band == "both"
        else None,
        "gap_of_output": 0.0,
        "noise": noise,
        "deviation": gain_error(transformer, gains, layers),
    }
    when = (
        ""
        if switch is None
        else ", switched on at timestep " + " and ".join(f"{switch[b]} ({b})" for b in bands)
    )
    what = f"The {' and '.join(bands)} band of the stream times {1 + a:g} in {_named(layers)}"
    description = f"{what}{when}; noise {noise:g}."
    return GroundTruth(transformer, scheduler, answer, description)


def random_planted(
    seed: int, *, gated: bool = False, noise: float = 0.02, dtype: torch.dtype = torch.float32
) -> GroundTruth:
    """A `planted` model drawn at random: depth (12 to 28), a run of 1 to 5 layers anywhere, sign,
    band and size of a.

    Args:
        seed: the same one gives the same model.
        gated: whether the gain also comes on at a timestep, from 200 to 800.
        noise: as for `planted`.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, as `planted` gives it.

    >>> random_planted(3).answer["layers"] == random_planted(3).answer["layers"]
    True
    """
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    n_layers, count = pick(12, 28), pick(1, 5)
    first = pick(0, n_layers - count)
    size = 0.2 + 0.3 * float(torch.rand((), generator=draw))
    a = size if pick(0, 1) else -size
    band = list(BANDS)[pick(0, 1)]
    switch = {band: pick(200, 800)} if gated else None
    layers = range(first, first + count)
    return planted(layers, a, n_layers, band, switch=switch, noise=noise, seed=seed, dtype=dtype)


def _wave(draw: torch.Generator) -> torch.Tensor:
    """A random smooth function of t, [timestep], of mean square 1 and one sign or two."""
    level, size, phase = torch.rand(3, generator=draw, dtype=torch.float64)
    time = torch.arange(build.TIMESTEPS, dtype=torch.float64) / build.TIMESTEPS
    wave = 2 * level - 1 + size * torch.cos(math.pi * (time + 2 * phase))
    return wave / wave.square().mean().sqrt()


def plain_scheduler() -> Any:
    # DiT's own schedule of betas; Gaussian data has no bounds
    return DDIMScheduler(build.TIMESTEPS, clip_sample=False)


def check_layers(
    layers: Sequence[int], n_layers: int, what: str, taken: Sequence[int] = ()
) -> None:
    """Raise InvalidValue unless these are different layers of the model that are not taken.

    Args:
        layers: to check.
        n_layers: of the model.
        what: the argument's name.
        taken: layers that are used otherwise.
    """
    free = set(range(n_layers)) - set(taken)
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= free:
        also = f" that are not among {list(taken)}" if taken else ""
        raise InvalidValue(
            f"{what} is {list(layers)}; expected different layers from 0 to {n_layers - 1}{also}."
        )


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} " + ", ".join(str(layer) for layer in layers)
