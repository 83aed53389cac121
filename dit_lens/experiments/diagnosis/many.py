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
from typing import Any

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
from ...sampling.loop import prepared
from ...sampling.run import Run, sample
from ...sampling.schedulers import default_name
from ...sampling.settings import checked_settings
from .chances import Spent, chances, spread_over
from .fault import AT, DIGITS, Fault, Given, Images, check_fault, made, names_of
from .pairs import twins
from .prober import Prober
from .where import coarse

STRUCTURE, TEXTURE = "structure", "texture"
LARGE = ("background", "skin", "hair", "hair_color", "clothing", "clothing_color")
"""The factors of a portrait that fill many pixels: their faults are those of structure. The others
(eyes, mouth, glasses, beard or hat, and a hat's colour) are small."""
CLONES, RELEASES, PAIRS = 6, 8, 6
AT_ONCE = 100


@dataclass(frozen=True)
class Faulty:
    """One fault of one image: its item among the samples, its kind, its name."""

    item: int
    kind: str
    name: str


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

    images, spent = Images(model, batch), Spent()

    # The faulty ones.
    found: list[tuple[Faulty, Run, Fault]] = []
    counts: dict[str, int] = {}
    for first in range(0, samples, AT_ONCE):
        n = min(AT_ONCE, samples - first)
        labels = [(first + i) % (model.conditions.n) for i in range(n)]
        run = sample(model, labels, seed + first, steps, guidance, scheduler, eta, batch=batch)
        spent.add(n)
        for kind, (named, score), items in _faulty(run, images, faults, at):
            counts[kind] = counts.get(kind, 0) + len(items)
            room = most - sum(f.kind == kind for f, *_ in found)
            for i in items[:room]:
                found.append((Faulty(first + i, kind, named), run.select([i]), score(i)))
        told(first + n, samples + 10 * most)
    if not found:
        raise InvalidValue(
            f"None of {samples} samples has such a fault; expected more samples, or another fault."
        )

    # Each of them.
    rows = []
    for number, (what, bad, score_of) in enumerate(found):
        rows.append(_looked_at(what, bad, score_of, images, seed, batch, spent))
        told(samples + 10 * most * (number + 1) // len(found), samples + 10 * most)
    return _dataset(model, rows, counts, samples, steps, spent)


Named = tuple[str, Callable[[int], Fault]]


def _faulty(
    run: Run, images: Images, faults: Mapping[str, Given] | None, at: float
) -> list[tuple[str, Named, list[int]]]:
    """For each kind and fault, the items that have it."""
    shown, labels = images(run.latents[-1]), run.labels.tolist()
    if faults is None:
        own = names_of(run.model)
        given: list[tuple[str, str, Given]] = [
            (STRUCTURE if own is DIGITS or each in LARGE else TEXTURE, each, each)
            for each in (own if own is DIGITS else portraits.FACTORS)
        ]
    else:
        given = [(kind, kind, fault) for kind, fault in faults.items()]
    found: list[tuple[str, Named, list[int]]] = []
    for kind, name, fault in given:

        def score(i: int, *, fault: Given = fault) -> Fault:
            return made(fault, at, labels[i], shown[i : i + 1], shown)

        by_label = {label: score(labels.index(label)) for label in set(labels)}
        values = np.array(
            [by_label[labels[i]].scores(shown[i : i + 1])[0] for i in range(len(labels))]
        )
        items = np.flatnonzero(by_label[labels[0]].bad(values)).tolist()
        found.append((kind, (name, score), items))
    return found


@dataclass(frozen=True)
class Looked:
    """What was seen of one fault."""

    what: Faulty
    decided: float
    effect: Array | None  # [window, stack]
    windows: tuple[range, ...]
    stacks: tuple[tuple[int, int], ...]


def _looked_at(
    what: Faulty, run: Run, fault: Fault, images: Images, seed: int, batch: int, spent: Spent
) -> Looked:
    steps = run.settings.steps
    when = spread_over(steps, RELEASES)
    seen = chances(run, fault, images, when, CLONES, seed, spent, batch)
    decided = float(steps if seen.decided is None else seen.decided)
    pairs = twins(run, fault, images, seen, PAIRS, seed, spent)
    if pairs is None:
        return Looked(what, decided, None, (), ())
    windows, stacks, values = coarse(Prober(pairs.few, fault, images, spent, batch))
    return Looked(what, decided, values[:, 1:], tuple(windows), tuple(stacks[1:]))


def _dataset(
    model: HookedDiT,
    rows: Sequence[Looked],
    counts: Mapping[str, int],
    samples: int,
    steps: int,
    spent: Spent,
) -> xr.Dataset:
    n_layers = model.cfg.n_layers
    shape = next((r.effect.shape for r in rows if r.effect is not None), (1, 1))
    effect = np.full((len(rows), *shape), np.nan)
    depth, when = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        if row.effect is None or row.effect.shape != shape:
            continue
        effect[i] = row.effect
        weight = np.clip(row.effect, 0, None)
        if weight.sum() > 0:
            middle = np.array([a + (d - 1) / 2 for a, d in row.stacks]) / (n_layers - 1)
            centre = np.array([(w.start + w.stop - 1) / 2 for w in row.windows]) / (steps - 1)
            depth[i] = float((weight.sum(0) * middle).sum() / weight.sum())
            when[i] = float((weight.sum(1) * centre).sum() / weight.sum())
    kinds = list(dict.fromkeys(row.what.kind for row in rows))
    of_kind = np.array([row.what.kind for row in rows])
    result = xr.Dataset(
        {
            "decided": ("fault", [row.decided for row in rows]),
            "effect": (("fault", "window", "stack"), effect),
            "depth": ("fault", depth),
            "when": ("fault", when),
        },
        coords={
            "fault": np.arange(len(rows)),
            "kind_of": ("fault", of_kind),
            "name": ("fault", [row.what.name for row in rows]),
            "item": ("fault", [row.what.item for row in rows]),
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
        parts = sum(row.effect is None for row in rows if row.what.kind == kind)
        said.append(
            f"{kind.capitalize()}: {counts[kind]} faults in {samples} samples ({share:.3f} an "
            f"image), {int((of_kind == kind).sum())} looked at. Decided by step "
            f"{one['decided']:.1f} of {steps} on average; the layers that carry them lie at "
            f"{one['depth']:.2f} of the depth, the steps at {one['when']:.2f} of the run"
            + (f"; for {parts} no good twin was found." if parts else ".")
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
