"""The exact answers E1 to E4 and E6 of docs/checks.md as functions of numbers.

Gaussian data makes everything linear: a mode of variance `lam` is denoised by one coefficient, so
agreements, ratios and gaps have formulas. They hold for an ideal sampler; `ddim_agreement` is the
same answer for a sampler of finitely many steps, so that a check need not allow for the
discretisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue

Array = NDArray[np.float64]
MOST_WIDTH = 1e9
"""Sides and widths of mixtures are no larger: their squares have to be numbers."""


def _spectrum(lam: ArrayLike) -> Array:
    values = arguments.array("lam", lam)
    if not (np.isfinite(values) & (values > 0)).all():
        raise InvalidValue(
            f"lam is {arguments.shown(lam)}; expected variances of the data, finite and above 0, "
            "for instance 4.0."
        )
    return values


def _alphas(abar: ArrayLike) -> Array:
    values = arguments.array("abar", abar)
    if not ((values >= 0) & (values <= 1)).all():
        raise InvalidValue(
            f"abar is {arguments.shown(abar)}; expected cumulative alphas in [0, 1], as "
            "scheduler.alphas_cumprod."
        )
    return values


def _modes(lam: ArrayLike) -> Array:
    """Variances of one or several modes, [mode]."""
    found = np.atleast_1d(_spectrum(lam))
    if found.ndim != 1 or not found.size:
        raise arguments.refusal("lam", lam, "variances of one or more modes, [mode]")
    return found


def _schedule(abars: ArrayLike) -> Array:
    """Cumulative alphas of one or several steps, [step], above 0."""
    found = _alphas(abars)
    if found.ndim != 1 or not found.size or not (found > 0).all():
        raise arguments.refusal("abars", abars, "cumulative alphas above 0, [step]")
    return found


def alphas_of(x: Tensor, abar: Tensor) -> Tensor:
    """The cumulative alphas of latents [b, c, h, w]: [b], or [1] for all.

    Args:
        x: the latents.
        abar: what was given for them.
    """
    found = arguments.tensor("abar", abar, [None])
    if len(found) not in (1, len(x)) or not ((found >= 0) & (found <= 1)).all():
        raise InvalidValue(
            f"abar is {arguments.shown(abar)}; expected numbers from 0 to 1, one for each of "
            f"{len(x)} latents."
        )
    return found


def gaussian_agreement(lam: ArrayLike, abar: ArrayLike, pooled: bool = False) -> Array:
    """The correlation of finished twins of Gaussian data released at `abar` (E1 in docs/checks.md),
    for an exact denoiser and an exact stochastic sampler: r = lam abar / (1 - abar + lam abar).

    Args:
        lam: variances of the data's modes, [mode].
        abar: the cumulative alpha at the release, of any shape.
        pooled: whether the modes are one band: sum lam r / sum lam.

    Returns:
        r, of abar's shape with a last axis for the modes, or without it when pooled.

    Raises:
        ValueError: for variances that are not above 0, or abar outside [0, 1].

    >>> float(gaussian_agreement([4.0], 0.2)[0])
    0.5
    """
    spectrum, alpha = _modes(lam), _alphas(abar)[..., None]
    arguments.flag("pooled", pooled)
    agreement = spectrum * alpha / (1 - alpha + spectrum * alpha)
    return (spectrum * agreement).sum(-1) / spectrum.sum() if pooled else agreement


def commitment_log_snr(lam: ArrayLike) -> Array:
    """The log SNR at which a mode's agreement is 1/2 (E1 in docs/checks.md): -log lam, where abar =
    1 / (1 + lam).

    Args:
        lam: variances of the data's modes.

    Returns:
        log SNR, of lam's shape.

    Raises:
        ValueError: for variances that are not above 0.

    >>> float(commitment_log_snr(1.0)) == 0
    True
    """
    return -np.log(_spectrum(lam))


def commitment_timestep(lam: float, abars: ArrayLike) -> float:
    """The timestep, with a fraction, at which a mode's agreement is 1/2 (E1 in docs/checks.md); log
    SNR is interpolated.

    Args:
        lam: the variance of the data's mode.
        abars: the schedule, [timestep].

    Returns:
        The timestep where abar = 1 / (1 + lam).

    Raises:
        ValueError: if that lies outside the schedule.

    >>> commitment_timestep(1.0, [0.9, 0.5, 0.1])
    1.0
    """
    lam = arguments.number("lam", lam, above=0)
    alpha = _schedule(abars)
    if not (alpha < 1).all():
        raise InvalidValue("abars has a 1; expected a schedule in which every step has noise.")
    snr, wanted = np.log(alpha) - np.log1p(-alpha), float(commitment_log_snr(lam))
    if not snr.min() <= wanted <= snr.max():
        raise InvalidValue(
            f"lam is {lam!r}; it commits at log SNR {wanted:.2f}, expected one in the schedule's "
            f"{snr.min():.2f} to {snr.max():.2f}."
        )
    return float(np.interp(-wanted, -snr, np.arange(len(snr))))


def ddim_agreement(lam: ArrayLike, abars: ArrayLike, release: int, eta: float = 1.0) -> Array:
    """`gaussian_agreement` for the DDIM sampler as it is run, in finitely many steps.

    With Gaussian data each step is x' = A x + sigma z, so the finished twins, one trajectory before
    step `release` and with noise of their own from it on, share the part (prod A)^2 Var(x_release)
    of their variance.

    Args:
        lam: variances of the data's modes, [mode].
        abars: at the visited timesteps, noisiest first, [step], above 0 and below 1; behind them
            comes abar = 1.
        release: the first step with noise of their own, 0 to the number of steps.
        eta: how stochastic the sampler is, 0 to 1.

    Returns:
        The correlation of each mode, [mode].

    Raises:
        ValueError: for a release outside the run.

    >>> float(ddim_agreement([4.0], [0.1, 0.5, 0.9], release=3)[0])
    1.0
    """
    spectrum, alpha = _modes(lam), _schedule(abars)
    if not (alpha < 1).all() or (np.diff(alpha) < 0).any():
        raise InvalidValue(
            f"abars is {arguments.shown(abars)}; expected alphas that rise, noisiest first, below "
            "1."
        )
    release = arguments.whole("release", release, 0, len(alpha), "the last is never released")
    eta = arguments.number("eta", eta, 0, 1)
    alpha = np.append(alpha, 1.0)
    return sampler_agreement(spectrum, np.sqrt(alpha), np.sqrt(1 - alpha), eta)[1][release]


def sampler_agreement(
    lam: ArrayLike, signal: ArrayLike, noise: ArrayLike, eta: float = 1.0
) -> tuple[Array, Array]:
    """What an exact denoiser of Gaussian data makes of a DDIM-like sampler, in finitely many steps:
    the variance of what it samples, and the agreement of twins released at each step.

    x_t = signal x0 + noise eps; each step draws from q(x_s | x_t, x0) with a share eta of its noise
    anew (Song et al. 2021, arXiv 2010.02502, equations 12 and 16), which is DDIM where signal² +
    noise² = 1, and Euler's step on a flow where signal + noise = 1 and eta = 0.

    Args:
        lam: variances of the data's modes, [mode].
        signal: at each step and at the end, [step + 1].
        noise: the same of the noise, above 0 but at the end.
        eta: how stochastic the sampler is, 0 to 1.

    Returns:
        The variance [mode] of the finished samples, and the agreement [step + 1, mode]; behind the
        last step it is 1.

    Raises:
        ValueError: for variances that are not above 0.

    >>> variance, agreement = sampler_agreement([4.0], [0.1, 0.8, 1.0], [0.995, 0.6, 0.0])
    >>> agreement.shape, float(agreement[-1, 0])
    ((3, 1), 1.0)
    """
    spectrum, eta = _modes(lam), arguments.number("eta", eta, 0, 1)
    a, n = arguments.array("signal", signal), arguments.array("noise", noise)
    if a.ndim != 1 or len(a) < 2 or not (np.isfinite(a) & (a >= 0)).all() or not a[1:].all():
        raise arguments.refusal("signal", signal, "numbers above 0 but at the start, [step + 1]")
    if n.shape != a.shape or not np.isfinite(n).all() or not (n[:-1] > 0).all() or n[-1] < 0:
        raise arguments.refusal(
            "noise", noise, f"{len(a)} numbers like the signal's, above 0 but at the end"
        )
    a, n = a[:, None], n[:, None]
    x0 = spectrum * a[:-1] / (spectrum * a[:-1] ** 2 + n[:-1] ** 2)
    return linear_chain(x0, (1 - a[:-1] * x0) / n[:-1], a, n, eta)


def linear_chain(
    x0: Array, eps: Array, signal: Array, noise: Array, eta: float
) -> tuple[Array, Array]:
    """What `sampler_agreement` says, of any denoiser that is linear in each mode: x_t is a Gaussian
    chain then, x' = decay x + fresh noise.

    Args:
        x0: what is predicted of x_t for the clean image, as a factor, [step, mode].
        eps: the same for the noise, [step, mode].
        signal: at each step and at the end, [step + 1, 1].
        noise: the same of the noise, [step + 1, 1].
        eta: how stochastic the sampler is, 0 to 1.

    Returns:
        The variance [mode] of the finished samples, and the agreement [step + 1, mode].
    """
    here, there = slice(None, -1), slice(1, None)
    n, kept_noise = noise[here], signal[here] / signal[there] * noise[there]
    fresh = np.maximum((eta * noise[there] / n) ** 2 * (n**2 - kept_noise**2), 0.0)
    decay = signal[there] * x0 + np.sqrt(np.maximum(noise[there] ** 2 - fresh, 0.0)) * eps
    variance = [np.ones_like(x0[0])]  # of a start from pure noise
    for factor, added in zip(decay, fresh, strict=True):
        variance.append(factor**2 * variance[-1] + added)
    # what the finished sample keeps of x_t
    kept = np.cumprod([np.ones_like(x0[0]), *decay[::-1]], 0)[::-1]
    return variance[-1], kept**2 * np.array(variance) / variance[-1]


def deterministic_ratio(lam: ArrayLike, abar: ArrayLike) -> Array:
    """How far apart two runs of a deterministic sampler are on Gaussian data, as a share of their
    finished distance (E2 in docs/checks.md): |d(t)| / |d(0)| = sqrt((1 + (lam - 1) abar) / lam).

    Args:
        lam: variances of the data's modes.
        abar: the cumulative alpha at t; broadcast with lam.

    Returns:
        The ratio.

    Raises:
        ValueError: for variances that are not above 0, or abar outside [0, 1].

    >>> float(deterministic_ratio(4.0, 1.0))
    1.0
    """
    spectrum, alpha = _spectrum(lam), _alphas(abar)
    try:
        spectrum, alpha = np.broadcast_arrays(spectrum, alpha)
    except ValueError:
        raise InvalidValue(
            f"lam has shape {list(spectrum.shape)} and abar {list(alpha.shape)}; expected shapes "
            "that broadcast."
        ) from None
    return np.sqrt((1 + (spectrum - 1) * alpha) / spectrum)


def mixture_agreement(m: float, sigma: float, abar: float) -> float:
    """The chance that twins released at `abar` end on the same side of a mixture N(+-m, sigma^2)
    (E3 in docs/checks.md).

    phi = 1/2 ∫ (G+^2 + G-^2) / (G+ + G-) dx with G± = N(±m sqrt(abar), 1 - abar + sigma^2 abar).
    The trapezoid rule is exact to rounding for a smooth integrand that has decayed at both ends.

    Args:
        m: where the two sides are, +m and -m.
        sigma: the width of a side.
        abar: the cumulative alpha at the release.

    Returns:
        phi, 1/2 to 1.

    Raises:
        ValueError: for numbers that are not finite, or abar outside [0, 1].

    >>> round(mixture_agreement(m=1.0, sigma=1.0, abar=1.0), 4)
    0.7752
    """
    m, sigma = arguments.number("m", m), arguments.number("sigma", sigma, 0, MOST_WIDTH)
    abar = arguments.number("abar", abar, 0, 1)
    width = np.sqrt(1 - abar + sigma**2 * abar)
    if width == 0:
        return 1.0 if m else 0.5
    centre = abs(m) * np.sqrt(abar) / width  # in units of the width
    if centre > 100:
        return 1.0  # sides that far apart don't overlap
    step = 0.01
    x = np.arange(-centre - 12, centre + 12, step)
    side = 1 / (1 + np.exp(-2 * centre * x))  # G+ / (G+ + G-)
    plus = np.exp(-((x - centre) ** 2) / 2) / np.sqrt(2 * np.pi)
    minus = np.exp(-((x + centre) ** 2) / 2) / np.sqrt(2 * np.pi)
    return float((plus * side + minus * (1 - side)).sum() * step / 2)


def planted_gain(a: ArrayLike, layers: int | Sequence[int], g: float = 0.0) -> Array:
    """The gain on the twins' difference through planted layers that are coupled (E4 in
    docs/checks.md): (1 + rho a)^n, rho = (1 - g) / (1 + g).

    Args:
        a: each layer's gain less 1; an array, say over timesteps, is possible.
        layers: which layers, or how many.
        g: strength of the coupling, 0 is none.

    Returns:
        The product, of a's shape.

    Raises:
        ValueError: for a negative g.

    >>> [round(float(planted_gain(0.3, 5, g)), 5) for g in (0, 0.5, 1)]
    [3.71293, 1.61051, 1.0]
    """
    g, gain = arguments.number("g", g, 0), arguments.array("a", a)
    if arguments.is_whole(layers):
        count = arguments.whole("layers", layers, 0)
    else:
        found = arguments.wholes("layers", layers, 0, arguments.MANY, fewest=0)
        count = len(arguments.unlike("layers", found))
    return (1 + (1 - g) / (1 + g) * gain) ** count


def token_mean(x: Tensor, patch_size: int = 1) -> Tensor:
    """P_low: every patch replaced by the mean over all patches, place by place.

    Args:
        x: latents [b, c, h, w].
        patch_size: rows and columns of a patch.

    Returns:
        The low band, of x's shape.

    Raises:
        ValueError: for patches that do not fill the latents.

    >>> import torch; token_mean(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    b, c, h, w = arguments.tensor("x", x, [None] * 4).shape
    patch_size = arguments.whole("patch_size", patch_size, 1)
    if h % patch_size or w % patch_size:
        raise InvalidValue(
            f"patch_size is {patch_size}; expected one whose patches fill latents of {h}x{w}."
        )
    tiles = x.view(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return tiles.mean((2, 4), keepdim=True).expand_as(tiles).reshape(x.shape)


def gaussian_eps(
    x: Tensor, abar: Tensor, lam_low: float, lam_high: float, patch_size: int = 1
) -> Tensor:
    """The exact noise prediction for Gaussian data of two bands (E6 in docs/checks.md): c_low P_low
    x + c_high P_high x, c = sqrt(1 - abar) / (lam abar + 1 - abar).

    Args:
        x: noised latents [b, c, h, w].
        abar: the cumulative alpha of each, [b].
        lam_low: variance of the low band, `token_mean`.
        lam_high: variance of the rest.
        patch_size: rows and columns of a patch.

    Returns:
        The noise, [b, c, h, w].

    Raises:
        ValueError: for variances that are not above 0.

    >>> import torch; noise = torch.ones(1, 1, 2, 2)
    >>> gaussian_eps(noise, torch.tensor([0.0]), 4.0, 0.25)[0, 0, 0].tolist()
    [1.0, 1.0]
    """
    lam_low = arguments.number("lam_low", lam_low, above=0)
    lam_high = arguments.number("lam_high", lam_high, above=0)
    low = token_mean(x, patch_size)
    alpha = alphas_of(x, abar).view(-1, 1, 1, 1)
    white = (1 - alpha).sqrt()
    return white / (lam_low * alpha + 1 - alpha) * low + white / (lam_high * alpha + 1 - alpha) * (
        x - low
    )
