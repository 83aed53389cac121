"""Reuse plans: which cells of a run can be held within a budget of multiply-accumulates.

A cell (layer, part, step) that is held adds what its layer added when it was last computed, or the
point of the line through the last two times. To first order every choice of cells moves the
finished image by the sum of what its cells do (`plan_gradients`), and the search is on these sums
(`plan_search`): around the plain run it composes a plan, and around the best plan so far it
exchanges cells.

It does so four times over: for whole steps, for the parts of all layers, for the parts of a quarter
of the layers, and for every cell by itself. The finer the choice, the more of it is fitted to the
samples and to what the first order leaves out; so each plan is run on other samples, beside plans
that hold whole steps at distances that shrink towards the end, and the one that errs least there is
taken ("same"; "good" takes the parts of all layers). Its figures are those of a run on samples of a
third kind. A few samples in a hundred, near the border between two images, make most of the error:
so the samples must be many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..hooks.hold import require_parts
from ..measures import Array
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching.first_order import check_gradients, directions
from ..patching.measure import energy
from ..pieces import Engine, enough, measured
from ..plans.costs import Costs
from ..plans.plan import Plan
from ..plans.runner import reuse
from ..sampling.kept import kept_latents, kept_run
from ..sampling.loop import prepared
from ..sampling.run import Run
from ..sampling.sample import sample
from ..sampling.schedulers import default_name
from ..sampling.settings import checked_settings
from .plan_gradients import slopes
from .plan_search import Effects, Search
from .spread import Spread, decided, item_labels, log_interval
from .whole_steps import even_steps, number_of_steps, whole_steps

Aim = Literal["same", "good"]
EXCHANGES = 300
QUARTERS = 4
POWERS = 1.0, 0.85, 0.7, 0.6, 0.5
"""Of the plans that hold whole steps, which are tried first: see `even_steps`."""
OTHER_SAMPLES = 1000
"""The seed of the samples that plans are judged by; made they are from 0 on, unless told."""


@measured
def reuse_plan(
    model: HookedDiT,
    budget: float = 0.5,
    aim: Aim = "same",
    *,
    items: int = 64,
    labels: Labels | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    cut: float = CUT,
    longest: int = 15,
    lines: bool = True,
    rounds: int = 1,
    projections: int = 1,
    seed: int = 0,
    resamples: int = 1000,
    batch: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Plan:
    """A plan that leaves a share of the multiply-accumulates, and what it does to the image.

    Args:
        model: the opened model, with a scheduler.
        budget: the share that may be left, above 0 and up to 1.
        aim: "same" for the same image; "good" for one as good: errors count only as far as their
            band is decided by then, since before that they make another image and no worse one.
        items: samples that it is made from, 8 or more; as many others are what it is chosen by, and
            as many again what it is measured on.
        labels: one an item, or fewer, which are then taken in turn; by default the model's own.
        steps: of denoising.
        guidance: strength of classifier-free guidance.
        scheduler: as for `dit_lens.sample`.
        eta: as for `dit_lens.sample`.
        cut: between low and high, in cycles per pixel of the latents.
        longest: for how many steps in a row a cell may be held.
        lines: whether cells may be held along lines; plans for most other tools can't.
        rounds: how often cells are exchanged around the best plan so far.
        projections: random directions an item and band.
        seed: of the samples that it is made from; the others have others.
        resamples: of the items.
        batch: images that go through the model at once; None is all.
        progress: called with how much is done, and how much there is.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        Plan: in `about` are `budget`, `aim`, `effect_low`, `effect_high` with their 95 % intervals
            `effect_low_interval`, `effect_high_interval`: E_b of `cause_map` on the other samples;
            `even_macs`, `even_low`, `even_high`, with intervals, the same of whole steps held
            evenly; and the settings of the run.

    Raises:
        InvalidValue: for a budget that can't be met, or what does not fit the model.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> plan = reuse_plan(model, 0.6, items=8, steps=2, projections=1, rounds=0, resamples=50)
    >>> 0.55 < plan.macs <= 0.6, plan.about["aim"]
    (True, 'same')
    """
    del store, engine  # `measured` sees to them
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
    arguments.flag("lines", lines)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    rounds = arguments.whole("rounds", rounds, 0, 100)
    seed, resamples = arguments.seed("seed", seed), arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    require_parts(model.names)
    name = default_name(model.scheduler) if scheduler is None else scheduler
    check_gradients(prepared(model, checked_settings(steps, guidance, "all", name, eta)))
    Bands.radial(model.cfg.pixels, cut=arguments.number("cut", cut, above=0))
    item_labels(model, items, labels)
    costs = Costs.of(model)
    least = _cheapest(costs, steps, longest)
    if budget < least:
        raise InvalidValue(
            f"budget={budget:g} can't be met: with every cell held for {longest} steps in a row "
            f"{least:.3g} of the multiply-accumulates is left; expected more, or a larger longest."
        )

    settings = (steps, guidance, scheduler, eta)
    about: dict[str, Any] = {"aim": aim, "budget": budget, "steps": steps, "guidance": guidance}
    about |= {"eta": eta, "cut": cut, "seed": seed, "items": items, "longest": longest}
    makers, judges = (
        Samples(name, model, items, s, settings, cut, labels=labels, batch=batch)
        for name, s in (("what it is made from", seed), ("what it is chosen by", seed + 2 * items))
    )
    if labels is not None:
        about["labels"] = model.conditions.words(model.conditions.numbers(labels).tolist())
    about["scheduler"] = type(makers.run.scheduler).__name__
    if scheduler is None or isinstance(scheduler, str):
        about["sampler"] = scheduler
    aims = directions(makers.run, makers.bands, projections, seed)
    weight = np.ones((steps, makers.bands.n))
    if aim == "good":
        weight = np.clip(np.nan_to_num(decided(makers.run, makers.bands)), 0, 1)
    # so that the squares of a sum of cells add up to E, all bands together
    size = makers.spread.of_all * projections * items
    scale = np.sqrt(weight / size)[..., None, None]

    # Plans from coarse to fine, around the plain run and then around the best plan so far.
    times, columns = makers.run.timesteps.tolist(), list(costs.parts)
    number = number_of_steps(model, steps, budget)
    best, least = Plan.of(model, times, []), np.inf
    for turn in range(rounds + 1):

        def tell(done: int, total: int, turn: int = turn) -> None:
            if progress is not None:
                progress(total * turn + done, total * (rounds + 1))

        under = cache(partial(makers.under, best)) if turn else lambda: makers.run
        found = slopes(f"turn {turn}", makers.run, under, best, columns, aims, longest, batch, tell)
        found = found * scale[:, None]  # in double: sums of thousands of cells follow
        cells = found.reshape(*found.shape[:3], -1)
        effects = Effects([(place,) for place in columns], cells, times, costs, lines)
        groups = _groups(columns, model.cfg.n_layers)
        tried = []
        if aim == "good":  # few samples can't judge how good plans are, so a coarse one is taken
            groups = [groups[min(1, len(groups) - 1)]]
        elif not turn:
            kept = [even_steps(steps, number, power) for power in POWERS]
            tried = [whole_steps(model, times, computed, lines) for computed in kept]
        for together in groups:
            search = Search(effects.together(together), best.cells)
            search.compose(budget)
            search.exchange(budget, EXCHANGES)
            tried.append(Plan.of(model, times, search.cells, lines=search.lines))
        if aim == "good":
            best = tried[-1]
            continue
        tried = [plan for plan in tried if plan.macs <= budget]
        errors = [moved[0].sum() for moved in judges.moved(tried)]
        errors = np.nan_to_num(errors, nan=np.inf)  # along lines a run may leave the numbers
        if min(errors, default=np.inf) >= least:
            break
        best, least = tried[int(np.argmin(errors))], min(errors)
    best = replace(best, about=about)
    return _measured(model, best, scheduler, items, seed + items, resamples, batch)


@measured
def check_plan(
    model: HookedDiT,
    plan: Plan,
    *,
    items: int = 64,
    seed: int = OTHER_SAMPLES,
    resamples: int = 1000,
    batch: int | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Plan:
    """A plan with its figures measured anew: by running it, with the settings it was made with.

    Args:
        model: the opened model.
        plan: of `reuse_plan`.
        items: samples.
        seed: of the samples; the plan must not have been made from them.
        resamples: of the items.
        batch: images that go through the model at once; None is all.
        store: a folder in which the finished pieces are kept.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        Plan: the same, with other figures in `about`.

    Raises:
        InvalidValue: for a plan of another model, one without the settings of `reuse_plan`, or
            samples that it was made from.
    """
    del store, engine  # `measured` sees to them
    plan.require_model(model)
    require_settings(plan)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    require_other_samples(plan, arguments.seed("seed", seed), items)
    plan = recounted(model, plan)
    return _measured(model, plan, plan.about["sampler"], items, seed, resamples, batch)


def recounted(model: HookedDiT, plan: Plan) -> Plan:
    """The plan with the cost that this model has under it, whatever its file says.

    Args:
        model: that it is for.
        plan: of `reuse_plan`.
    """
    return replace(plan, macs=Costs.of(model).share(plan.cells, plan.steps))


def require_settings(plan: Plan) -> None:
    """Raise InvalidValue for a plan that does not say how it was made."""
    wanted = ("steps", "guidance", "sampler", "eta", "cut", "seed", "items", "longest")
    absent = [name for name in wanted if name not in plan.about]
    if absent:
        raise InvalidValue(
            f"The plan does not say with which {absent[0]} it was made; expected one of "
            "dit_lens.experiments.reuse_plan."
        )


def require_other_samples(plan: Plan, seed: int, items: int) -> None:
    """Raise InvalidValue for samples that a plan was made from, chosen by or measured on.

    Args:
        plan: of `reuse_plan`; another one is made from none.
        seed: of the first sample.
        items: samples.
    """
    first, many = plan.about.get("seed"), plan.about.get("items")
    if not (isinstance(first, int) and isinstance(many, int)):
        return
    if first < seed + items and seed < first + 3 * many:
        raise InvalidValue(
            f"seed={seed} gives samples that a plan was made from or chosen by; expected "
            f"another, such as seed={first + 3 * many}."
        )


def _measured(
    model: HookedDiT,
    plan: Plan,
    scheduler: Any,
    items: int,
    seed: int,
    resamples: int,
    batch: int | None,
) -> Plan:
    """The plan with what it, and one that holds whole steps evenly, do to these samples."""
    about = dict(plan.about)
    number = max(1, round(plan.macs * plan.steps))
    even = whole_steps(model, plan.timesteps, even_steps(plan.steps, number))
    settings = (about["steps"], about["guidance"], scheduler, about["eta"])
    name, labels = "what it is measured on", about.get("labels")
    samples = Samples(name, model, items, seed, settings, about["cut"], resamples, labels, batch)
    about["even_macs"] = even.macs
    both = samples.moved([plan, even])
    enough()
    for what, drawn in zip(("effect", "even"), both, strict=True):
        for b, band in enumerate(samples.bands.names):
            about[f"{what}_{band}"] = float(drawn[0, b])
            about[f"{what}_{band}_interval"] = log_interval(drawn[:, b], items).tolist()
    return replace(plan, about=about)


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
    half, at = plan.steps // 2, Counter(step for *_, step in plan.cells)
    whole = ""
    if set(at.values()) == {sum(map(len, plan.parts))}:
        computed = ", ".join(str(step) for step in range(plan.steps) if step not in at)
        whole = f" It holds whole steps, and computes {computed}."
    early = sum(step < half for *_, step in plan.cells) / max(1, len(plan.cells))
    return (
        f"The plan holds {len(plan.cells)} cells, {early:.0%} of them in the first half of the "
        f"steps, and leaves {plan.macs:.1%} of the multiply-accumulates; on samples that it was "
        f"not made from it moves the finished image by {effects} (1: a stranger's distance). "
        f"Whole steps held evenly, {about['even_macs']:.1%} left, move the same samples by {even}."
        f"{whole}"
    ).replace("%", " %")


def _cheapest(costs: Costs, steps: int, longest: int) -> float:
    """The share that is left with every cell computed once in `longest` + 1 steps."""
    held = [s for s in range(steps) if s % (longest + 1)]
    return costs.share([(i, part, s) for i, part in costs.parts for s in held], steps)


def _groups(columns: Sequence[tuple[int, str]], n_layers: int) -> list[list[list[int]]]:
    """Which columns are held together, by index, from coarse to fine: all; the parts of all layers;
    those of a quarter of the layers; none.
    """
    keys: list[list[Any]] = [
        [None for _ in columns],
        [part for _, part in columns],
        [(part, QUARTERS * layer // n_layers) for layer, part in columns],
        list(columns),
    ]
    found: list[list[list[int]]] = []
    for key in keys:
        groups = [[i for i, k in enumerate(key) if k == each] for each in dict.fromkeys(key)]
        if groups not in found:
            found.append(groups)
    return found


class Samples:
    """A run, and how far it is moved by plans.

    Args:
        name: of the samples, for the pieces.
        model: the opened model.
        items: samples.
        seed: of them.
        settings: of the run: steps, guidance, scheduler, eta.
        cut: between low and high.
        resamples: of the items.
        labels: of the items, as for `item_labels`.
        batch: images at once.
    """

    def __init__(
        self,
        name: str,
        model: HookedDiT,
        items: int,
        seed: int,
        settings: tuple[Any, ...],
        cut: float,
        resamples: int = 1,
        labels: Labels | None = None,
        batch: int | None = None,
    ) -> None:
        self.labels, self.seed, self.settings = item_labels(model, items, labels), seed, settings
        self.model, self.batch, self.name, self.tried = model, batch, name, 0
        self.run = kept_run(name, self._sampled, model, settings[2])
        self.bands = Bands.radial(model.cfg.pixels, cut=cut)
        self.spread = Spread(self.run, self.bands, draws(items, resamples, seed))

    def _sampled(self) -> Run:
        steps, guidance, scheduler, eta = self.settings
        options = {"scheduler": scheduler, "eta": eta, "batch": self.batch}
        return sample(self.model, self.labels, self.seed, steps, guidance, **options)

    def under(self, plan: Plan) -> Run:
        """The same samples under a plan."""
        with reuse(self.model, plan):
            return self._sampled()

    def moved(self, plans: Sequence[Plan]) -> list[Array]:
        """E_b under each of some plans, [1 + resample, band]."""

        def finished(plan: Plan) -> Tensor:
            return self.under(plan).latents[-1]

        first, self.tried = self.tried, self.tried + len(plans)
        made = {
            f"{self.name}, plan {first + i}": partial(finished, plan)
            for i, plan in enumerate(plans)
        }
        return [self.effect(latents) for latents in kept_latents(made, self.run)]

    def effect(self, finished: Tensor) -> Array:
        """E_b of finished latents, [1 + resample, band]."""
        apart = (finished - self.run.latents[-1]).double()
        found: Array = self.spread.relative(energy(apart, self.bands)[None])
        return found[:, 0]
