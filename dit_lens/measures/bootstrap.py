"""Bootstrap over pairs: counts to resample with, and percentile intervals of what comes out.

Every statistic here is computed for the sample and for its resamples in one array, with the sample
as row 0 of the first axis.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .. import arguments
from .arrays import Array

FEWEST_PAIRS = 8
"""No interval is given from fewer pairs than this."""


def resample(pairs: int, resamples: int = 1000, seed: int = 0) -> Array:
    """How often each resample draws each pair: `counts @ stat` are the resampled sums of a stat
    [pair, ...].

    Args:
        pairs: how many there are.
        resamples: how many to draw.
        seed: of the draws.

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
    return (
        np.random.default_rng(seed)
        .multinomial(pairs, np.full(pairs, 1 / pairs), size=resamples)
        .astype(np.float64)
    )


def draws(pairs: int, resamples: int = 1000, seed: int = 0) -> Array:
    """The counts of `resample`, with the sample itself, every pair once, as row 0.

    Args:
        pairs: how many there are.
        resamples: how many to draw.
        seed: of the draws.

    Returns:
        Array: [1 + resample, pair].

    Raises:
        InvalidValue: for fewer than 8 pairs.

    >>> draws(10, 3)[0].tolist() == [1.0] * 10, draws(10, 3).shape
    (True, (4, 10))
    """
    counts = resample(pairs, resamples, seed)
    return np.concatenate([np.ones((1, counts.shape[1])), counts])


def checked_level(level: Any) -> float:
    """The level of an interval, such as 0.95; raises InvalidValue unless it is between 0 and 1."""
    return arguments.number("level", level, above=0, most=1 - 1e-6, why="such as 0.95")


def interval(values: Array, skip_nan: bool = True) -> Array:
    """95 % percentile interval of a statistic over its resamples.

    Args:
        values: [1 + resample, ...], computed from `draws`; row 0, the sample, does not count.
        skip_nan: leave out the resamples that are NaN; otherwise a single one makes it NaN.

    Returns:
        Array: [..., bound], the lower and the upper end.

    >>> interval(np.arange(-1, 201.0)).tolist()
    [5.0, 195.0]
    """
    quantile = np.nanquantile if skip_nan else np.quantile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where every resample is NaN, so is this
        return np.moveaxis(quantile(values[1:], [0.025, 0.975], axis=0), 0, -1)
