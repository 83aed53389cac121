"""Ways to make a run cheaper, side by side at equal multiply-accumulates, on the same samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.bootstrap import FEWEST_PAIRS, interval
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..plans.plan import Plan
from ..plans.runner import reuse
from ..sampling.run import Run
from ..sampling.sample import sample
from .baselines import at_random, front_and_rear, pairs, similarity, uniform, unlike
from .reuse_plan import (
    OTHER_SAMPLES,
    Samples,
    recounted,
    require_other_samples,
    require_settings,
)
from .spread import log_interval

Judge = Callable[[Tensor, Tensor], Mapping[str, float]]
"""Figures by name of images [n, channel, height, width] in [0, 1] and the labels asked for."""
CALIBRATION = 16
"""Samples that the threshold of likeness is set on, at most."""
EARLY, LATE = "early pairs (L2C's structure)", "late pairs"
WAYS = (
    "plan",
    "similarity (SmoothCache)",
    "even, lines (TaylorSeer)",
    "even (FORA)",
    "front and rear (Delta-DiT)",
    "random",
    "fewer steps",
    EARLY,
    LATE,
)


@dataclass(frozen=True)
class Way:
    """A way to make a run cheaper.

    Attributes:
        macs: the share of multiply-accumulates that is left.
        steps: of the run.
        plan: that it is run under; None is none.
    """

    macs: float
    steps: int
    plan: Plan | None = None


def side_by_side(
    model: HookedDiT,
    plans: Sequence[Plan],
    *,
    items: int = 64,
    seed: int = OTHER_SAMPLES,
    judge: Judge | None = None,
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> xr.Dataset:
    """Plans beside published ways to spend as little: what each does to the finished image.

    At each plan's share of the multiply-accumulates: fewer steps, whole steps held evenly, the same
    along lines, parts held by likeness, rear and front layers, cells at random. The structure of
    the plan that was learned for DiT-XL/2 leaves four fifths at every budget, and so does the same
    in the last steps.

    diffusers' own caches are not among them: they need a transformer with `CacheMixin`, choose
    their steps while they run, and can't be held to a budget.

    Args:
        model: the opened model, with a scheduler.
        plans: of `reuse_plan`, made with the same settings.
        items: samples.
        seed: of the samples; the plans must not have been made from them.
        judge: gives further figures, such as label accuracy, of finished images and labels.
        resamples: of the items.
        progress: called with the runs done, and how many there are.

    Returns:
        xr.Dataset: on [budget, way]: `macs`, the share that is left; `time`, the share of the
            plain run's time (processor time on a CPU); `effect` [..., band] with `effect_interval`
            [..., bound], E_b of `cause_map`; `total` with `total_interval`, all bands together;
            `over_plan` with its interval: how many times the plan's total it is, paired by item;
            `late_over_early` [band] with its interval, how many times as much late pairs of steps
            move the image as early ones; `psnr` in dB with `psnr_interval`; and what `judge` gives,
            for the plain run under "plain_..." in attrs. attrs["sentence"] says what it comes to.

    Raises:
        InvalidValue: for plans of another model, of different settings, or without any.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> options = {"items": 8, "resamples": 50}
    >>> plan = dit_lens.experiments.reuse_plan(model, 0.7, steps=2, rounds=0, **options)
    >>> found = side_by_side(model, [plan], **options)
    >>> found.sizes["budget"], found.sizes["way"]
    (1, 9)
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    plans = arguments.listed("plans", plans, "plans of reuse_plan")
    for plan in plans:
        arguments.instance("plans", plan, Plan, "plans of reuse_plan")
        plan.require_model(model)
        require_settings(plan)
    wanted = ("steps", "guidance", "sampler", "eta", "cut", "labels")
    first = {name: plans[0].about.get(name) for name in wanted}
    for plan in plans:
        for name in wanted:
            if (other := plan.about.get(name)) != first[name]:
                raise InvalidValue(
                    f"The plans were made with {name}={first[name]!r} and {other!r}; "
                    "expected one setting, to be run on the same samples."
                )
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    seed, resamples = arguments.seed("seed", seed), arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "judge", judge, "judge(images, labels)")
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    settings = (first["steps"], first["guidance"], first["sampler"], first["eta"])
    for plan in plans:
        require_other_samples(plan, seed, items)
    plans = [recounted(model, plan) for plan in plans]

    cut, labels = first["cut"], first["labels"]
    samples = Samples("samples", model, items, seed, settings, cut, resamples, labels)
    shown = min(CALIBRATION, *(plan.about["items"] for plan in plans))
    of_plan = plans[0].about["seed"]
    calibration = Samples("calibration", model, shown, of_plan, settings, cut, labels=labels).run
    apart = unlike(calibration, max(plan.about["longest"] for plan in plans))
    total = len(plans) * len(WAYS) + 1

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    plain, seconds = _timed(samples, settings, None)
    tell(1)
    rows: list[list[dict[str, Any]]] = []
    for plan in plans:
        rows.append([])
        for name, way in zip(WAYS, _ways(model, plan, calibration, apart), strict=True):
            if len(rows) > 1 and name in (EARLY, LATE):  # the same at every budget
                rows[-1].append(rows[0][WAYS.index(name)])
            else:
                found, took = _timed(samples, (way.steps, *settings[1:]), way.plan)
                rows[-1].append(_figures(samples, found, judge) | {"macs": way.macs})
                rows[-1][-1]["time"] = took / seconds
            tell(len(WAYS) * (len(rows) - 1) + len(rows[-1]) + 1)
    result = _dataset(samples, plans, rows)
    if judge is not None:
        own = judge(plain.images, plain.labels)
        result.attrs |= {f"plain_{name}": float(value) for name, value in own.items()}
    result.attrs |= {"items": items, "seed": seed, "seconds": seconds, "level": 0.95}
    result.attrs |= {name: value for name, value in first.items() if value is not None}
    result.attrs["sentence"] = "\n".join(sentences(result))
    return result


