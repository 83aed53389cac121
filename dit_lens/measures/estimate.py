"""An estimate with its interval, and the one way to write it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsFloat


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval.

    `format` takes the format of a number, and after a space a unit, which stands behind the value.

    >>> gap = Estimate(3.14, 2.06, 4.0)
    >>> f"{gap:+.1f}", f"{gap:.0f steps}"
    ('+3.1 [+2.1, +4.0]', '3 steps [2, 4]')

    Attributes:
        value: the estimate.
        low: the interval's lower end.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: SupportsFloat, interval: Iterable[SupportsFloat]) -> Estimate:
        """From numbers, arrays or DataArrays.

        Args:
            value: the estimate.
            interval: its lower and its upper end.

        >>> str(Estimate.of(1, [0, 2]))
        '1.00 [0.00, 2.00]'
        """
        low, high = interval
        return cls(float(value), float(low), float(high))

    @property
    def known(self) -> bool:
        """Whether the value and both ends are finite."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __format__(self, spec: str) -> str:
        form, _, unit = (spec or ".2f").partition(" ")
        if not math.isfinite(self.value):
            return "-"
        value, low, high = (number(v, form) for v in (self.value, self.low, self.high))
        return f"{value}{unit and ' ' + unit} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def number(value: SupportsFloat, form: str = ".1f") -> str:
    """A number as text, "-" if it is not finite.

    >>> number(1.25, "+.1f"), number(float("nan"))
    ('+1.2', '-')
    """
    return format(float(value), form) if math.isfinite(value) else "-"
