"""Every fault of many samples: which steps and layers answer for faults of structure, which for
those of texture.

Each faulty image is looked at as `diagnose` looks at one, but coarsely: by which step the fault is
decided, and which quarter of the layers, in which quarter of the steps that are left, carries it
between the bad run and near twins. Then the kinds of faults are compared. The claim that is tested:
a wrong structure arises early in the layers and in the run, a wrong texture late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from ... import arguments
from ...errors import InvalidValue
from ...groundtruth import portraits
from ...hooks.hold import require_parts
from ...measures import Array
from ...measures.bootstrap import FEWEST_PAIRS, draws, interval
from ...measures.estimate import Estimate
from ...measures.proportion import proportion
from ...model.hooked import HookedDiT
from ...pieces import Arrays, Engine, Piece, enough, measured, results
from ...sampling.kept import arrays_of, run_of
from ...sampling.loop import prepared
from ...sampling.run import Run
from ...sampling.sample import sample
from ...sampling.schedulers import default_name
from ...sampling.settings import checked_settings
from .chances import Spent, chances, spread_over
from .fault import AT, DIGITS, Given, Images, check_fault, made, names_of
from .pairs import twins
from .prober import Prober
from .where import coarse

STRUCTURE, TEXTURE = "structure", "texture"
LARGE = ("background", "skin", "hair", "hair_color", "clothing", "clothing_color")
"""The factors of a portrait that fill many pixels: their faults are those of structure. The others
(eyes, mouth, glasses, beard or hat, and a hat's colour) are small."""
CLONES, RELEASES, PAIRS = 6, 8, 6
AT_ONCE = 100


class Kind(NamedTuple):
    """A fault that is looked for, its name, and of which kind it is."""

    kind: str
    name: str
    fault: Given


@dataclass(frozen=True)
class Faulty:
    """One fault of one image: its item among the samples, and where its run is: in which hundred,
    and at which place of those that are kept.
    """

    what: Kind
    item: int
    hundred: int
    place: int


@measured
def diagnose_all(
    model: HookedDiT,
    samples: int = 1000,
    faults: Mapping[str, Given] | None = None,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 1.0,
    most: int = 12,
    at: float = AT,
    seed: int = 0,
    batch: int = 32,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> xr.Dataset:
    """By which step faults are decided, and which layers carry them, over many faulty images.

    Args:
        model: the opened model.
        samples: images, the classes in turn.
        faults: by kind, each as `diagnose` takes it, but a mask or band; by default for `digits`
            misread images, of the kind "structure", and for `portraits` every illegal part, the
            large ones "structure" and the small ones "texture".
        steps: of denoising.
        guidance: strength of classifier-free guidance.
        scheduler: as for `dit_lens.sample`.
        eta: as for `dit_lens.sample`.
        most: faults of a kind that are looked at, the first ones.
        at: this score and more is a fault.
        seed: of the samples and all noise.
        batch: images that go through the model at once.
        progress: called with how much is done, and how much there is.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: for each fault its `kind`, `name`, `item`, `decided` (step), `effect` [fault,
            window, stack], `depth` and `when` (the effect's mean layer and step, as shares); for
            each kind their means with `_interval`; attrs["sentence"].

    Raises:
        InvalidValue: for faults that the model's images have no reader for.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> def dark(images): return 1 - images.mean((1, 2, 3))
    >>> diagnose_all(model, 4, {"dark": dark}, steps=4, most=1).sizes["kind"]
    1
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    require_parts(model.names)
    samples, most = arguments.whole("samples", samples, 1), arguments.whole("most", most, 1)
    steps = arguments.whole("steps", steps, 4)
    seed, batch = arguments.seed("seed", seed), arguments.whole("batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    at = arguments.number("at", at)
    if faults is not None:
        arguments.instance("faults", faults, Mapping, "faults by kind, or None")
        for fault in faults.values():
            if isinstance(fault, (torch.Tensor, tuple)):
                raise InvalidValue(
                    "A mask or band tells the fault of one image; expected functions or names, "
                    "which can judge all."
                )
            check_fault(fault, model, at)
    elif not names_of(model):
        raise InvalidValue(
            "There is no fault by name for this model; expected faults={'structure': a function of "
            "images, ...}."
        )
    name = default_name(model.scheduler) if scheduler is None else scheduler
    prepared(model, checked_settings(steps, guidance, "all", name, eta))

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    images, spent, kinds = Images(model, batch), Spent(), _kinds(model, faults)

    # The faulty ones.
    def samples_from(first: int) -> Arrays:
        n = min(AT_ONCE, samples - first)
        labels = [(first + i) % model.conditions.n for i in range(n)]
        run = sample(model, labels, seed + first, steps, guidance, scheduler, eta, batch=batch)
        return _faulty(run, images, kinds, at, most)

    firsts = range(0, samples, AT_ONCE)
    hundreds = results(
        [Piece(f"samples from {first}", partial(samples_from, first)) for first in firsts],
        lambda number: told(min(samples, firsts[number] + AT_ONCE), samples + 10 * most),
    )
    spent.add(samples)
    counts, found = {kind.kind: 0 for kind in kinds}, list[Faulty]()
    for hundred, seen in enumerate(hundreds):
        kept = seen["kept"].tolist()
        for number, what in enumerate(kinds):
            items = seen["item"][seen["fault"] == number].tolist()
            counts[what.kind] += len(items)
            room = most - sum(each.what.kind == what.kind for each in found)
            found += [
                Faulty(what, firsts[hundred] + i, hundred, kept.index(i)) for i in items[:room]
            ]
    if not found:
        raise InvalidValue(
            f"None of {samples} samples has such a fault; expected more samples, or another fault."
        )

    # Each of them.
    def looked_at(each: Faulty) -> Arrays:
        bad = run_of(hundreds[each.hundred], model, name).select([each.place])
        return _looked_at(bad, each.what.fault, at, images, seed, batch)

    pieces = [
        Piece(f"fault {number}", partial(looked_at, each)) for number, each in enumerate(found)
    ]
    rows = results(
        pieces,
        lambda number: told(samples + 10 * most * (number + 1) // len(found), samples + 10 * most),
    )
    enough()
    spent.add(sum(float(row["spent"]) for row in rows))
    return _dataset(model, found, rows, counts, samples, steps, spent)


def _kinds(model: HookedDiT, faults: Mapping[str, Given] | None) -> list[Kind]:
    """What is looked for."""
    if faults is not None:
        return [Kind(kind, kind, fault) for kind, fault in faults.items()]
    own = names_of(model)
    return [
        Kind(STRUCTURE if own is DIGITS or each in LARGE else TEXTURE, each, each)
        for each in (own if own is DIGITS else portraits.FACTORS)
    ]


def _faulty(run: Run, images: Images, kinds: Sequence[Kind], at: float, most: int) -> Arrays:
    """The items that have each fault, and the run of those that may be looked at."""
    shown, labels = images(run.finished), run.labels.tolist()
    faults, items, kept = list[int](), list[int](), set[int]()
    for number, (*_, fault) in enumerate(kinds):
        by_label = {label: made(fault, at, label, shown, shown) for label in set(labels)}
        bad = [
            i
            for i, label in enumerate(labels)
            if by_label[label].bad(by_label[label].scores(shown[i : i + 1]))[0]
        ]
        faults += [number] * len(bad)
        items += bad
        kept.update(bad[:most])
    found = {"fault": np.array(faults, int), "item": np.array(items, int)}
    found["kept"] = np.array(sorted(kept), int)
    return found | (arrays_of(run.select(sorted(kept))) if kept else {})


def _looked_at(run: Run, given: Given, at: float, images: Images, seed: int, batch: int) -> Arrays:
    """What is seen of one fault: the step by which it is `decided`; the `effect` [window, stack] of
    each of `windows` [window, (first, stop)] and `stacks` [stack, (first, depth)], of which there
    are none without a good twin; and the images `spent`.
    """
    steps, spent, shown = run.settings.steps, Spent(), images(run.finished)
    fault = made(given, at, int(run.labels[0]), shown, shown)
    seen = chances(run, fault, images, spread_over(steps, RELEASES), CLONES, seed, spent, batch)
    pairs = twins(run, fault, images, seen, PAIRS, seed, spent)
    windows, stacks, values = list[range](), list[tuple[int, int]](), np.zeros((0, 0))
    if pairs is not None:
        windows, (_, *stacks), values = coarse(Prober(pairs.few, fault, images, spent, batch))
    return {
        "decided": np.array(float(steps if seen.decided is None else seen.decided)),
        "effect": values[:, 1:],  # all layers come first
        "windows": np.array([(w.start, w.stop) for w in windows]).reshape(-1, 2),
        "stacks": np.array(stacks).reshape(-1, 2),
        "spent": np.array(spent.images),
    }


def _dataset(
    model: HookedDiT,
    faulty: Sequence[Faulty],
    rows: Sequence[Arrays],
    counts: Mapping[str, int],
    samples: int,
    steps: int,
    spent: Spent,
) -> xr.Dataset:
    n_layers = model.cfg.n_layers
    shape = next((row["effect"].shape for row in rows if row["effect"].size), (1, 1))
    effect = np.full((len(rows), *shape), np.nan)
    depth, when = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        if row["effect"].shape != shape:
            continue
        effect[i] = row["effect"]
        weight = np.clip(row["effect"], 0, None)
        if weight.sum() > 0:
            middle = (row["stacks"] @ (1, 0.5) - 0.5) / (n_layers - 1)
            centre = (row["windows"].mean(1) - 0.5) / (steps - 1)
            depth[i] = float((weight.sum(0) * middle).sum() / weight.sum())
            when[i] = float((weight.sum(1) * centre).sum() / weight.sum())
    of_kind = np.array([each.what.kind for each in faulty])
    kinds = list(dict.fromkeys(of_kind.tolist()))
    result = xr.Dataset(
        {
            "decided": ("fault", [float(row["decided"]) for row in rows]),
            "effect": (("fault", "window", "stack"), effect),
            "depth": ("fault", depth),
            "when": ("fault", when),
        },
        coords={
            "fault": np.arange(len(rows)),
            "kind_of": ("fault", of_kind),
            "name": ("fault", [each.what.name for each in faulty]),
            "item": ("fault", [each.item for each in faulty]),
            "kind": kinds,
            "window": np.arange(shape[0]),
            "stack": np.arange(shape[1]),
            "bound": ["low", "high"],
        },
    )
    said = []
    for name in ("decided", "depth", "when"):
        means, ends = [], []
        for kind in kinds:
            e = _mean(result[name].values[of_kind == kind])
            means.append(e.value)
            ends.append([e.low, e.high])
        result[f"mean_{name}"] = ("kind", means)
        result[f"mean_{name}_interval"] = (("kind", "bound"), ends)
    for k, kind in enumerate(kinds):
        share = proportion(counts[kind], samples)
        one = {
            name: Estimate.of(
                result[f"mean_{name}"].values[k], result[f"mean_{name}_interval"].values[k]
            )
            for name in ("decided", "depth", "when")
        }
        alone = sum(not r["effect"].size for r, of in zip(rows, of_kind, strict=True) if of == kind)
        said.append(
            f"{kind.capitalize()}: {counts[kind]} faults in {samples} samples ({share:.3f} an "
            f"image), {int((of_kind == kind).sum())} looked at. Decided by step "
            f"{one['decided']:.1f} of {steps} on average; the layers that carry them lie at "
            f"{one['depth']:.2f} of the depth, the steps at {one['when']:.2f} of the run"
            + (f"; for {alone} no good twin was found." if alone else ".")
        )
    said.append(_claim(result, of_kind))
    said.append(f"Cost: {spent.images:.0f} images.")
    result.attrs |= {"sentence": "\n".join(said), "steps": steps, "samples": samples}
    result.attrs |= {"n_layers": n_layers, "images": spent.images}
    return result


def _mean(values: Array) -> Estimate:
    """A mean with its interval; NaN from fewer than 8."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    if len(values) < FEWEST_PAIRS:
        return Estimate(float(values.mean()), np.nan, np.nan)
    drawn = draws(len(values)) @ values / len(values)
    return Estimate.of(drawn[0], interval(drawn, len(values)))


def _difference(a: Array, b: Array) -> Estimate:
    """mean(b) - mean(a) with its interval."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(len(a), len(b)) < FEWEST_PAIRS:
        return Estimate(np.nan, np.nan, np.nan)
    drawn = draws(len(b), seed=1) @ b / len(b) - draws(len(a), seed=2) @ a / len(a)
    return Estimate.of(drawn[0], interval(drawn, min(len(a), len(b))))


def _claim(result: xr.Dataset, of_kind: Any) -> str:
    """Whether faults of texture arise later than those of structure, in layers and steps."""
    if not {STRUCTURE, TEXTURE} <= set(of_kind.tolist()):
        return (
            "Whether structure arises before texture is not tested: faults of one kind only were "
            "found."
        )
    words = []
    for name, what, unit, scale in (
        ("depth", "later layers", "of the depth", 1.0),
        ("decided", "later steps", "steps", 1.0),
    ):
        values = result[name].values * scale
        e = _difference(values[of_kind == STRUCTURE], values[of_kind == TEXTURE])
        if not np.isfinite(e.value):
            words.append(f"{what}: too few faults to tell")
            continue
        verdict = {1: "holds", -1: "does not hold, it is the other way round", 0: "can't be told"}
        words.append(f"{what}: {verdict[e.sign]} ({e:+.2f} {unit})")
    return f"That faults of texture arise later than those of structure: in {'; in '.join(words)}."
