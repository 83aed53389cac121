"""Agreement: what twins share, band by band, as sums over pairs.

Everything is computed from three numbers for each pair and band, ⟨a, b⟩, |a|², |b|², and intervals
resample these. So they must be independent, which the deviations of n pairs from their own mean are
not: they sum to 0, and of two pairs both are the same but for the sign. Helmert contrasts are: each
pair less the mean of those before it in its group, scaled to the same variance. Their products
have the same sum as those of the deviations, exactly; a group's first pair has none and is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from .arrays import Array
from .bands import Bands

Places = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of items, to choose them by."""


class Agreement(NamedTuple):
    """Sufficient statistics of twins, each [..., pair, band], with the mean over pairs removed.

    Of each group n - 1 rows are independent and one, the first pair's, is 0 (see this module's
    docstring).

    Attributes:
        xy: ⟨a, b⟩.
        xx: |a|².
        yy: |b|².

    >>> ones = np.ones((9, 1)); curve(Agreement(ones, 2 * ones, 2 * ones)).tolist()
    [0.5]
    """

    xy: Array
    xx: Array
    yy: Array

    @classmethod
    def of(cls, sums: Tensor) -> Agreement:
        """From [3, ..., pair, band] on any device, in one transfer.

        Args:
            sums: ⟨a, b⟩, |a|² and |b|².
        """
        return cls(*sums.cpu().numpy())

    @classmethod
    def stack(cls, releases: Sequence[Agreement]) -> Agreement:
        """[release, pair, band] from one Agreement [pair, band] for each release.

        Args:
            releases: one for each.
        """
        return cls(*(np.stack([part[i] for part in releases]) for i in range(3)))

    def independent(self) -> Agreement:
        """Without the rows that are 0 throughout, the first pair of each group; all if none holds
        anything.
        """
        held = (self.xx + self.yy).any(-1)
        held = held.reshape(-1, held.shape[-1]).any(0)
        return Agreement(*(part[..., held, :] for part in self)) if held.any() else self


def agreement(
    a: Tensor, b: Tensor, bands: Bands | None = None, groups: ArrayLike | None = None
) -> Agreement:
    """Statistics of finished twins for each pair and band; channels are summed.

    The mean over the pairs is removed first, for each group by itself: a class's mean image is
    shared by all its samples, which is no agreement. The means of A and of B are removed
    separately, which takes the same share (n - 1)/n of ⟨a, b⟩ as of the energies; the factor
    n/(n - 1) puts it back, so that sums over pairs are unbiased. The rows are `contrasts`, so only
    sums over pairs mean anything.

    Args:
        a: twin A, images [pair, ..., h, w], or features of any shape [pair, ...] without `bands`.
        b: twin B, the same shape.
        bands: of the (h, w) grid; None takes everything as one band.
        groups: [pair], the labels; None makes one group of all pairs.

    Returns:
        Agreement: each of its arrays [pair, band].

    Raises:
        InvalidValue: if the shapes differ, or a group has only one pair.

    >>> a = torch.randn(16, 1, 8, 8)
    >>> curve(agreement(a, a, Bands.radial((8, 8), cut=0.25))).round(6).tolist()
    [1.0, 1.0]
    """
    for name, twin in (("a", a), ("b", b)):
        arguments.tensor(name, twin)
    arguments.optional(
        arguments.instance, "bands", bands, Bands, "Bands of the images' grid, or None"
    )
    if a.shape != b.shape or a.ndim < 2:
        raise InvalidValue(
            f"The twins have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected the same, "
            "[pair, ...]."
        )
    contrast = Contrasts(np.zeros(len(a)) if groups is None else groups, len(a))
    x, y = (contrast.modes(z, bands) for z in (a, b))
    return Agreement.of(sums(x, y, bands))


def not_alone(labels: ArrayLike) -> Places:
    """The items, by number, whose label another one has too: of one that is alone with its label
    there is no mean to take off, so it says nothing of agreement.

    >>> not_alone([3, 7, 3]).tolist()
    [0, 2]
    """
    _, which, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[which] > 1)


def sums(x: Tensor, y: Tensor, bands: Bands | None = None) -> Tensor:
    """⟨x, y⟩, |x|² and |y|² of each pair and band, [3, pair, band], where x and y are: nothing is
    waited for.

    Args:
        x: of twin A, from `Contrasts.modes`.
        y: of twin B.
        bands: those of `Contrasts.modes`.
    """
    found = torch.stack([(p * q).flatten(1, -2).sum(1) for p, q in ((x, y), (x, x), (y, y))])
    return found if bands is None else bands.total(found)


