"""Patches between bad and good runs, both ways, and what they do to a fault.

What a stack of layers adds to the stream in a window of steps is taken from the good run and put
into the bad one (*repair*: how much of the fault goes), and from the bad one into the good one
(*create*: how much of it comes). The effect of a place is the mean of both, 1 for all of the fault.
Near twins also differ by noise, so from theirs the *floor* is taken off: what a patch from one good
run into another does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...measures import Array
from ...measures.bootstrap import FEWEST_PAIRS, draws, simultaneous
from ...measures.estimate import Estimate
from ...patching.lanes import Lanes
from ...patching.patch import Patch, Planned, joined, plan
from ...pieces import Arrays, Piece, results
from ...sampling.run import Run
from .chances import Spent
from .fault import Fault, Images
from .pairs import Pairs

BLAME = 0.5
"""A place is to blame if its own patch makes for more of the fault than this, surely."""
ENOUGH = 0.9
"""What makes for this share of the fault is all that is to blame."""


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
        inside = range(self.layer, self.layer + self.depth)  # which the stack's patch contains
        others = [layer for layer in self.beside if layer not in inside]
        also = [Patch("block", layer, self.window, kind="swap") for layer in others]
        model, steps, items = run.model, run.settings.steps, len(run.labels)
        return joined([plan(patch, model, steps, items) for patch in (own, *also)])

    @property
    def single(self) -> bool:
        """Whether it is one layer."""
        return self.depth == 1


@dataclass
class Prober:
    """Patches between pairs, and what they do to the fault.

    Attributes:
        pairs: bad and good runs.
        fault: the score.
        images: of latents.
        spent: the account.
        batch: images that run at once.
        asked: how many pieces there were.
    """

    pairs: Pairs
    fault: Fault
    images: Images
    spent: Spent
    batch: int
    asked: int = 0

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
        bad, good = (self.fault.scores(self.images(r.finished)) for r in (p.bad, p.good))
        return np.clip((scores - good) / _least(bad - good), 0, 1)

    def both(self, places: Sequence[Place], pairs: Pairs | None = None) -> Array:
        """The effect of each place, without the floor taken off."""
        return (self.repair(places, pairs) + self.create(places, pairs)) / 2

    def _measured(self, found: Tensor, start: Run, end: Run) -> Array:
        """How far patched runs went from `start` to `end`: in the score, and, where nothing but the
        model differs, in the image too, the mean of both.
        """
        s0, s1 = (self.fault.scores(self.images(r.finished)) for r in (start, end))
        scores = np.stack([self.fault.scores(self.images(x)) for x in found])
        moved = np.clip((scores - s0) / _signed(s1 - s0), -1, 1)
        if not self.pairs.matched:
            return moved
        a, b = (self.fault.part(self.images(r.finished)) for r in (start, end))
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
        def patched() -> Arrays:
            lanes = Lanes(source, target, self.batch)
            latents = lanes.run([place.planned(target) for place in places], lambda _: None)
            return {"latents": latents.cpu().numpy(), "blocks": np.array(lanes.blocks)}

        self.asked += 1
        (found,) = results([Piece(f"patches {self.asked}", patched)])
        whole = target.model.cfg.n_layers * target.settings.steps * target.passes
        self.spent.add(int(found["blocks"]) / whole)
        return torch.from_numpy(np.array(found["latents"])).to(target.finished)

    def layers(
        self, window: range, beside: tuple[int, ...] = ()
    ) -> tuple[dict[int, float], list[tuple[Place, float]]]:
        """Single layers with their effects, found by splitting the stacks that have the most; and
        all places that were looked at. Looked at on a few pairs, without the floor taken off.

        Args:
            window: of steps.
            beside: layers that are patched as well; an effect is what is added to theirs.
        """
        few = self.pairs.few
        stacks = split(0, few.bad.model.cfg.n_layers, 4)
        seen: list[tuple[Place, float]] = []
        singles: dict[int, float] = {}
        less = float(self.both([all_of(beside, window)], few).mean()) if beside else 0.0
        while stacks:
            places = [Place(a, d, window, beside=beside) for a, d in stacks]
            values = self.both(places, few).mean(1) - less
            seen.extend(zip(places, values.tolist(), strict=True))
            best = max([*values.tolist(), *singles.values()])
            order = np.argsort(-values)
            kept = [int(i) for i in order[:3] if values[i] >= best / 2]
            singles |= {p.layer: float(v) for p, v in zip(places, values, strict=True) if p.single}
            stacks = [part for i in kept if not places[i].single for part in split(*stacks[i], 2)]
        return singles, seen


def all_of(layers: Sequence[int], window: range) -> Place:
    """Whole layers, patched together.

    Args:
        layers: one or more.
        window: of steps.
    """
    return Place(layers[0], 1, window, beside=tuple(layers[1:]))


def split(first: int, depth: int, into: int) -> list[tuple[int, int]]:
    """A stack of layers in parts, as (first, depth).

    Args:
        first: the first layer.
        depth: how many layers.
        into: so many parts, fewer where there are fewer layers.

    >>> split(4, 3, 2)
    [(4, 1), (5, 2)]
    """
    into = min(into, depth)
    edges = [first + depth * i // into for i in range(into + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]


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


def _least(x: Array) -> Array:
    return np.maximum(x, 1e-9)


def _signed(x: Array) -> Array:
    return np.where(np.abs(x) < 1e-9, 1e-9, x)
