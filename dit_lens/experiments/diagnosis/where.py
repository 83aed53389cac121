"""Where a fault arises: patches both ways between good and bad runs, over layers and steps, from
coarse to fine.

Where nothing but the weights tells good from bad, each layer is patched at all steps: putting right
what is wrong then leaves nothing of the fault. Several layers can be to blame together: each by
itself makes the fault, and putting one right does not take it away. So while those found so far
make for less than `ENOUGH` of it, the one that adds most to them is looked for in the same way. The
window is where all layers, and those to blame, do nearly all.

Near twins differ by noise, and layers hand on what noise did. There the window comes first, the one
in which a stack of layers does most, and a layer is blamed only if it does more than half, over
enough pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...measures import Array
from ...measures.estimate import Estimate
from .prober import BLAME, ENOUGH, Place, Prober, all_of, estimates, split

NEARLY = 0.98
"""So much of what a patch at all steps does is nearly all."""
ADDS = 0.1
"""A layer is to blame with others if it adds this much to them, surely."""
MOST = 4
"""So many layers are blamed together at most."""
FEWEST = 4
"""Between fewer pairs that differ by noise no layer is blamed: one can look to blame by chance."""
FINALISTS = 3
"""So many layers are measured in full; 2 more between near twins, which are less sure."""


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
    return _in_weights(prober) if prober.pairs.matched else _in_twins(prober)


# Where nothing but the weights tells good from bad.


def _in_weights(prober: Prober) -> Found:
    """Layers, then the window."""
    pairs, n = prober.pairs, prober.pairs.bad.model.cfg.n_layers
    every = range(pairs.since, pairs.bad.settings.steps)
    everything = Place(0, n, every)
    whole = float(prober.repair([everything], pairs.few).mean())
    cells = [(everything, whole)]
    if whole < BLAME:
        return Found(None, whole, cells, [], [], [])
    singles, seen = prober.layers(every)
    blamed = _together(prober, max(singles, key=singles.__getitem__), every)
    window, tried = _window(prober, everything)
    if blamed:  # in so few steps they may do less than all layers
        own, tried = _window(prober, all_of(blamed, every))
        window = range(min(window.start, own.start), max(window.stop, own.stop))
    order = sorted(singles, key=lambda layer: -singles[layer])
    finalists = list(dict.fromkeys([*blamed, *order]))[: max(FINALISTS, len(blamed))]
    effects = estimates(prober.both([Place(layer, 1, window) for layer in finalists]))
    ranked = sorted(zip(finalists, effects, strict=True), key=lambda pair: -pair[1].value)
    together = None
    if blamed:
        found = estimates(prober.both([all_of(blamed, window)]))[0]
        blamed = blamed if _surely(found, BLAME) else []
        together = found if len(blamed) > 1 else None
    layers, effects = [layer for layer, _ in ranked], [effect for _, effect in ranked]
    cells += [*seen, *((place, value) for place, value in tried if not place.beside)]
    return Found(window, whole, cells, layers, effects, blamed, together)


def _together(prober: Prober, first: int, every: range) -> list[int]:
    """The layers to blame, from the one of the largest effect on."""

    def effect(layers: Sequence[int]) -> Array:
        return prober.both([all_of(layers, every)])[0]

    def adds(more: Array, less: Array) -> bool:
        return _surely(estimates((more - less)[None])[0], ADDS)

    blamed = [first]
    values = effect(blamed)
    while values.mean() < ENOUGH and len(blamed) < MOST:
        more, _ = prober.layers(every, tuple(blamed))
        others = [layer for layer in more if layer not in blamed]
        if not others:  # the model has no other layers
            break
        best = max(others, key=more.__getitem__)
        both = effect([*blamed, best])
        if not adds(both, values):
            break
        blamed, values = [*blamed, best], both
    if len(blamed) > 1:  # the first may only have handed on what the others do
        rests = [[layer for layer in blamed if layer != one] for one in blamed]
        needed = [adds(values, effect(rest)) for rest in rests]
        blamed = [one for one, yes in zip(blamed, needed, strict=True) if yes]
    return blamed


def _surely(effect: Estimate, level: float) -> bool:
    """Whether it is more, and its interval not below half of it."""
    return effect.value > level and effect.low > level / 2


def _window(prober: Prober, place: Place) -> tuple[range, list[tuple[Place, float]]]:
    """By bisection: the latest beginning and the earliest end of a window in which a place of the
    good run takes nearly all of the fault away; and what was tried.
    """
    seen: list[tuple[Place, float]] = []

    def effect(first: int, stop: int) -> float:
        tried = place._replace(window=range(first, stop))
        value = float(prober.repair([tried], prober.pairs.few).mean())
        seen.append((tried, value))
        return value

    since, steps = place.window.start, place.window.stop
    wanted = NEARLY * effect(since, steps)
    low, high = since, steps - 1  # the window can begin at `low`
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if effect(middle, steps) >= wanted else (low, middle - 1)
    first, (low, high) = low, (low + 1, steps)  # it can end at `high`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if effect(first, middle) >= wanted else (middle + 1, high)
    return range(first, high), seen


# Between near twins.


def _in_twins(prober: Prober) -> Found:
    """The window, then layers."""
    window, whole, cells = _coarse_window(prober)
    if window is None:
        return Found(None, whole, cells, [], [], [])
    singles, seen = prober.layers(window)
    finalists = sorted(singles, key=lambda layer: -singles[layer])[: FINALISTS + 2]
    places = [Place(layer, 1, window) for layer in finalists]
    values = prober.both(places) - prober.floor(places)
    effects = estimates(values)
    order = sorted(range(len(finalists)), key=lambda i: -effects[i].value)
    layers, effects = [finalists[i] for i in order], [effects[i] for i in order]
    values = values[order]
    blamed = []
    for i, layer in enumerate(layers):
        # a layer that another one does better than, pair by pair, only hands on
        beaten = (values[0] - values[i] > 0).mean() > 0.5 if i else False
        if prober.pairs.n >= FEWEST and _surely(effects[i], BLAME) and not beaten:
            blamed.append(layer)
    return Found(window, whole, [*cells, *seen], layers, effects, blamed)


def _coarse_window(prober: Prober) -> tuple[range | None, float, list[tuple[Place, float]]]:
    """The one of a few windows, from where the runs part on, in which some stack of layers has the
    largest effect above the floor.
    """
    windows, stacks, values = coarse(prober)
    places = [Place(a, d, w) for w in windows for a, d in stacks]
    flat = values.flatten()
    cells = list(zip(places, flat.tolist(), strict=True))
    best = int(flat.argmax())
    return (None if flat[best] < BLAME else places[best].window), float(flat[best]), cells


def coarse(prober: Prober) -> tuple[list[range], list[tuple[int, int]], Array]:
    """The effect, above the floor, of all layers and of each quarter of them in each quarter of the
    steps that are left, [window, stack], on a few pairs; with the windows and stacks.

    Args:
        prober: of the pairs.
    """
    few = prober.pairs.few
    n, steps, since = few.bad.model.cfg.n_layers, few.bad.settings.steps, few.since
    many = max(1, min(4, steps - since))
    edges = [since + (steps - since) * i // many for i in range(many + 1)]
    windows = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    stacks = [(0, n), *split(0, n, 4)]
    places = [Place(a, d, w) for w in windows for a, d in stacks]
    values = (prober.both(places, few) - prober.floor(places, few)).mean(1)
    return windows, stacks, values.reshape(len(windows), len(stacks))
