"""Where a fault arises: patches both ways between good and bad runs, over layers and steps, from
coarse to fine.

What a stack of layers adds to the stream in a window of steps is taken from the good run and put
into the bad one (*repair*: how much of the fault goes), and from the bad one into the good one
(*create*: how much of it comes). The effect of a place is the mean of both, 1 for all of the fault.
Near twins also differ by noise, so from theirs the *floor* is taken off: what a patch from one good
run into another does.

Where nothing but the weights tells good from bad, several layers can be to blame together: each by
itself makes the fault, and putting one right does not take it away. So while the layers found so
far make for less than `ENOUGH` of it, the one that adds most to them is looked for in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...measures import Array
from ...measures.bootstrap import FEWEST_PAIRS, draws, simultaneous
from ...measures.estimate import Estimate
from ...patching.lanes import Lanes
from ...patching.patch import Patch, Planned, joined, plan
from ...sampling.run import Run
from .chances import Spent
from .fault import Fault, Images
from .pairs import Pairs

BLAME = 0.5
"""A layer is to blame if its own patch makes for more of the fault than this, surely."""
NEARLY = 0.98
"""So much of what all layers do at all steps is nearly all."""
FEW = 3
"""So many pairs are looked at where many places are compared."""
FINALISTS = 5
ENOUGH = 0.9
"""Layers that together make for this share of the fault are all that are to blame."""
ADDS = 0.2
"""A layer is to blame with others if it adds this much to them, surely."""
MOST = 4
"""So many layers are blamed together at most."""


class Place(NamedTuple):
    """A stack of layers in a window of steps, or a part of one layer.

    Attributes:
        layer: the first.
        depth: how many.
        window: of steps.
        site: "block", or a hook point of the layer.
        heads: only these.
        tokens: only these.
        beside: whole layers that are patched as well.
    """

    layer: int
    depth: int
    window: range
    site: str = "block"
    heads: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    beside: tuple[int, ...] = ()

    def planned(self, run: Run) -> Planned:
        """The patch that is made there, in a run."""
        heads = None if self.heads is None else list(self.heads)
        tokens = None if self.tokens is None else list(self.tokens)
        own = Patch(
            self.site, self.layer, self.window, heads, tokens, depth=self.depth, kind="swap"
        )
        also = [Patch("block", layer, self.window, kind="swap") for layer in self.beside]
        model, steps, items = run.model, run.settings.steps, len(run.labels)
        return joined([plan(patch, model, steps, items) for patch in (own, *also)])

    @property
    def layers(self) -> range:
        """Which layers."""
        return range(self.layer, self.layer + self.depth)


@dataclass
class Prober:
    """Patches between pairs, and what they do to the fault.

    Attributes:
        pairs: bad and good runs.
        fault: the score.
        images: of latents.
        spent: the account.
        batch: images that run at once.
        patches: how many single patches of a pair were run.
    """

    pairs: Pairs
    fault: Fault
    images: Images
    spent: Spent
    batch: int
    patches: int = field(default=0)

    def repair(self, places: Sequence[Place], pairs: Pairs | None = None) -> Array:
        """How much of the fault goes with the good run's put into the bad one, [place, pair]."""
        p = pairs or self.pairs
        found = self._run(p.good, p.bad, places)
        return self._measured(found, p.bad, p.good)

    def create(self, places: Sequence[Place], pairs: Pairs | None = None) -> Array:
        """How much of the fault comes with the bad run's put into the good one."""
        p = pairs or self.pairs
        found = self._run(p.bad, p.good, places)
        return self._measured(found, p.good, p.bad)

    def floor(self, places: Sequence[Place], pairs: Pairs | None = None) -> Array:
        """How much of it comes where another good run's is put into a good one; 0 for runs that
        share all noise, where nothing else differs.
        """
        p = pairs or self.pairs
        if p.matched or p.n < 2:
            return np.zeros((len(places), p.n))
        other = p.good.select([(i + 1) % p.n for i in range(p.n)])
        found = self._run(other, p.good, places)
        scores = np.stack([self.fault.scores(self.images(x)) for x in found])
        bad, good = (self.fault.scores(self.images(r.latents[-1])) for r in (p.bad, p.good))
        return np.clip((scores - good) / _least(bad - good), 0, 1)

    def both(self, places: Sequence[Place], pairs: Pairs | None = None) -> Array:
        """The effect of each place, without the floor taken off."""
        return (self.repair(places, pairs) + self.create(places, pairs)) / 2

    def _measured(self, found: Tensor, start: Run, end: Run) -> Array:
        """How far patched runs went from `start` to `end`: in the score, and, where nothing but the
        model differs, in the image too, the mean of both.
        """
        s0, s1 = (self.fault.scores(self.images(r.latents[-1])) for r in (start, end))
        scores = np.stack([self.fault.scores(self.images(x)) for x in found])
        moved = np.clip((scores - s0) / _signed(s1 - s0), -1, 1)
        if not self.pairs.matched:
            return moved
        a, b = (self.fault.part(self.images(r.latents[-1])) for r in (start, end))
        apart = (a - b).square().flatten(1).sum(1).double().cpu().numpy()
        left = np.stack(
            [
                (self.fault.part(self.images(x)) - b).square().flatten(1).sum(1).cpu().numpy()
                for x in found
            ]
        )
        # rounding is what little is left where nothing can be seen
        return (moved + np.clip(1 - left / np.maximum(apart, 1e-12), -1, 1)) / 2

    def _run(self, source: Run, target: Run, places: Sequence[Place]) -> Tensor:
        lanes = Lanes(source, target, self.batch)
        model, steps = target.model, target.settings.steps
        found = lanes.run([place.planned(target) for place in places], lambda _: None)
        self.patches += len(places) * len(target.labels)
        self.spent.add(lanes.blocks / (model.cfg.n_layers * steps * lanes.passes))
        return found


