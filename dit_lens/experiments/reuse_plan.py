"""Reuse plans: which cells of a run can be held within a budget of multiply-accumulates.

A cell (layer, part, step) that is held adds what its layer added when it was last computed. To
first order every choice of cells moves the finished image by the sum of what its cells do
(`dit_lens.patching.first_order`), which depends on how long ago each was computed. So the plan is
composed greedily on these sums: the next cell is the one that adds the least error for what it
saves, errors that pile up or cancel counted; then cells are swapped while that lowers the error.
What comes out is run, with the computation really left out, on samples that it was not made from;
its figures are those of that run.

Sums over few samples find cells whose errors cancel by chance. So to the error of the sum that of
each cell by itself is added, as if half of all cancelling were chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from .. import arguments
from ..errors import InvalidValue
from ..hooks.hold import parts
from ..measures import Array
from ..measures.agreement import agreement, curve
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..patching.first_order import Additions, check_gradients, directions, projected
from ..plans.plan import Cell, Costs, Plan
from ..plans.runner import reuse
from ..sampling.loop import prepared
from ..sampling.run import Run, sample
from ..sampling.schedulers import default_name
from ..sampling.settings import checked_settings
from .cause_map import Spread, items_of_labels, log_interval

Aim = Literal["same", "good"]
SWAPS = 300


def reuse_plan(
    model: HookedDiT,
    budget: float = 0.5,
    aim: Aim = "same",
    *,
    items: int = 16,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    cut: float = CUT,
    longest: int = 15,
    projections: int = 4,
    seed: int = 0,
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> Plan:
    """A plan that leaves a share of the multiply-accumulates, and what it does to the image.

    Args:
        model: the opened model, with a scheduler.
        budget: the share that may be left, above 0 and up to 1.
        aim: "same" for the same image; "good" for one as good: errors count only as far as their
            band is decided by then, since before that they make another image and no worse one.
        items: samples that it is made from, 8 or more; as many others are what it is measured on.
        steps: of denoising.
        guidance: strength of classifier-free guidance.
        scheduler: as for `dit_lens.sample`.
        eta: as for `dit_lens.sample`.
        cut: between low and high, in cycles per pixel of the latents.
        longest: for how many steps in a row a cell may be held.
        projections: random directions an item and band.
        seed: of the samples; the samples that it is measured on have others.
        resamples: of the items.
        progress: called with the steps done, and in all.

    Returns:
        Plan: in `about` are `budget`, `aim`, `effect_low`, `effect_high` with their 95 % intervals
            `effect_low_interval`, `effect_high_interval`: E_b of `cause_map` on the other samples;
            `even_macs`, `even_low`, `even_high`, with intervals, the same of whole steps held
            evenly; and the settings of the run.

    Raises:
        InvalidValue: for a budget that can't be met, or what does not fit the model.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> plan = reuse_plan(model, 0.6, items=8, steps=3, projections=1, resamples=50)
    >>> 0.55 < plan.macs <= 0.6, plan.about["aim"]
    (True, 'same')
    """
    # What is asked for fits the model.
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    budget = arguments.number("budget", budget, above=0, most=1)
    arguments.choice("aim", aim, get_args(Aim))
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    steps, longest = (
        arguments.whole("steps", steps, 2),
        arguments.whole("longest", longest, 1, 1000),
    )
    projections = arguments.whole("projections", projections, 1, 1000)
    seed, resamples = arguments.seed("seed", seed), arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    name = default_name(model.scheduler) if scheduler is None else scheduler
    check_gradients(prepared(model, checked_settings(steps, guidance, "all", name, eta)))
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    labels = items_of_labels(model, items)
    costs = Costs.of(model)
    least = _cheapest(costs, steps, longest)
    if budget < least:
        raise InvalidValue(
            f"budget={budget:g} can't be met: with every cell held for {longest} steps in a row "
            f"{least:.3g} of the multiply-accumulates is left; expected more, or a larger longest."
        )

    # What every cell does, to first order.
    settings = (steps, guidance, scheduler, eta)
    run = sample(model, labels, seed, *settings)
    counts = draws(items, resamples, seed)
    spread = Spread(run, bands, counts)
    surrogate = _Surrogate(run, bands, spread, costs, longest, projections, seed, aim, progress)

    # The plan, and what it really does on other samples.
    greedy = surrogate.compose(budget)
    swapped = surrogate.swap(greedy, budget)
    about: dict[str, Any] = {"aim": aim, "budget": budget, "steps": steps, "guidance": guidance}
    about |= {"eta": eta, "cut": cut, "seed": seed, "items": items, "longest": longest}
    about |= {"scheduler": type(run.scheduler).__name__}
    times = run.timesteps.tolist()
    plans = [Plan.of(model, times, cells) for cells in dict.fromkeys((greedy, swapped))]
    if len(plans) > 1:  # on the samples that they were made from
        tried = [_moved(run, plan, bands, spread, labels, seed, settings)[0] for plan in plans]
        plans = [plans[int(np.argmin([values.sum() for values in tried]))]]
    if scheduler is None or isinstance(scheduler, str):
        about["sampler"] = scheduler
    plan = replace(plans[0], about=about)
    return _measured(model, plan, scheduler, items, seed + items, resamples)


def check_plan(
    model: HookedDiT, plan: Plan, *, items: int = 16, seed: int = 0, resamples: int = 1000
) -> Plan:
    """A plan with its figures measured anew: by running it, with the settings it was made with.

    Args:
        model: the opened model.
        plan: of `reuse_plan`.
        items: samples.
        seed: of the samples.
        resamples: of the items.

    Returns:
        Plan: the same, with other figures in `about`.

    Raises:
        InvalidValue: for a plan of another model, or one without the settings of `reuse_plan`.
    """
    plan.require_model(model)
    wanted = ("steps", "guidance", "sampler", "eta", "cut")
    absent = [name for name in wanted if name not in plan.about]
    if absent:
        raise InvalidValue(
            f"The plan does not say with which {absent[0]} it was made; expected one of "
            "dit_lens.experiments.reuse_plan."
        )
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    return _measured(model, plan, plan.about["sampler"], items, seed, resamples)


def _measured(
    model: HookedDiT, plan: Plan, scheduler: Any, items: int, seed: int, resamples: int
) -> Plan:
    """The plan with what it, and one that holds whole steps evenly, do to these samples."""
    about = dict(plan.about)
    even = evenly(model, plan)
    settings = (about["steps"], about["guidance"], scheduler, about["eta"])
    bands, labels = Bands.radial(model.cfg.pixels, cut=about["cut"]), items_of_labels(model, items)
    run = sample(model, labels, seed, *settings)
    spread = Spread(run, bands, draws(items, resamples, seed))
    about["even_macs"] = even.macs
    for what, each in (("effect", plan), ("even", even)):
        drawn = _moved(run, each, bands, spread, labels, seed, settings)
        for b, band in enumerate(bands.names):
            about[f"{what}_{band}"] = float(drawn[0, b])
            about[f"{what}_{band}_interval"] = log_interval(drawn[:, b], items).tolist()
    return replace(plan, about=about)


def evenly(model: HookedDiT, plan: Plan) -> Plan:
    """The plan that holds whole steps at even distances (FORA, Selvaraju et al. 2024, arXiv
    2407.01425) and leaves about as many multiply-accumulates as another one.

    Args:
        model: the opened model.
        plan: the other one.
    """
    computed = max(1, round(plan.macs * plan.steps))
    kept = {int(i * plan.steps / computed) for i in range(computed)}
    cells = [
        (layer, part, step)
        for layer, of_layer in enumerate(plan.parts)
        for part in of_layer
        for step in range(plan.steps)
        if step not in kept
    ]
    return Plan.of(model, plan.timesteps, cells)


def plan_sentence(plan: Plan) -> str:
    """What a plan saves, and what it does to the image.

    Args:
        plan: of `reuse_plan` or `check_plan`.
    """
    about = plan.about
    effects, even = (
        ", ".join(
            f"{band} {Estimate.of(about[f'{what}_{band}'], about[f'{what}_{band}_interval']):.2g}"
            for band in ("low", "high")
        )
        for what in ("effect", "even")
    )
    half = plan.steps // 2
    early = sum(step < half for *_, step in plan.cells) / max(1, len(plan.cells))
    return (
        f"The plan holds {len(plan.cells)} cells, {early:.0%} of them in the first half of the "
        f"steps, and leaves {plan.macs:.1%} of the multiply-accumulates; on samples that it was "
        f"not made from it moves the finished image by {effects} (1: a stranger's distance). "
        f"Whole steps held evenly, {about['even_macs']:.1%} left, move the same samples by {even}."
    ).replace("%", " %")


def _cheapest(costs: Costs, steps: int, longest: int) -> float:
    """The share that is left with every cell computed once in `longest` + 1 steps."""
    held = [s for s in range(steps) if s % (longest + 1)]
    return costs.share([(i, part, s) for i, part in costs.parts for s in held], steps)


def _moved(
    run: Run,
    plan: Plan,
    bands: Bands,
    spread: Spread,
    labels: Sequence[int],
    seed: int,
    settings: tuple[Any, ...],
) -> Array:
    """E_b under a plan, [1 + resample, band], by running it."""
    with reuse(run.model, plan):
        found = sample(run.model, labels, seed, *settings)
    away = bands.energy((found.latents[-1] - run.latents[-1]).double()).sum(1).cpu().numpy()
    moved: Array = spread.relative(away[None])[:, 0]
    return moved


class _Surrogate:
    """What every cell does to first order, by how many steps ago it was computed, and the search
    on it.
    """

    def __init__(
        self,
        run: Run,
        bands: Bands,
        spread: Spread,
        costs: Costs,
        longest: int,
        projections: int,
        seed: int,
        aim: str,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self.costs, self.longest, self.steps = costs, longest, run.settings.steps
        self.columns = list(costs.parts)  # (layer, part)
        names = run.model.names
        places = [parts(names, layer)[part] for layer, part in self.columns]
        every = list(dict.fromkeys(place for column in places for place in column))
        aims = directions(run, bands, projections, seed)
        # so that the squares of a sum of cells add up to E, all bands together
        scale = np.sqrt(spread.of_all * projections * len(run.labels))[:, None, None]
        weight = _decided(run, bands) if aim == "good" else np.ones((self.steps, bands.n))
        size = int(np.prod(aims.shape[:3]))
        # [column, step, steps since it was computed, direction]
        self.z = np.zeros((len(places), self.steps, longest + 1, size), np.float32)
        known: dict[int, Additions] = {}

        def changes(
            step: int, here: Additions, elsewhere: Callable[[int], Additions]
        ) -> list[Additions]:
            for s in [s for s in known if s >= step]:
                del known[s]
            found = []
            for since in range(1, min(longest, step) + 1):
                if step - since not in known:
                    known[step - since] = elsewhere(step - since)
                theirs = known[step - since]
                found.append({p: theirs[p] - here[p] for p in every})
            return found

        for step, found in projected(run, every, aims, changes):
            weights = np.sqrt(weight[step])[:, None, None] / scale
            for since, change in enumerate(found, start=1):
                for c, column in enumerate(places):
                    moved = sum(change[place] for place in column)
                    self.z[c, step, since] = (moved * weights).ravel()
            if progress is not None:
                progress(self.steps - step, self.steps)

    def compose(self, budget: float) -> frozenset[Cell]:
        """Greedily: cells by the error that they add for what they save."""
        search = _Search(self)
        while search.share > budget and search.hold_one():
            pass
        return search.cells

    def swap(self, cells: frozenset[Cell], budget: float) -> frozenset[Cell]:
        """Compute the cell again that errs most for what it saves, and hold others instead, as long
        as that lowers the error.
        """
        search, best = _Search(self, cells), cells
        error = search.error
        for _ in range(SWAPS):
            freed = search.compute_one()
            while freed is not None and search.share > budget and search.hold_one(but=freed):
                pass
            if freed is None or search.share > budget or search.error >= error:
                break
            best, error = search.cells, search.error
        return best


class _Search:
    """A choice of cells, and what toggling each of them would change."""

    def __init__(self, surrogate: _Surrogate, cells: frozenset[Cell] = frozenset()) -> None:
        self.of = surrogate
        columns, steps, _, size = surrogate.z.shape
        self.held = np.zeros((columns, steps), bool)
        for layer, part, step in cells:
            self.held[surrogate.columns.index((layer, part)), step] = True
        self.sums, self.errors = np.zeros((columns, size)), np.zeros(columns)
        self.by_sum, self.by_error = np.zeros((columns, steps, size)), np.zeros((columns, steps))
        self.cost = np.array([max(surrogate.costs.parts[c], 1e-9) for c in surrogate.columns])
        for column in range(columns):
            self._look(column)

    @property
    def cells(self) -> frozenset[Cell]:
        return frozenset((*self.of.columns[c], s) for c, s in np.argwhere(self.held).tolist())

    @property
    def share(self) -> float:
        """The share of multiply-accumulates that is left."""
        costs, layers = self.of.costs, np.array([layer for layer, _ in self.of.columns])
        saved = float((self.held.sum(1) * self.cost).sum())
        for layer, rest in enumerate(costs.rest):
            saved += rest * int(self.held[layers == layer].all(0).sum())
        return 1 - saved / (costs.whole * self.of.steps)

    @property
    def error(self) -> float:
        """Of the sum of all cells, and of each by itself."""
        return float(np.square(self.sums.sum(0)).sum() + self.errors.sum())

    def hold_one(self, but: tuple[int, int] | None = None) -> bool:
        """Hold the cell that adds the least error for what it saves; False where there is none."""
        price = np.where(self.held, np.inf, self._changes() / self.cost[:, None])
        price[:, 0] = np.inf  # the first step has nothing to be held from
        if but is not None:
            price[but] = np.inf
        return self._toggle(price) is not None

    def compute_one(self) -> tuple[int, int] | None:
        """Compute the held cell that takes away the most error for what it costs."""
        return self._toggle(np.where(self.held, self._changes() / self.cost[:, None], np.inf))

    def _toggle(self, price: Array) -> tuple[int, int] | None:
        column, step = map(int, np.unravel_index(int(np.argmin(price)), price.shape))
        if not np.isfinite(price[column, step]):
            return None
        self.held[column, step] ^= True
        self._look(column)
        return column, step

    def _changes(self) -> Array:
        """What toggling each cell does to the error, [column, step]."""
        total = self.sums.sum(0)
        changed: Array = 2 * self.by_sum @ total + np.square(self.by_sum).sum(-1) + self.by_error
        return changed

    def _look(self, column: int) -> None:
        """Work out anew what a column is, and would be with each of its cells toggled."""
        self.sums[column], self.errors[column] = self._measured(column, self.held[column])
        for step in range(1, self.of.steps):
            row = self.held[column].copy()
            row[step] ^= True
            found, error = self._measured(column, row)
            self.by_sum[column, step] = found - self.sums[column]
            self.by_error[column, step] = error - self.errors[column]

    def _measured(self, column: int, row: Array) -> tuple[Array, float]:
        """The sum of a column's held cells, and of their errors one by one."""
        steps = np.flatnonzero(row)
        # how many steps ago each was computed
        since = steps - np.maximum.accumulate(np.where(row, 0, np.arange(len(row))))[steps]
        if len(since) and since.max() > self.of.longest:
            return self.sums[column], np.inf
        z = self.of.z[column, steps, since]
        return z.sum(0), float(np.square(z).sum())


def _decided(run: Run, bands: Bands) -> Array:
    """How far each band is decided by each step, [step, band]."""
    labels = run.labels.cpu().numpy()
    found = [curve(agreement(x0, run.latents[-1], bands, labels), squared=True) for x0 in run.x0]
    return np.clip(np.nan_to_num(np.stack(found)), 0, 1)
