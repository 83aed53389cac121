"""The search for a plan: which cells to hold, from what each would do to first order.

To first order the finished latents move by the sum of what the held cells do. What a cell does
depends on when its part was last computed, so a column (a layer's part, or several that are held
together) is looked at as a whole whenever one of its cells is held or computed again.

Sums over few samples find cells whose errors cancel by chance. So to the error of the sum that of
each cell by itself is added, as if half of all cancelling were chance. That is not enough where
there are thousands of cells: columns that are held together leave fewer choices, and less chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..measures import Array
from ..plans.costs import Cell, Costs


class Effects(NamedTuple):
    """What cells do to the finished latents, in units in which squares add up to E.

    Attributes:
        columns: the (layer, part) that are held together, one or several.
        cells: [column, step, back, direction]: what a cell does that adds what its parts would add
            `back` steps earlier.
        times: of the steps, in the scheduler's units.
        costs: of the parts.
        lines: whether cells may be held along lines.
    """

    columns: Sequence[tuple[tuple[int, str], ...]]
    cells: Array
    times: Sequence[float]
    costs: Costs
    lines: bool

    def together(self, groups: Sequence[Sequence[int]]) -> Effects:
        """The same with columns held together.

        Args:
            groups: the columns of each, by their index.
        """
        columns = [tuple(p for i in group for p in self.columns[i]) for group in groups]
        cells = np.stack([self.cells[list(group)].sum(0) for group in groups])
        return self._replace(columns=columns, cells=cells)


class Column(NamedTuple):
    """What a column does with some of its cells held.

    Attributes:
        moved: [direction], by all of them.
        alone: the sum of the errors of each by itself.
        lines: the steps that are best held along a line.
    """

    moved: Array
    alone: float
    lines: tuple[int, ...] = ()


class Search:
    """A choice of cells, and what changing each of them would do.

    Args:
        effects: of the cells.
        cells: that are held to begin with.
    """

    def __init__(self, effects: Effects, cells: Iterable[Cell] = ()) -> None:
        self.of = effects
        n, steps, _, size = effects.cells.shape
        self.times = np.asarray(effects.times, float)
        self.places = [place for column in effects.columns for place in column]
        self.of_place = np.repeat(np.arange(n), [len(column) for column in effects.columns])
        index = dict(zip(self.places, self.of_place.tolist(), strict=True))
        number = np.zeros((n, steps))
        for layer, part, step in cells:
            number[index[layer, part], step] += 1
        self.held = number > np.bincount(self.of_place)[:, None] / 2
        self.now = [self._column(c, self.held[c]) for c in range(n)]
        each = np.array([max(effects.costs.parts[place], 1e-9) for place in self.places])
        self.cost = np.bincount(self.of_place, each)
        self.by_sum, self.by_error = np.zeros((n, steps, size)), np.zeros((n, steps))
        for c in range(n):
            self._look(c)

    @property
    def cells(self) -> frozenset[Cell]:
        """Those that are held."""
        held = np.argwhere(self.held).tolist()
        return frozenset((*place, s) for c, s in held for place in self.of.columns[c])

    @property
    def lines(self) -> frozenset[Cell]:
        """Those that are held along lines."""
        columns = zip(self.of.columns, self.now, strict=True)
        return frozenset((*p, s) for places, now in columns for s in now.lines for p in places)

    @property
    def share(self) -> float:
        """The share of multiply-accumulates that is left."""
        costs, layers = self.of.costs, np.array([layer for layer, _ in self.places])
        saved, by_place = float((self.held.sum(1) * self.cost).sum()), self.held[self.of_place]
        for layer, rest in enumerate(costs.rest):
            saved += rest * int(by_place[layers == layer].all(0).sum())
        return 1 - saved / (costs.whole * len(self.times))

    @property
    def moved(self) -> Array:
        """By all held cells, [direction]."""
        found: Array = np.sum([column.moved for column in self.now], axis=0)
        return found

    @property
    def error(self) -> float:
        """Of the sum of all cells, and of each by itself."""
        alone = sum(column.alone for column in self.now)
        return float(np.square(self.moved).sum() + alone)

    def compose(self, budget: float) -> None:
        """Hold cells, each time the one that adds the least error for what it saves.

        Args:
            budget: the share of multiply-accumulates that may be left.
        """
        while self.share > budget and self._hold_one():
            pass

    def exchange(self, budget: float, most: int) -> None:
        """Compute the cell again that errs most for what it costs, and hold others instead, as long
        as that lowers the error.

        Args:
            budget: the share of multiply-accumulates that may be left.
            most: exchanges.
        """
        error = self.error
        while self._compute_one(within=budget - self.share) is not None:
            pass
        for _ in range(most):
            before = self.held.copy()
            freed = self._compute_one()
            while freed is not None and self.share > budget and self._hold_one(but=freed):
                pass
            if freed is None or self.share > budget or self.error >= error:
                for c in np.flatnonzero((self.held != before).any(1)).tolist():
                    self.held[c] = before[c]
                    self._look(c)
                return
            error = self.error

    def _hold_one(self, but: tuple[int, int] | None = None) -> bool:
        """Hold the cell that adds the least error for what it saves; False where there is none."""
        price = np.where(self.held, np.inf, self._changes() / self.cost[:, None])
        price[:, 0] = np.inf  # the first step has nothing to be held from
        if but is not None:
            price[but] = np.inf
        return self._toggle(price) is not None

    def _compute_one(self, within: float = np.inf) -> tuple[int, int] | None:
        """Compute the held cell that takes away the most error for what it costs, a share within
        this.
        """
        changes, cost = self._changes(), self.cost[:, None]
        can = self.held & (changes < 0) & (cost <= within * self.of.costs.whole * len(self.times))
        return self._toggle(np.where(can, changes / cost, np.inf))

    def _toggle(self, price: Array) -> tuple[int, int] | None:
        column, step = map(int, np.unravel_index(int(np.argmin(price)), price.shape))
        if not np.isfinite(price[column, step]):
            return None
        self.held[column, step] ^= True
        self._look(column)
        return column, step

    def _changes(self) -> Array:
        """What changing each cell does to the error, [column, step]."""
        changed: Array = (
            2 * self.by_sum @ self.moved + np.square(self.by_sum).sum(-1) + self.by_error
        )
        return changed

    def _look(self, column: int) -> None:
        """Work out anew what a column is, and would be with each of its cells changed."""
        now = self.now[column] = self._column(column, self.held[column])
        for step in range(1, len(self.times)):
            row = self.held[column].copy()
            row[step] ^= True
            other = self._column(column, row)
            self.by_sum[column, step] = other.moved - now.moved
            self.by_error[column, step] = other.alone - now.alone

    def _column(self, column: int, row: Array) -> Column:
        """What a column does with these cells held."""
        z = self.of.cells[column]
        steps, computed = np.flatnonzero(row), np.flatnonzero(row == 0)
        reach = z.shape[1] - 1
        place = np.searchsorted(computed, steps)  # the last computed one is just before
        last = computed[place - 1]
        if len(steps) and (steps - last).max() > reach:
            return Column(np.zeros(z.shape[-1]), np.inf)
        moved = z[steps, steps - last]
        alone = np.square(moved).sum(1)
        if not self.of.lines:
            return Column(moved.sum(0), float(alone.sum()))
        earlier = computed[np.maximum(place - 2, 0)]
        can = (place > 1) & (steps - earlier <= reach)
        s, a, b, t = steps[can], last[can], earlier[can], self.times
        by = ((t[s] - t[a]) / (t[a] - t[b]))[:, None]
        lined = (1 + by) * moved[can] - by * z[s, s - b]
        alone_lined = np.square(lined).sum(1)
        better = alone_lined < alone[can]
        which = np.flatnonzero(can)[better]
        moved[which], alone[which] = lined[better], alone_lined[better]
        return Column(moved.sum(0), float(alone.sum()), tuple(s[better].tolist()))
