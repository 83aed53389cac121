"""Bootstrap over pairs: counts to resample with, and intervals of what comes out.

Every statistic here is computed for the sample and for its resamples in one array, with the sample
as row 0 of the first axis. Percentiles of the resamples are no intervals for few pairs: they are
too narrow, by sqrt((n - 1) / n) and for want of Student's t (with 16 pairs a nominal 95 % held the
truth in 84 to 90 %; `tests/checks.py` prints the coverage of these here).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

from .. import arguments
from .arrays import Array

FEWEST_PAIRS = 8
"""No interval is given from fewer pairs than this."""


def resample(pairs: int, resamples: int = 1000, seed: int = 0, rows: int | None = None) -> Array:
    """How often each resample draws each pair: `counts @ stat` are the resampled sums of a stat
    [pair, ...].

    Args:
        pairs: how many there are.
        resamples: how many to draw.
        seed: of the draws.
        rows: how many independent rows the pairs make, if fewer (see
            `dit_lens.measures.agreement`); these are drawn then.

    Returns:
        Array: [resample, pair].

    Raises:
        InvalidValue: for fewer than 8 pairs or no resample.

    >>> resample(10, 3).sum(1).tolist()
    [10.0, 10.0, 10.0]
    """
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    resamples = arguments.whole("resamples", resamples, 1)
    seed = arguments.seed("seed", seed)
    n = pairs if rows is None else rows
    return (
        np.random.default_rng(seed)
        .multinomial(n, np.full(n, 1 / n), size=resamples)
        .astype(np.float64)
    )


def draws(pairs: int, resamples: int = 1000, seed: int = 0, rows: int | None = None) -> Array:
    """The counts of `resample`, with the sample itself, every pair once, as row 0.

    Args:
        pairs: how many there are.
        resamples: how many to draw.
        seed: of the draws.
        rows: as for `resample`.

    Returns:
        Array: [1 + resample, pair].

    Raises:
        InvalidValue: for fewer than 8 pairs.

    >>> draws(10, 3)[0].tolist() == [1.0] * 10, draws(10, 3).shape
    (True, (4, 10))
    """
    drawn = resample(pairs, resamples, seed, rows)
    return np.concatenate([np.ones((1, drawn.shape[1])), drawn])


def checked_level(level: Any) -> float:
    """The level of an interval, such as 0.95; raises InvalidValue unless it is between 0 and 1."""
    return arguments.number("level", level, above=0, most=1 - 1e-6, why="such as 0.95")


def interval(values: Array, rows: int, skip_nan: bool = True) -> Array:
    """95 % interval of a statistic from its resamples: estimate +- t * standard error.

    The standard error is the resamples' standard deviation times sqrt(n / (n - 1)) for n
    independent rows, and t has the degrees of freedom of `freedom`.

    Args:
        values: [1 + resample, ...], computed from `draws`.
        rows: how many of what was resampled are independent: the pairs, less one for each group
            whose mean was taken off.
        skip_nan: leave out the resamples that are NaN; otherwise a single one makes it NaN. More
            than a tenth of them always does.

    Returns:
        Array: [..., bound], the lower and the upper end.

    >>> values = np.random.default_rng(0).normal(5, 1, 1001); values[0] = 5
    >>> interval(values, rows=16).round(1).tolist()
    [2.7, 7.3]
    """
    width = float(stats.t.ppf(0.975, freedom(rows))) * _errors(values, rows, skip_nan)
    return np.stack([values[0] - width, values[0] + width], -1)


def simultaneous(values: Array, rows: int) -> Array:
    """95 % intervals of several statistics that hold for all of them at once.

    The studentised maximum (Romano & Wolf 2005, "Exact and approximate stepdown methods for
    multiple hypothesis testing", JASA 100, without its stepdown): the quantile of the largest
    |t| of all over the resamples, whose standard errors are known, is carried from a normal to
    Student's t, since those of the sample are not.

    Args:
        values: [1 + resample, statistic], computed from `draws`.
        rows: as for `interval`.

    Returns:
        Array: [statistic, bound]; NaN where more than a tenth of the resamples are.

    >>> values = np.random.default_rng(0).normal(size=(1001, 28)); values[0] = 0
    >>> float(simultaneous(values, rows=64)[0, 1].round(0))
    4.0
    """
    error = _errors(values, rows)
    known = np.isfinite(error) & (error > 1e-12 * (1 + np.abs(values[0])))  # rounding is no spread
    if not known.any():
        return np.stack([values[0] - error, values[0] + error], -1)
    part = values[1:, known]
    part = part[np.isfinite(part).any(1)]
    t = np.abs(part - np.nanmean(part, 0)) / np.nanstd(part, 0, ddof=1)
    normal = max(float(np.quantile(np.nanmax(t, axis=1), 0.95)), 1.96)
    width = float(stats.t.isf(stats.norm.sf(normal), freedom(rows))) * error
    return np.stack([values[0] - width, values[0] + width], -1)


def freedom(rows: int) -> float:
    """Degrees of freedom of a bootstrap standard error from n rows: 2.5 sqrt(n - 1).

    Fewer than n - 1, since energies and correlations are sums of squares with heavy tails, whose
    variance is known less well than that of normal values. Calibrated by simulation
    (`tests/checks.py`, part `intervals`): with n - 1, intervals for 28 layers at once held in 87 to
    95 %.

    Args:
        rows: how many are independent.

    >>> freedom(17)
    10.0
    """
    return 2.5 * float(np.sqrt(rows - 1))


def _errors(values: Array, rows: int, skip_nan: bool = True) -> Array:
    """Standard errors [...] of values [1 + resample, ...]; NaN where they are unknown."""
    lost = ~np.isfinite(values[1:])
    known = np.isfinite(values[0]) & (lost.mean(0) <= (0.1 if skip_nan else 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where every resample is NaN
        error = np.nanstd(np.where(lost, np.nan, values[1:]), axis=0, ddof=1)
    return np.where(known, error * np.sqrt(rows / (rows - 1)), np.nan)
