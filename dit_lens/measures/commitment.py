"""Commitment: from the agreement of finished twins to the step at which each band is decided, with
an interval.

For Gaussian data of variance lambda the agreement is exactly logistic in log SNR, sigmoid(log SNR +
log lambda) (E1 in docs/checks.md), from 0 (nothing decided, given the label) to 1 (everything). So
commitment is where a logistic of free place and slope passes 1/2. It is fitted with the weights of
a binomial, whose equations are linear in the agreements: these may stray outside [0, 1], and one
Newton iteration serves all resamples at once. A pooled band mixes modes that commit at different
times, so a second pass weights the releases near the crossing, where any smooth curve is logistic.

The interval is a symmetric bootstrap-t: estimate +- standard error * quantile of the resamples' |t|
(Hall 1988, "On symmetric bootstrap confidence intervals", J. R. Statist. Soc. B 50). With few modes
in a band the agreement is skewed, and the equal-tailed bootstrap-t missed too often in one tail
(`tests/test_commitment.py` prints the coverage). The standard error of each resample comes from its
influence function, without refitting. Where the agreement jumps between two neighbouring releases
its place there is not known: it is kept between them, whatever noise elsewhere does to the fit, and
the interval reaches to both. It is made in log SNR and mapped to steps; the gap's combines the two
bands' (Zou & Donner 2008, "Construction of confidence limits about effect measures", Stat. Med.
27), which stays right where a step is worth little log SNR at one band and much at the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .. import arguments
from ..errors import InvalidValue
from .agreement import Agreement, curve
from .arrays import Array
from .bootstrap import FEWEST_PAIRS, checked_level, draws


def fit_commitment(
    stats: Agreement,
    releases: ArrayLike,
    log_snr: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    what: str = "band",
    squared: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """The commitment of every band, the gap between the last band and the first, and bootstrap-t
    intervals of both.

    Args:
        stats: [release, pair, band]; resampled by pair, the same at every release.
        releases: [release], the steps at which the twins were released.
        log_snr: [step] of the whole run, rising.
        names: of the bands; by default their numbers.
        what: a band is called, in the reasons.
        squared: the agreement is the squared correlation (see `curve`).
        resamples: of the pairs.
        level: of the intervals.
        seed: of the resamples.

    Returns:
        xr.Dataset: `curve` [release, band]; `slope` [band], per unit of log SNR; `commitment`
            [band, quantity]; `gap` [quantity], the last band's commitment less the first's,
            positive when the first commits first; `commitment_interval` and `gap_interval` [...,
            bound]; `unresolved` [band, bound], how many steps before and after its place a band may
            commit because it rises between two neighbouring releases, else 0; `reason` [band], why
            a commitment is NaN or an interval is cut off at the first or last release, else "". The
            quantities are "step" (0 the noisiest), "time" (step / steps) and "log_snr".

    Raises:
        InvalidValue: for fewer than 8 pairs, log_snr that does not rise, releases outside the run,
            or wrong shapes.

    >>> rng = np.random.default_rng(0); x = np.arange(-4, 5.0); p = 1 / (1 + np.exp(-x))
    >>> one, noise = np.ones((9, 64, 1)), rng.gamma(9, 1 / 9, (9, 64, 1))
    >>> found = fit_commitment(Agreement(p[:, None, None] * noise, one, one), range(9), x)
    >>> round(float(found.commitment.sel(quantity="step")[0]))
    4
    """
    at, snr = _checked(stats, releases, log_snr)
    level, squared = checked_level(level), arguments.flag("squared", squared)
    pairs, n_bands = stats.xy.shape[1:]
    labels, what = [str(b) for b in range(n_bands)], arguments.text("what", what)
    if names is not None:
        labels = [arguments.text("names", n) for n in arguments.listed("names", names, "names")]
    if len(labels) != n_bands:
        raise InvalidValue(f"names are {labels}; expected one for each of the {n_bands} bands.")
    order = np.argsort(at)
    stats, x = Agreement(*(part[order] for part in stats)), snr[at[order]]

    # fit the sample and every resample, of the rows that hold anything (see `agreement`)
    kept = stats.independent()
    rows = kept.xy.shape[1]
    counts = draws(pairs, resamples, seed, rows)
    centre, slope, influence = _fits(kept, x, counts, squared)
    observed = curve(stats, squared)
    carriers = ((kept.xx + kept.yy) > 0).any(0).sum(0)  # [band]: rows in which it varies at all
    reason = [
        _too_few(int(carriers[b]), rows, f"{what} {labels[b]}")
        or _why_not(observed[:, b], centre[0, b], slope[0, b], x, f"{what} {labels[b]}")
        for b in range(n_bands)
    ]
    known = np.array([not why for why in reason])

    # intervals of the bands, in log SNR; steps follow monotonically
    def convert(log_snrs: Array) -> Array:  # [...] -> [..., quantity]
        step = np.interp(log_snrs, snr, np.arange(len(snr)))
        return np.stack([step, step / len(snr), log_snrs], -1)

    error = np.sqrt(np.einsum("rbp,rp->rb", influence**2, counts))
    # pairs exactly alike: 0 / 0 is no spread
    t = np.abs(centre[1:] - centre[0]) / np.maximum(error[1:], 1e-9)
    width = np.quantile(np.nan_to_num(t), level, axis=0) * error[0]
    # [band, bound]
    bound = np.stack([centre[0] - width, centre[0] + width], -1)
    around = _around(centre[0], slope[0], x, np.nan_to_num(observed.T))
    bound = np.stack([np.minimum(bound, around)[:, 0], np.maximum(bound, around)[:, 1]], -1)
    for b in np.flatnonzero(known).tolist():
        cut = [
            e for e, out in (("first", bound[b, 0] < x[0]), ("last", bound[b, 1] > x[-1])) if out
        ]
        if cut:
            reason[b] = (
                f"The interval of {what} {labels[b]} is cut off at the {' and '.join(cut)} release."
            )
    interval = convert(np.clip(bound, x[0], x[-1])).swapaxes(-1, -2)
    value = convert(centre[0])  # [band, quantity]
    unresolved = np.abs(convert(around)[..., 0] - value[:, None, 0])

    # interval of the gap
    down, up = (np.abs(convert(bound[:, side]) - value) for side in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        # the same pairs move both bands
        shared = np.nan_to_num(np.corrcoef(influence[0, 0], influence[0, -1])[0, 1])
    gap = value[-1] - value[0]
    ends = gap - _combine(down[-1], up[0], shared), gap + _combine(up[-1], down[0], shared)
    gap_interval = np.stack(ends, -1)  # [quantity, bound]
    both = n_bands > 1 and known[[0, -1]].all()

    return xr.Dataset(
        {
            "curve": (("release", "band"), observed),
            "slope": ("band", np.where(known, slope[0], np.nan)),
            "commitment": (("band", "quantity"), np.where(known[:, None], value, np.nan)),
            "commitment_interval": (
                ("band", "quantity", "bound"),
                np.where(known[:, None, None], interval, np.nan),
            ),
            "unresolved": (("band", "bound"), np.where(known[:, None], unresolved, np.nan)),
            "gap": ("quantity", np.where(both, gap, np.nan)),
            "gap_interval": (("quantity", "bound"), np.where(both, gap_interval, np.nan)),
            "reason": ("band", reason),
        },
        coords={
            "release": at[order],
            "release_log_snr": ("release", x),
            "band": labels,
            "quantity": ["step", "time", "log_snr"],
            "bound": ["low", "high"],
        },
        attrs={
            "pairs": pairs,
            "rows": rows,
            "resamples": resamples,
            "level": level,
            "seed": seed,
        },
    )


def commitment_draws(
    stats: Agreement,
    releases: ArrayLike,
    log_snr: ArrayLike,
    *,
    squared: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Array:
    """Commitment steps of the sample itself and of each resample of its pairs.

    For what is a function of several commitments, such as how far a gap has moved: with the same
    seed the same pairs are drawn, so draws of two runs of the same pairs can be subtracted.

    Args:
        stats: [release, pair, band].
        releases: [release], the steps at which the twins were released.
        log_snr: [step] of the whole run, rising.
        squared: the agreement is the squared correlation (see `curve`).
        resamples: of the pairs.
        seed: of the resamples.

    Returns:
        Array: [1 + resample, band], in steps, the sample first. The sample's is NaN outside the
            releases, a resample's only where its curve does not rise; beyond the run it is the
            run's end.

    Raises:
        InvalidValue: as `fit_commitment`.
    """
    at, snr = _checked(stats, releases, log_snr)
    squared = arguments.flag("squared", squared)
    order = np.argsort(at)
    stats, x, pairs = Agreement(*(part[order] for part in stats)), snr[at[order]], stats.xy.shape[1]
    centre, slope, _ = _fits(stats, x, draws(pairs, resamples, seed), squared)
    fine = slope > 0
    fine[0] &= (centre[0] >= x[0]) & (centre[0] <= x[-1])
    return np.where(fine, np.interp(centre, snr, np.arange(len(snr))), np.nan)


def curve_commitment(curves: ArrayLike, releases: ArrayLike, log_snr: ArrayLike) -> Array:
    """Commitment steps of agreement curves that are known, by the fit that is made of measured
    ones: what `commitment_draws` would give if these were the curves.

    Args:
        curves: [..., release], 0 to 1.
        releases: [release], steps in increasing order.
        log_snr: [step] of the whole run, rising.

    Returns:
        Array: [...], in steps; NaN where the fit does not rise, or crosses outside the releases.

    >>> x = np.arange(-4, 5.0)
    >>> round(float(curve_commitment(1 / (1 + np.exp(-x)), range(9), x)), 6)
    4.0
    """
    snr = arguments.array("log_snr", log_snr)
    x = snr[np.asarray(releases, dtype=np.int64)]
    centre, slope, _ = _fit_logistic(x, np.asarray(curves, dtype=np.float64))
    fine = (slope > 0) & (centre >= x[0]) & (centre <= x[-1])
    return np.where(fine, np.interp(centre, snr, np.arange(len(snr))), np.nan)


def _fits(stats: Agreement, x: Array, counts: Array, squared: bool) -> tuple[Array, Array, Array]:
    """Place and slope [resample, band] of every resample's logistic, and each pair's influence on
    the place [.., pair].
    """
    pairs, n_bands = stats.xy.shape[1:]
    centre, slope, influence = (
        np.empty((len(counts), n_bands, *rest)) for rest in ((), (), (pairs,))
    )
    for b in range(n_bands):
        sums = [counts @ part[..., b].T for part in stats]  # [resample, release]
        with np.errstate(invalid="ignore", divide="ignore"):
            root = np.sqrt(sums[1] * sums[2])
            r = sums[0] / root
            gain = 2 * r if squared else np.ones_like(r)
            target = np.nan_to_num(r**2 if squared else r)
            centre[:, b], slope[:, b], g = _fit_logistic(x, target)
            weights = [
                gain * g / root,
                -gain * g * r / (2 * sums[1]),
                -gain * g * r / (2 * sums[2]),
            ]
            influence[:, b] = sum(w @ part[..., b] for w, part in zip(weights, stats, strict=True))
    return centre, slope, influence


def _fit_logistic(x: Array, r: Array, iterations: int = 12) -> tuple[Array, Array, Array]:
    """Logistic fits of r [..., release] in x [release]: crossing of 1/2, slope, d crossing / d r
    [..., release]. Where r jumps through 1/2 the crossing is kept between the two releases.

    Solves sum_j w_j (r_j - p_j)(1, x_j) = 0 by Newton; w is 1, then 4 p (1 - p) of the first fit.
    """
    mean, scale = x.mean(), np.ptp(x) / 2
    z = (x - mean) / scale  # in [-1, 1]
    steepest = 4 * scale / np.diff(x).min()  # a jump between two releases has no slope of its own
    b0, b1, w = 4 * (r.mean(-1) - 0.5), np.full(r.shape[:-1], min(scale, steepest)), np.ones_like(r)
    for stage in range(2):
        for _ in range(iterations):
            p = 1 / (1 + np.exp(-np.clip(b0[..., None] + b1[..., None] * z, -30, 30)))
            error, v = w * (r - p), w * p * (1 - p)
            h00, h01, h11 = v.sum(-1) + 1e-9, (v * z).sum(-1), (v * z * z).sum(-1) + 1e-9
            e0, e1, det = error.sum(-1), (error * z).sum(-1), h00 * h11 - h01**2
            d0, d1 = (h11 * e0 - h01 * e1) / det, (h00 * e1 - h01 * e0) / det
            # at its bound the slope stays, and the place is fitted by itself
            held = (np.abs(b1) >= steepest) & (b1 * d1 > 0)
            d0, d1 = np.where(held, e0 / h00, d0), np.where(held, 0, d1)
            short = np.minimum(1, 2 / np.maximum(np.abs(d0) + np.abs(d1), 1e-12))
            b0, b1 = (
                np.clip(b0 + short * d0, -3 * steepest, 3 * steepest),
                np.clip(b1 + short * d1, -steepest, steepest),
            )
        if stage == 0:
            w = 4 * p * (1 - p)
    b1 = np.where(np.abs(b1) < 1e-6, 1e-6, b1)
    place = -b0 / b1
    move0 = w * (h11[..., None] - h01[..., None] * z) / det[..., None]
    move1 = w * (h00[..., None] * z - h01[..., None]) / det[..., None]
    free = -(move0 + place[..., None] * move1) / b1[..., None] * scale
    alone = -w / h00[..., None] / b1[..., None] * scale
    influence = np.where(held[..., None], alone, free)
    around = _around(mean + scale * place, b1 / scale, x, r)
    return np.clip(mean + scale * place, *np.moveaxis(around, -1, 0)), b1 / scale, influence


def _combine(one: Array, other: Array, correlation: float) -> Array:
    """How far a difference's bound reaches, from how far its terms' bounds do."""
    return np.sqrt(np.maximum(one**2 + other**2 - 2 * correlation * one * other, 0))


def _around(centre: Array, slope: Array, x: Array, r: Array) -> Array:
    """The releases between which each curve r [..., release] jumps through 1/2: it does most of its
    rise (12 to 88 %) there, by its slope or, if it passes 1/2 nowhere else, as seen. Without such a
    jump, its place twice. [..., bound], in log SNR.
    """
    low, high, before, after = x[:-1], x[1:], r[..., :-1], r[..., 1:]
    steep = slope[..., None] * (high - low) >= 4 - 1e-6
    once = (np.diff(r >= 0.5).sum(-1) == 1)[..., None]
    jumps = (before < 0.5) & (after >= 0.5) & (steep | once & (before <= 0.12) & (after >= 0.88))
    away = np.abs(centre[..., None] - np.clip(centre[..., None], low, high))
    nearest = np.where(jumps, away, np.inf).argmin(-1)
    between = np.stack([low[nearest], high[nearest]], -1)
    return np.where(jumps.any(-1)[..., None], between, centre[..., None])


def _too_few(carriers: int, rows: int, name: str) -> str:
    if carriers >= min(FEWEST_PAIRS, rows) or not carriers:
        return ""
    return (
        f"{name[0].upper()}{name[1:]} varies in only {carriers} of {rows} independent pairs, and "
        f"{FEWEST_PAIRS} are needed: take more pairs."
    )


def _why_not(r: Array, centre: float, slope: float, x: Array, name: str) -> str:
    if not np.isfinite(r).all():
        return (
            f"{name[0].upper()}{name[1:]} does not vary once the mean is removed, so its "
            "agreement is undefined."
        )
    if r.min() < 0.5 < r.max() and slope > 0 and x[0] <= centre <= x[-1]:
        return ""
    goes = f"The agreement of {name} goes from {r[0]:.2f} at the first release to {r[-1]:.2f} at"
    if r[0] < 0.5 < r[-1]:
        if slope <= 0:
            return f"{goes} the last, and no rising logistic fits it: take more pairs."
        side = "before the first, so release earlier"
        if centre > x[-1]:
            side = "after the last, so release later"
        return f"{goes} the last, and a logistic through it passes 1/2 {side}."
    return (
        f"{goes} the last and does not rise through 1/2 between them; release "
        f"{'earlier' if r.mean() > 0.5 else 'later'}."
    )


def _checked(
    stats: Agreement, steps: ArrayLike, log_snrs: ArrayLike
) -> tuple[NDArray[np.int64], Array]:
    """Releases and log SNR as arrays; raises InvalidValue where they don't fit the statistics."""
    arguments.instance("stats", stats, Agreement, "an Agreement [release, pair, band]")
    given, log_snr = arguments.array("releases", steps), arguments.array("log_snr", log_snrs)
    releases = np.asarray([], dtype=np.int64)
    if np.isfinite(given).all() and (given == np.round(given)).all():
        releases = given.astype(np.int64)
    shapes = {np.shape(part) for part in stats}
    if len(shapes) != 1 or np.ndim(stats.xy) != 3:
        raise InvalidValue(
            f"The statistics have shapes {sorted(shapes)}; expected one shape [release, pair, "
            "band]."
        )
    if log_snr.ndim != 1 or len(log_snr) < 2 or not np.isfinite(log_snr).all():
        raise InvalidValue(
            f"log_snr has shape {log_snr.shape}; expected finite values [step], one for each step "
            "of the run."
        )
    if (np.diff(log_snr) <= 0).any():
        s = np.flatnonzero(np.diff(log_snr) <= 0)[0]
        raise InvalidValue(
            f"log_snr does not rise from step {s} ({log_snr[s]:.4g}) to {s + 1} "
            f"({log_snr[s + 1]:.4g}); "
            "expected the steps in the order they are run, the noisiest first."
        )
    if releases.shape != stats.xy.shape[:1]:
        raise InvalidValue(
            f"releases is {arguments.shown(given)}; expected {stats.xy.shape[0]} step numbers, one "
            "for each release."
        )
    outside = [int(s) for s in releases if not 0 <= s < len(log_snr)]
    if outside or len(set(releases.tolist())) < max(3, len(releases)):
        raise InvalidValue(
            f"releases is {releases.tolist()}; expected 3 or more different steps from 0 to "
            f"{len(log_snr) - 1}."
        )
    return releases, log_snr