def _ways(
    model: HookedDiT, plan: Plan, calibration: Run, apart: Mapping[str, Array]
) -> Iterator[Way]:
    """The ways of WAYS, at a plan's share."""
    times, budget = list(plan.timesteps), plan.macs
    longest = plan.about["longest"]
    for each in (
        plan,
        similarity(calibration, budget, longest, apart),
        uniform(model, times, budget, lines=True),
        uniform(model, times, budget),
        front_and_rear(model, times, budget),
        at_random(model, times, budget),
    ):
        yield Way(each.macs, plan.steps, each)
    fewer = max(2, round(budget * plan.steps))
    yield Way(fewer / plan.steps, fewer)
    for late in (False, True):
        each = pairs(model, times, late)
        yield Way(each.macs, plan.steps, each)


def _timed(samples: Samples, settings: tuple[Any, ...], plan: Plan | None) -> tuple[Run, float]:
    """The samples run another way, and the seconds that it took."""
    model = samples.run.model
    on_cpu = model.device.type == "cpu"
    with nullcontext() if plan is None else reuse(model, plan):
        _wait(model.device)
        start = time.process_time() if on_cpu else time.perf_counter()
        found = sample(model, samples.labels, samples.seed, *settings)
        _wait(model.device)
        end = time.process_time() if on_cpu else time.perf_counter()
    return found, end - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _figures(samples: Samples, found: Run, judge: Judge | None) -> dict[str, Any]:
    """What a way does to the samples; statistics are [1 + resample, ...]."""
    effect = samples.effect(found.latents[-1])
    error = (found.images - samples.run.images).double().square().flatten(1).mean(1).cpu().numpy()
    with np.errstate(divide="ignore"):
        each = -10 * np.log10(error)
    figures = {"effect": effect, "total": effect.sum(1)}
    counts = samples.spread.counts
    figures["psnr"] = counts @ np.minimum(each, 200.0) / counts.sum(1)
    if judge is not None:
        figures["judged"] = judge(found.images, found.labels)
    return figures


