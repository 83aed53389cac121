"""What becomes of the gap when something is taken out of a model: the effects as a dataset, which
of them are causes, and the sentence.

What was done is a grid of *cells*, with one axis (layers, or sets of layers) or two (layers and
windows of steps). Their intervals hold for all cells at once, so a sentence may name the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ..measures import Array
from ..measures.bootstrap import simultaneous
from ..measures.estimate import Estimate

MATTERS = 0.01
"""A share of the run's steps: a smaller effect is named no cause, however certain, since finite
steps and the fitted logistic make as much of nothing.
"""
FEWEST_MOVE = 0.005
"""A smaller share of the way from one twin to the other is not named, however certain."""
SHOWN = 5
"""So many effects are named in a sentence, the largest first."""


def together(values: Array, rows: int) -> Array:
    """95 % intervals [*cell, bound] of statistics [1 + resample, *cell] for all cells at once."""
    flat = values.reshape(len(values), -1)
    return simultaneous(flat, rows).reshape(*values.shape[1:], 2)


def effects(
    whole: Estimate,
    before: Array,
    after: Array,
    cells: Mapping[str, Sequence[Any]],
    rows: int,
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """What became of the gap.

    Args:
        whole: the gap of the whole model, in steps.
        before: commitments [1 + resample, band] of the whole model.
        after: commitments [*cell, 1 + resample, band] without each cell.
        cells: the labels of each axis of the cells.
        rows: how many independent rows were resampled.
        attrs: `steps`, `done` (a participle, such as "knocked out") and what else to keep.

    Returns:
        xr.Dataset: `gap`, `effect` [*cell], `effect_interval` [*cell, bound], `commitment` [*cell,
            band]; attributes `gap`, `gap_interval`, `matters`, `causes` where the cells are
            layers, and the `sentence`.
    """
    gap = np.moveaxis(after[..., 1] - after[..., 0], -1, 0)  # [resample, *cell]
    was = before[:, 1] - before[:, 0]
    effect = gap - was.reshape(-1, *[1] * (gap.ndim - 1))
    axes = tuple(cells)
    result = xr.Dataset(
        {
            "gap": (axes, gap[0]),
            "effect": (axes, effect[0]),
            "effect_interval": ((*axes, "bound"), together(effect, rows)),
            "commitment": ((*axes, "band"), after[..., 0, :]),
        },
        coords={**cells, "band": ["low", "high"], "bound": ["low", "high"]},
        attrs={
            "gap": whole.value,
            "gap_interval": [whole.low, whole.high],
            "matters": MATTERS * attrs["steps"],
        }
        | dict(attrs),
    )
    if axes == ("layer",):
        result.attrs["causes"] = result.layer.values[moves(result).values].tolist()
    result.attrs["sentence"] = effects_sentence(result)
    return result


def moves(result: xr.Dataset) -> xr.DataArray:
    """Which cells move the gap: 0 is outside the interval and the effect is not too small to
    matter, [*cell].

    Args:
        result: of `effects`.
    """
    low, high = (result.effect_interval.sel(bound=end) for end in ("low", "high"))
    found: xr.DataArray = ((low > 0) | (high < 0)) & (
        np.abs(result.effect) > float(result.attrs["matters"])
    )
    return found


def named(axes: Mapping[str, Any]) -> str:
    """A cell in words, as "3", or "3 at steps 0-4".

    Args:
        axes: the cell's label on each axis.

    >>> named({"layer": 3, "window": "0-4"}), named({"end": "last", "depth": 5})
    ('3 at steps 0-4', 'last 5')
    """
    window = axes.get("window")
    if "end" in axes:
        return f"{axes['end']} {axes['depth']}"
    what = ", ".join(str(value) for axis, value in axes.items() if axis != "window")
    return what if window is None else f"{what} at steps {window}"


def of_cells(result: xr.Dataset) -> dict[str, Estimate]:
    """Every cell's effect with its interval, by its name, in order.

    Args:
        result: of `effects`.
    """
    axes = tuple(map(str, result.effect.dims))
    labels = [result[axis].values.tolist() for axis in axes]
    return {
        named({axis: labels[d][i] for d, (axis, i) in enumerate(zip(axes, at, strict=True))}): (
            Estimate.of(result.effect.values[at], result.effect_interval.values[at])
        )
        for at in np.ndindex(*result.effect.shape)
    }


def effects_sentence(result: xr.Dataset) -> str:
    """Which layers (or sets, or layers in a window) move the gap, the largest effects first.

    Args:
        result: of `knock_outs`, `cumulative` or `couple_alone`.
    """
    done, cells = result.attrs["done"], of_cells(result)
    causes = [name for name, yes in zip(cells, moves(result).values.flat, strict=True) if yes]
    one, several = _nouns(result)
    n, by = len(cells), result.attrs.get("estimator", "")
    gap = Estimate.of(result.attrs["gap"], result.attrs["gap_interval"])
    whole = f"the gap of {gap:+.2f steps}"
    lost = [name for name, effect in cells.items() if not np.isfinite(effect.value)]
    undecided = (
        f" Without {several if len(lost) > 1 else one} {first_few(lost, 12)} a band does not "
        "commit at all."
        if lost
        else ""
    )
    matters = f"{result.attrs['matters']:.2g} steps, {MATTERS:.0%} of the run"
    if not causes:
        who = f"No {one} of {n}, {done} by itself," if n > 1 else f"The {one}, {done}, does not"
        verb = "moves" if n > 1 else "move"
        known = [effect for effect in cells.values() if effect.known]
        reach = max((max(abs(e.low), abs(e.high)) for e in known), default=np.nan)
        missed = f" Effects of up to {reach:.2g} steps are not excluded." if known else ""
        return (
            f"{who} {verb} {whole} measurably and by {matters}, or more{by and f' (by {by})'}."
            f"{missed}{undecided}"
        )
    order = sorted(causes, key=lambda name: -abs(cells[name].value))
    largest = first_few([f"{name} ({cells[name]:+.2f})" for name in order], SHOWN)
    move = "moves" if len(causes) == 1 else "move"
    head = f"{done.capitalize()} one by one, {len(causes)} of {n} {several} {move} {whole}"
    return (
        f"{head}: {largest}, largest first; {by and f'by {by}, '}95 % for all {several} at once, "
        f"and {matters}, or more.{undecided}"
    )


def _nouns(result: xr.Dataset) -> tuple[str, str]:
    axes = result.effect.dims
    if "window" in axes:
        return "cell (layer and window)", "cells (layer and window)"
    return ("layer", "layers") if axes == ("layer",) else ("set", "sets")


def first_few(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are.

    Args:
        names: in order.
        most: how many are named.

    >>> first_few(["1", "2", "3"], 2)
    '1, 2 and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