class Contrasts:
    """Helmert contrasts of pairs in groups, as the matrix that takes them, which is made once for
    many uses.

    Args:
        groups: [pair], the labels.
        pairs: how many there should be.

    Raises:
        InvalidValue: if a group has only one pair, or there is another number of labels.

    >>> Contrasts([0, 0, 1, 1], 4).matrix.shape
    torch.Size([4, 4])
    """

    def __init__(self, groups: ArrayLike, pairs: int) -> None:
        labels = arguments.array("groups", groups)
        if labels.shape != (pairs,):
            raise InvalidValue(
                f"groups has shape {labels.shape}; expected one label for each of the {pairs} "
                "pairs."
            )
        self.matrix = _helmert(tuple(labels.tolist()))

    def of(self, x: Tensor) -> Tensor:
        """The contrasts of x [pair, ...], in its dtype and where it is.

        Args:
            x: one row a pair.
        """
        if self.matrix.device != x.device:
            self.matrix = self.matrix.to(x.device)  # once a measurement
        return (self.matrix.to(x.dtype) @ x.reshape(len(x), -1)).view(x.shape)

    def modes(self, x: Tensor, bands: Bands | None) -> Tensor:
        """The contrasts' coefficients, in double precision: [pair, ..., mode], or without bands
        [pair, 1, 1, ...] with all that x holds as one band.

        Args:
            x: [pair, ..., h, w], or features [pair, ...] without bands.
            bands: of the (h, w) grid, or None.
        """
        found = self.of(x.detach().double())
        # without bands everything is summed over
        return found.flatten(1)[..., None] if bands is None else bands.coefficients(found)


def contrasts(x: Tensor, groups: ArrayLike) -> Tensor:
    """Helmert contrasts of each group over the first axis, scaled to the variance of x.

    sqrt(k / (k + 1)) (x[k] - mean(x[:k])) times sqrt(n / (n - 1)): of n independent values with
    any mean, n - 1 uncorrelated ones of mean 0, and the first is 0. Their squares sum to those of
    the deviations from the mean, times n / (n - 1).

    Args:
        x: [pair, ...].
        groups: [pair], the labels.

    Returns:
        Tensor: of x's shape.

    Raises:
        InvalidValue: if a group has only one pair.

    >>> x = torch.tensor([1.0, 3.0, 5.0])
    >>> contrasts(x, [0, 0, 0]).square().sum().round()  # 3 / 2 * 8
    tensor(12.)
    """
    return Contrasts(groups, len(x)).of(x)


@lru_cache(maxsize=16)
def _helmert(labels: tuple[float, ...]) -> Tensor:
    """The matrix of `contrasts`, [pair, pair]; raises InvalidValue for a group of one pair."""
    matrix = np.zeros((len(labels), len(labels)))
    for label in set(labels):
        here = np.flatnonzero(np.equal(labels, label))
        n = len(here)
        if n < 2:
            raise InvalidValue(
                f"Group {label:g} has 1 pair; to remove a group's mean it needs 2 or more."
            )
        k = np.arange(1, n)
        scale = np.sqrt(k / (k + 1) * n / (n - 1))
        own = np.tril(np.broadcast_to(-scale[:, None] / k[:, None], (n - 1, n)))
        own[k - 1, k] = scale
        matrix[np.ix_(here[1:], here)] = own
    return torch.from_numpy(matrix)


def curve(stats: Agreement, squared: bool = False) -> Array:
    """Agreement sum ⟨a, b⟩ / sqrt(sum |a|² sum |b|²) over pairs; NaN where there is no energy.

    Args:
        stats: [..., pair, band].
        squared: square it, for the one-pass estimator, where a is the x0 predicted at a step and b
            the finished image (see `dit_lens.experiments.one_pass`).

    Returns:
        Array: [..., band].

    >>> curve(Agreement(np.ones((9, 1)), np.full((9, 1), 2.0), np.full((9, 1), 2.0))).tolist()
    [0.5]
    """
    arguments.instance("stats", stats, Agreement, "an Agreement")
    arguments.flag("squared", squared)
    xy, xx, yy = (part.sum(-2) for part in stats)
    with np.errstate(invalid="ignore", divide="ignore"):
        r: Array = xy / np.sqrt(xx * yy)
    return r**2 if squared else r