def _dataset(
    samples: Samples, plans: Sequence[Plan], rows: Sequence[Sequence[Mapping[str, Any]]]
) -> xr.Dataset:
    items = len(samples.labels)

    def table(make: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]) -> Array:
        return np.array([[make(each, of_plan[0]) for each in of_plan] for of_plan in rows])

    def over(each: Mapping[str, Any], plan: Mapping[str, Any]) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: Array = np.where(plan["total"] > 0, each["total"] / plan["total"], np.nan)
        return ratio

    early, late = (rows[0][WAYS.index(way)]["effect"] for way in (EARLY, LATE))
    with np.errstate(divide="ignore", invalid="ignore"):
        late_over_early = late / early
    place, bound = ("budget", "way"), ("bound",)
    result = xr.Dataset(
        {
            "macs": (place, table(lambda each, _: each["macs"])),
            "time": (place, table(lambda each, _: each["time"])),
            "effect": ((*place, "band"), table(lambda each, _: each["effect"][0])),
            "effect_interval": (
                (*place, "band", *bound),
                table(lambda each, _: log_interval(each["effect"], items)),
            ),
            "total": (place, table(lambda each, _: each["total"][0])),
            "total_interval": (
                (*place, *bound),
                table(lambda each, _: log_interval(each["total"], items)),
            ),
            "over_plan": (place, table(lambda each, plan: over(each, plan)[0])),
            "over_plan_interval": (
                (*place, *bound),
                table(lambda each, plan: log_interval(over(each, plan), items)),
            ),
            "late_over_early": ("band", late_over_early[0]),
            "late_over_early_interval": (("band", *bound), log_interval(late_over_early, items)),
            "psnr": (place, table(lambda each, _: each["psnr"][0])),
            "psnr_interval": (
                (*place, *bound),
                table(lambda each, _: interval(each["psnr"], items)),
            ),
        },
        coords={
            "budget": [plan.macs for plan in plans],
            "way": list(WAYS),
            "band": list(samples.bands.names),
            "bound": ["low", "high"],
        },
    )
    for name in rows[0][0].get("judged", {}):
        values = [[float(each["judged"][name]) for each in of_plan] for of_plan in rows]
        result[name] = (place, np.array(values))
    return result


def sentences(result: xr.Dataset) -> list[str]:
    """For each budget: how the plan stands against the best of the others; and whether early steps
    need less precision than late ones.

    Args:
        result: of `side_by_side`.
    """
    found = []
    for i, budget in enumerate(result.budget.values):
        one = result.isel(budget=i)
        others = one.isel(way=slice(1, WAYS.index(EARLY)))  # of the same budget
        best = others.isel(way=int(np.argmin(others.total.values)))
        low, high = best.over_plan_interval.values
        verb = "more than" if low > 1 else "less than" if high < 1 else "not told apart from"
        found.append(
            f"At {budget:.1%} of the multiply-accumulates the best of the others is "
            f"{best.way.item()}, with an error of {best.total.item():.2g}, {verb} the plan's "
            f"{one.total.values[0]:.2g}: {best.over_plan.item():.2g} times [{low:.2g}, {high:.2g}]."
        )
    for b, band in enumerate(result.band.values):
        ratio = Estimate.of(result.late_over_early[b], result.late_over_early_interval[b])
        if ratio.known:
            holds = ratio.low > 1
            says = (
                "it holds here" if holds else "it does not hold here" if ratio.high < 1 else "open"
            )
            found.append(
                f"That early steps need less precision, in the {band} band: {says}; every second "
                f"step held in the last 40% moves the image {ratio:.2g} times as much as in the "
                "first 40%."
            )
    return [line.replace("%", " %") for line in found]