def _least(x: Array) -> Array:
    return np.maximum(x, 1e-9)


def _signed(x: Array) -> Array:
    return np.where(np.abs(x) < 1e-9, 1e-9, x)


@dataclass
class Found:
    """What the patches say.

    Attributes:
        window: the steps; None where no window takes the fault away.
        whole: the effect of all layers there.
        cells: every place that was looked at, with its mean effect.
        layers: single layers that were measured in full, the largest effect first.
        effects: theirs, with intervals for all at once.
        blamed: those that are to blame.
        together: the effect of those, where there are several.
    """

    window: range | None
    whole: float
    cells: list[tuple[Place, float]]
    layers: list[int]
    effects: list[Estimate]
    blamed: list[int]
    together: Estimate | None = None


def locate(prober: Prober) -> Found:
    """Where the fault arises.

    Args:
        prober: of the pairs.
    """
    pairs, n = prober.pairs, prober.pairs.bad.model.cfg.n_layers
    few = pairs.select(range(min(FEW, pairs.n)))
    cells: list[tuple[Place, float]] = []
    window, whole = (_matched_window if pairs.matched else _coarse_window)(prober, few, n, cells)
    if window is None:
        return Found(None, whole, cells, [], [], [])
    singles = _layers(prober, few, n, window, cells)
    finalists = sorted(singles, key=lambda layer: -singles[layer])[:FINALISTS]
    places = [Place(layer, 1, window) for layer in finalists]
    values = prober.both(places) - prober.floor(places)
    effects = estimates(values)
    order = sorted(range(len(finalists)), key=lambda i: -effects[i].value)
    layers, effects = [finalists[i] for i in order], [effects[i] for i in order]
    values = values[order]
    if pairs.matched:
        blamed, together = _together(prober, few, n, window, layers[0], cells)
        return Found(window, whole, cells, layers, effects, blamed, together)
    sure = [e.value > BLAME and not e.low <= BLAME / 2 for e in effects]
    blamed = []
    for i, layer in enumerate(layers):
        # a layer that another one does better than, pair by pair, only hands on
        beaten = (values[0] - values[i] > 0).mean() > 0.5 if i else False
        if sure[i] and not beaten:
            blamed.append(layer)
    return Found(window, whole, cells, layers, effects, blamed)


def _together(
    prober: Prober,
    few: Pairs,
    n: int,
    window: range,
    first: int,
    cells: list[tuple[Place, float]],
) -> tuple[list[int], Estimate | None]:
    """The layers to blame, from the one of the largest effect on, and their effect together.

    Whether they are all is asked of all steps, where putting right what is wrong leaves nothing: in
    the window, which nearly all of the fault comes from, other layers mend a part of the rest.
    """
    pairs = prober.pairs
    every = range(pairs.since, pairs.bad.settings.steps)

    def effect(layers: Sequence[int], steps: range = every) -> Array:
        return prober.both([_all_of(layers, steps)])[0]

    blamed = [first]
    values = effect(blamed)
    while values.mean() < ENOUGH and len(blamed) < MOST:
        more = _layers(prober, few, n, window, cells, tuple(blamed))
        best = max((layer for layer in more if layer not in blamed), key=more.__getitem__)
        both = effect([*blamed, best])
        if not _adds(both - values):
            break
        blamed, values = [*blamed, best], both
    if len(blamed) > 2:  # the first may only have handed on what the others do
        rests = [[layer for layer in blamed if layer != one] for one in blamed]
        blamed = [
            one for one, rest in zip(blamed, rests, strict=True) if _adds(values - effect(rest))
        ]
    if not blamed:
        return [], None
    found = estimates(effect(blamed, window)[None])[0]
    if not (found.value > BLAME and found.low > BLAME / 2):
        return [], None
    return blamed, found if len(blamed) > 1 else None


