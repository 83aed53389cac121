"""Is the gap the data's or the model's? The gap that an exact denoiser of the data's spectrum would
have, in the same sampler and the same steps.

Whoever predicts Gaussian data of the variances lambda_k exactly decides mode k where E1 says
(docs/checks.md), and in finitely many steps where `dit_lens.groundtruth.sampler_agreement` says. So
the data's second moments make a gap by themselves, whatever the model. Their variances are taken
mode by mode, after each label's mean, from the model's own finished samples, or from images that
are given. The exact curves go through the same fit at the same releases as the clones', on the same
resampled pairs, and are subtracted. The spectrum does not explain what is left: it is the model's,
or comes from what the data have beyond their spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..families.base import Family
from ..groundtruth.closed_forms import sampler_agreement
from ..measures import Array
from ..measures.agreement import contrasts
from ..measures.bands import Bands
from ..measures.bootstrap import draws, interval
from ..measures.commitment import commitment_draws, curve_commitment
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..model.noise_schedule import signal_and_noise
from ..sampling.run import Run
from ..twinning.twins import Twins
from .release import Curves

GRID = np.logspace(-8, 8, 1601)
"""Variances at which the exact answer is computed; between them it is interpolated."""
AT_ONCE = 32  # resamples


def data_gap(
    pair: Twins,
    clones: Curves,
    bands: Bands,
    outcome: str,
    latents: Tensor | None = None,
    groups: Sequence[int] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """The gap of an exact denoiser of the data's spectrum, and what the clones' is beyond it.

    Args:
        pair: twins with release=0, whose finished samples have the spectrum.
        clones: of these twins; or one pass, where there are no clones.
        bands: that the outcome is split into.
        outcome: the finished latents in these bands.
        latents: data [n, *latent_shape] in place of the model's samples; they count as known.
        groups: [n], the labels of these; None makes one group of all.
        resamples: of the pairs.
        seed: of the resamples.

    Returns:
        xr.Dataset: `data_commitment` [split] and `data_gap` [], in steps; `beyond_data` [], the
            clones' gap less that; each with its `_interval` [..., bound], 95 %.
    """
    releases, log_snr, pairs = list(clones.releases), clones.log_snr, pair.pairs
    counts = draws(pairs, resamples, seed)
    if latents is None:
        labels = pair.a.labels.tolist()
        a, b = (_energies(one.finished, labels, bands) for one in (pair.a, pair.b))
        energy = (a + b) / 2
    else:
        known = _energies(latents, [0] * len(latents) if groups is None else groups, bands)
        energy = np.broadcast_to(known.mean(0), (pairs, *known.shape[1:]))

    signal, noise = schedule(pair.run)
    levels = signal, noise, pair.run.settings.eta
    exact = spectrum_commitment(
        energy, counts, bands.index.numpy(), levels, releases, log_snr, sampled=latents is None
    )
    measured = commitment_draws(
        clones.statistics(outcome),
        releases,
        log_snr,
        squared=clones.estimator == "one_pass",
        resamples=resamples,
        seed=seed,
    )
    gap = exact[:, -1] - exact[:, 0]
    beyond = measured[:, -1] - measured[:, 0] - gap
    return xr.Dataset(
        {
            "data_commitment": ("split", exact[0]),
            "data_commitment_interval": (("split", "bound"), interval(exact, pairs)),
            "data_gap": ((), gap[0]),
            "data_gap_interval": ("bound", interval(gap, pairs)),
            "beyond_data": ((), beyond[0]),
            "beyond_data_interval": ("bound", interval(beyond, pairs)),
        }
    )


def spectrum_commitment(
    energy: Array,
    counts: Array,
    index: Array,
    levels: tuple[Array, Array, float],
    releases: Sequence[int],
    log_snr: Array,
    *,
    sampled: bool,
) -> Array:
    """Commitment steps of an exact denoiser of the spectrum, in every resample, [resample, band].

    Args:
        energy: of each mode, whose mean over pairs is its variance, [pair, field, mode].
        counts: [resample, pair].
        index: the band of each mode.
        levels: signal and noise [step + 1], and eta.
        releases: the steps that the curves are fitted at.
        log_snr: [step].
        sampled: whether the variances are of what the sampler makes of the data in its finite
            steps, and not of the data themselves.
    """
    variance, agreement = sampler_agreement(GRID, *levels)
    given, bands = variance if sampled else GRID, int(index.max()) + 1
    inside, logs = [np.flatnonzero(index == b) for b in range(bands)], np.log(GRID)

    def by_band(modes: Array) -> Array:
        """Sums over the fields and modes of each band, [resample, band]."""
        return np.stack([modes[:, :, of].sum((1, 2)) for of in inside], 1)

    taus = []
    for part in np.array_split(counts, -(-len(counts) // AT_ONCE)):
        modes = np.einsum("rp,pcm->rcm", part, energy) / energy.shape[0]
        lam = np.interp(np.log(np.maximum(modes, 1e-30)), np.log(given), logs)
        finished = np.interp(lam, logs, variance)
        whole = by_band(finished)
        curves = [by_band(finished * np.interp(lam, logs, agreement[r])) / whole for r in releases]
        taus.append(curve_commitment(np.stack(curves, -1), releases, log_snr))
    found = np.concatenate(taus)
    # variances from few samples scatter, and agreement is not linear in them; the resamples, whose
    # variances scatter as much again, show by how much that shifts the answer
    with np.errstate(invalid="ignore"):
        mean = np.nansum(found[1:], 0) / np.isfinite(found[1:]).sum(0)
    return np.asarray(found - (mean - found[0]))


def schedule(run: Run) -> tuple[Array, Array]:
    """How much signal and noise x_t has before each step of a run and at its end, [step + 1]."""
    signal, noise = (part.numpy() for part in signal_and_noise(run.scheduler, run.timesteps.cpu()))
    last = float(getattr(run.scheduler, "final_alpha_cumprod", 1.0))
    return np.append(signal, last**0.5), np.append(noise, (1 - last) ** 0.5)


def _energies(latents: Tensor, groups: Sequence[int], bands: Bands) -> Array:
    """Squared coefficients without each group's mean, whose mean is the variance, [n, field,
    mode].
    """
    rows = contrasts(latents.detach().double().cpu(), groups)
    found = bands.coefficients(rows).square()
    return found.reshape(len(latents), -1, found.shape[-1]).numpy()


def as_latents(model: HookedDiT, images: Tensor) -> Tensor:
    """Images [n, channel, height, width] in [0, 1] as the model's latents, through the VAE if there
    is one; what `decode` undoes.

    Args:
        model: the opened model.
        images: of the size that it makes.

    Raises:
        InvalidValue: for images of another size or range, or a VAE of another kind.
    """
    arguments.tensor("images", images, finite=True)
    least, most = float(images.min()), float(images.max())
    if len(images) < 2 or least < 0 or most > 1:
        raise InvalidValue(
            f"images are {len(images)}, from {least:.3g} to {most:.3g}; expected 2 or more, with "
            "values from 0 to 1."
        )
    x, vae = 2 * images.float() - 1, model.vae
    if vae is not None:
        if type(model.family).decode is not Family.decode:
            raise InvalidValue(
                f"The latents of {type(vae).__name__} can't be made from images here; expected a "
                "model without a VAE, or with diffusers' AutoencoderKL."
            )
        with torch.no_grad():
            coded = [_coded(vae.encode(one[None].to(vae.device, vae.dtype))) for one in x]
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        x = (torch.cat(coded).float().cpu() - shift) * vae.config.scaling_factor
    if x.shape[1:] != tuple(model.cfg.latent_shape):
        raise InvalidValue(
            f"images have shape {list(images.shape)}, latents {list(x.shape[1:])} each; the model "
            f"makes latents of {list(model.cfg.latent_shape)}."
        )
    return x


def _coded(answer: Any) -> Tensor:
    """The latents that a VAE's encoder answers with; of a distribution its mean."""
    found: Tensor = answer.latent_dist.mean if "latent_dist" in answer else answer.latent
    return found


def data_sentence(results: xr.Dataset) -> str:
    """How much of the gap the data's spectrum makes.

    Args:
        results: with what `data_gap` gave, and the attribute `spectrum_of`.
    """
    of = results.attrs["spectrum_of"]
    data = Estimate.of(results["data_gap"], results.data_gap_interval)
    beyond = Estimate.of(results.beyond_data, results.beyond_data_interval)
    whose = "the clones'" if results.sizes["release"] else "one pass's"
    who = f"An exact denoiser of the spectrum of {of}, in this sampler and these steps,"
    if not np.isfinite(data.value):
        return f"{who} would not commit within the releases in both bands."
    would = f"{who} would have a gap of {data:+.1f steps}"
    if not beyond.known:
        return f"{would}; {whose} can't be held against it."
    verdict = (
        ", which the spectrum does not explain: it is the model's, or comes from what the data "
        "have beyond their spectrum"
        if beyond.sign
        else ": no difference can be told, so the spectrum alone may make the gap"
    )
    return f"{would}; {whose} less that is {beyond:+.1f steps}{verdict}."
