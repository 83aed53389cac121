"""The step at which a curve reaches half of what it ends at."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from .. import arguments
from .arrays import Array


def half_crossing(curves: ArrayLike) -> Array:
    """The step, with its fraction, at which curves reach half of what they end at.

    What has settled does not unsettle, so the crossing is that of the nearest curve that never
    falls (isotonic regression, Barlow et al. 1972), interpolated linearly: a wavering curve crosses
    half many times, and which time is noise.

    Args:
        curves: [..., step].

    Returns:
        Array: [...], in steps. NaN where a curve ends at or below 0, is not finite, or is above
            half from the first step on: it did not cross within the run.

    >>> half_crossing([[0, 0, 1, 2, 2], [0, 0, 3, 1, 2]]).tolist()
    [2.0, 1.5]
    """
    c = arguments.array("curves", curves)
    if not c.ndim or not c.shape[-1]:
        raise arguments.refusal("curves", curves, "one step or more, [..., step]")
    fine = np.asarray(np.isfinite(c).all(-1))
    rising = np.where(fine[..., None], c, 0.0).reshape(-1, c.shape[-1])
    falls = (np.diff(rising) < 0).any(-1)
    for row in np.flatnonzero(falls):
        rising[row] = isotonic_regression(rising[row]).x
    level = rising.reshape(c.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        level = level / level[..., -1:] - 0.5
    below = level < 0
    fine &= below[..., 0] & (c[..., -1] > 0)
    # the last step below half: it never falls again
    last = np.where(fine, below.sum(-1) - 1, 0)[..., None]
    before = np.take_along_axis(level, last, -1)[..., 0]
    after = np.take_along_axis(level, np.minimum(last + 1, c.shape[-1] - 1), -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        step = last[..., 0] - before / (after - before)
    return np.where(fine, step, np.nan)
