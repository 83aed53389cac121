"""How far unrelated samples of one label are apart, which effects on finished images are measured
in, and how far each band of them is decided by each step.
"""

from __future__ import annotations

import numpy as np

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import agreement, curve, not_alone
from ..measures.bands import Bands
from ..measures.bootstrap import interval
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching.measure import energy
from ..sampling.run import Run, require_finite

SMALLEST = 1e-12
"""An effect below this is rounding, and counts as none."""


def item_labels(model: HookedDiT, items: int, labels: Labels | None) -> list[int]:
    """One label an item, by number.

    Args:
        model: whose labels.
        items: how many items.
        labels: one an item, or fewer, which are then taken in turn; None is the model's own in
            turn, as many as leave each four items or more.

    Raises:
        InvalidValue: for labels that the model does not have, more than items, or all different.
    """
    if labels is None:
        return [i % max(1, min(model.conditions.n, items // 4)) for i in range(items)]
    given: list[int] = model.conditions.numbers(labels).tolist()
    if len(given) > items:
        raise InvalidValue(
            f"There are {items} items and {len(given)} labels; expected at most one an item."
        )
    found = [given[i % len(given)] for i in range(items)]
    if len(set(found)) == items:
        raise InvalidValue(
            f"labels={arguments.shown(given)} has each label once; expected two items or more of "
            "one, to compare with how far unrelated samples are apart."
        )
    return found


def decided(run: Run, bands: Bands) -> Array:
    """The share of the finished image's variance that the predicted x0 has by each step, less the
    mean of each label, [step, band]; items alone with their label are left out.

    Args:
        run: of the samples.
        bands: of the latents' grid.
    """
    labels = run.labels.cpu().numpy()
    kept = not_alone(labels)
    labels, final = labels[kept], run.finished[kept]
    seen = (agreement(x0[kept], final, bands, labels) for x0 in map(run.here, run.x0))
    return np.stack([curve(each, squared=True) for each in seen])


class Spread:
    """D_b: how far unrelated samples of one label are apart, for the items and their resamples.

    Args:
        run: of the samples.
        bands: of the latents' grid.
        counts: how often each resample draws each item, as `draws` gives them.

    Raises:
        InvalidValue: for a run that is not finite.
    """

    def __init__(self, run: Run, bands: Bands, counts: Array) -> None:
        require_finite(run, "the samples")
        labels, x, n = run.labels.cpu().numpy(), run.finished.double(), len(run.labels)
        same = (labels[:, None] == labels) & ~np.eye(n, dtype=bool)
        apart = np.stack([energy(x - x[i], bands) for i in range(n)])
        number = np.einsum("ri,ij,rj->r", counts, same, counts)
        summed = np.einsum("ri,ij,rj,ijb->rb", counts, same, counts, apart, optimize=True)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without two of one label
            self.drawn: Array = summed / number[:, None]  # [1 + resample, band]
        self.counts, self.of_all = counts, self.drawn[0]

    def relative(self, energy: Array) -> Array:
        """Effects [1 + resample, cell, band] from energies [cell, item, band]."""
        mean = np.einsum("ri,cib->rcb", self.counts, energy, optimize=True) / energy.shape[1]
        found: Array = mean / self.drawn[:, None]
        return np.where(np.abs(found[0]) < SMALLEST, 0.0, found)


def log_interval(values: Array, items: int) -> Array:
    """95 % intervals of effects, taken of their logarithms; an effect of 0 has none.

    Args:
        values: [1 + resample, ...].
        items: that were resampled.

    Returns:
        Array: [..., bound].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.exp(interval(np.log(values), items))
    return np.where(values[0][..., None] == 0, 0.0, ends)
