"""Which part, heads and tokens of a layer carry a fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...hooks.hold import parts
from ...measures.estimate import Estimate
from .prober import BLAME, ENOUGH, Place, Prober, all_of, estimates
from .where import ADDS

SIDE = 4
"""The token grid is looked at in so many squares a side."""


@dataclass
class Inside:
    """What of a layer carries the fault.

    Attributes:
        layer: the block.
        parts: the effect of each part by itself.
        part: the one that is to blame alone; None is none of them.
        heads: the effect of each head, of an attention that is to blame.
        head: the one that is to blame alone; None is none of them.
        squares: the tokens of each square of the grid.
        tokens: the effect of each square.
        covered: the tokens that suffice, the fewest that were found; None is all of them.
    """

    layer: int
    parts: dict[str, Estimate]
    part: str | None
    heads: list[Estimate]
    head: int | None
    squares: list[tuple[int, ...]]
    tokens: list[Estimate]
    covered: tuple[int, ...] | None


def look_inside(prober: Prober, layer: int, window: range, beside: tuple[int, ...] = ()) -> Inside:
    """Part, heads and tokens of a layer, each patched by itself, both ways.

    Args:
        prober: of the pairs.
        layer: the block.
        window: of steps.
        beside: other layers that are to blame with it: they are patched too, and an effect is the
            share of what the whole layer adds to them.
    """
    model = prober.pairs.bad.model
    few = prober.pairs.few
    less, most = 0.0, 1.0
    if beside:
        without, whole = all_of(beside, window), all_of((layer, *beside), window)
        less, most = prober.both([without, whole], few).mean(1)

    def measured(places: Sequence[Place]) -> list[Estimate]:
        places = [place._replace(beside=beside) for place in places]
        found = prober.both(places, few) - prober.floor(places, few)
        # in the window, in one pair, the layer can add less than it was blamed for
        return estimates((found - less) / max(most - less, ADDS))

    names = list(parts(model.names, layer))
    by_part = measured([Place(layer, 1, window, name) for name in names])
    best = max(range(len(names)), key=lambda i: by_part[i].value)
    alone = by_part[best].value > BLAME
    part = names[best] if alone else None

    heads: list[Estimate] = []
    head = None
    if part == "attn" and f"blocks.{layer}.attn.hook_result" in model.names:
        n_heads = model.cfg.n_heads
        heads = measured(
            [Place(layer, 1, window, "attn.hook_result", (h,)) for h in range(n_heads)]
        )
        first = max(range(n_heads), key=lambda h: heads[h].value)
        head = first if heads[first].value > BLAME else None

    squares = _squares(model.cfg.grid)
    tokens: list[Estimate] = []
    covered = None
    if len(squares) > 1:
        tokens = measured([Place(layer, 1, window, tokens=square) for square in squares])
        covered = _fewest(measured, layer, window, squares, tokens)
    return Inside(
        layer, dict(zip(names, by_part, strict=True)), part, heads, head, squares, tokens, covered
    )


def _squares(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The tokens of each square of an image's grid; none for videos."""
    if len(grid) != 2:
        return []
    h, w = grid
    numbers = np.arange(h * w).reshape(h, w)
    rows, columns = (np.array_split(np.arange(n), min(SIDE, n)) for n in (h, w))
    return [tuple(numbers[np.ix_(r, c)].flatten().tolist()) for r in rows for c in columns]


def _fewest(
    measured: Callable[[Sequence[Place]], list[Estimate]],
    layer: int,
    window: range,
    squares: Sequence[tuple[int, ...]],
    tokens: Sequence[Estimate],
) -> tuple[int, ...] | None:
    """The squares of the largest effects, as few as take the fault away together; None where that
    is more than half of them.
    """
    order = sorted(range(len(squares)), key=lambda i: -tokens[i].value)
    counts = [1, 2, 4, len(squares) // 2]
    chosen = [tuple(sorted(t for i in order[:k] for t in squares[i])) for k in counts]
    values = measured([Place(layer, 1, window, tokens=t) for t in chosen])
    return next((t for t, v in zip(chosen, values, strict=True) if v.value > ENOUGH), None)
