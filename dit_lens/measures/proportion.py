"""A share of so many, with its interval."""

from __future__ import annotations

import math

from .. import arguments
from .estimate import Estimate

Z = 1.959964


def proportion(hits: float, n: int) -> Estimate:
    """hits / n with its 95 % interval (Wilson 1927), which is also one for none and for all.

    >>> f"{proportion(0, 16):.2f}"
    '0.00 [0.00, 0.19]'

    Args:
        hits: how many; of an item that is a pair, half of it may be one.
        n: of how many, 1 or more.

    Raises:
        InvalidValue: for more hits than there are, or none of them.
    """
    n = arguments.whole("n", n, 1)
    hits = arguments.number("hits", hits, 0, n)
    p, z2 = hits / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return Estimate(p, low if hits else 0.0, high if hits < n else 1.0)