def _adds(gains: Array) -> bool:
    """Whether what a layer adds, by pair, is enough to blame it."""
    gain = estimates(gains[None])[0]
    return gain.value > ADDS and gain.low > ADDS / 2


def _all_of(layers: Sequence[int], window: range) -> Place:
    return Place(layers[0], 1, window, beside=tuple(layers[1:]))


def estimates(values: Array) -> list[Estimate]:
    """Means over pairs [place, pair] with intervals for all places at once; of fewer than 8 pairs
    the interval is the range of the pairs.

    Args:
        values: the effects.
    """
    n = values.shape[1]
    mean = values.mean(1)
    if n >= FEWEST_PAIRS:
        bounds = simultaneous(draws(n) @ values.T / n, n)
    else:
        bounds = np.stack([values.min(1), values.max(1)], -1)
    return [Estimate.of(m, b) for m, b in zip(mean, bounds, strict=True)]


def _matched_window(
    prober: Prober, few: Pairs, n: int, cells: list[tuple[Place, float]]
) -> tuple[range | None, float]:
    """By bisection: the latest beginning and the earliest end of a window in which all layers of
    the good run take nearly all of the fault away.
    """
    steps = few.bad.settings.steps

    def effect(first: int, stop: int) -> float:
        place = Place(0, n, range(first, stop))
        value = float(prober.repair([place], few).mean())
        cells.append((place, value))
        return value

    whole = effect(few.since, steps)
    if whole < BLAME:
        return None, whole
    wanted = NEARLY * whole
    low, high = few.since, steps - 1  # the window can begin at `low`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if effect(middle, steps) >= wanted else (low, middle - 1)
    first, (low, high) = low, (low + 1, steps)  # it can end at `high`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if effect(first, middle) >= wanted else (middle + 1, high)
    return range(first, high), whole


def _coarse_window(
    prober: Prober, few: Pairs, n: int, cells: list[tuple[Place, float]]
) -> tuple[range | None, float]:
    """The one of a few windows, from where the runs part on, in which some stack of layers has the
    largest effect above the floor.
    """
    windows, stacks, values = coarse(prober, few, n)
    places = [Place(a, d, w) for w in windows for a, d in stacks]
    flat = values.flatten()
    cells.extend(zip(places, flat.tolist(), strict=True))
    best = int(flat.argmax())
    if flat[best] < BLAME:
        return None, float(flat[best])
    return places[best].window, float(flat[best])


def coarse(prober: Prober, few: Pairs, n: int) -> tuple[list[range], list[tuple[int, int]], Array]:
    """The effect, above the floor, of all layers and of each quarter of them in each quarter of the
    steps that are left, [window, stack]; with the windows and stacks.

    Args:
        prober: of the pairs.
        few: some of them.
        n: layers of the model.
    """
    steps, since = few.bad.settings.steps, few.since
    many = max(1, min(4, steps - since))
    edges = [since + (steps - since) * i // many for i in range(many + 1)]
    windows = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    stacks = [(0, n), *_split(0, n, 4)]
    places = [Place(a, d, w) for w in windows for a, d in stacks]
    values = (prober.both(places, few) - prober.floor(places, few)).mean(1)
    return windows, stacks, values.reshape(len(windows), len(stacks))


def _split(first: int, depth: int, into: int) -> list[tuple[int, int]]:
    into = min(into, depth)
    edges = [first + depth * i // into for i in range(into + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _layers(
    prober: Prober,
    few: Pairs,
    n: int,
    window: range,
    cells: list[tuple[Place, float]],
    beside: tuple[int, ...] = (),
) -> dict[int, float]:
    """Single layers with their effects, or what they add to layers that are patched beside them,
    found by splitting the stacks that have the most.
    """
    stacks = _split(0, n, 4)
    singles: dict[int, float] = {}
    less = prober.both([_all_of(beside, window)], few).mean() if beside else 0.0
    while stacks:
        places = [Place(a, d, window, beside=beside) for a, d in stacks]
        values = prober.both(places, few).mean(1) - less
        if not beside:
            cells.extend(zip(places, values.tolist(), strict=True))
        best = max([*values.tolist(), *singles.values()])
        order = np.argsort(-values)
        kept = [int(i) for i in order[:3] if values[i] >= best / 2]
        singles |= {places[i].layer: float(v) for i, v in enumerate(values) if places[i].depth == 1}
        stacks = [part for i in kept if places[i].depth > 1 for part in _split(*stacks[i], 2)]
    return singles
