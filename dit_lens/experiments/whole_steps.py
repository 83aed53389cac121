"""Plans that hold whole steps: every part of every layer at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..model.hooked import HookedDiT
from ..plans.costs import Costs
from ..plans.plan import Plan


def whole_steps(
    model: HookedDiT, times: Sequence[float], computed: Iterable[int], lines: bool = False
) -> Plan:
    """The plan that computes these steps and holds all others.

    Args:
        model: the opened model.
        times: of the run's steps, in the scheduler's units.
        computed: the steps that are; the first always is.
        lines: whether steps behind the second computed one are held along lines.
    """
    kept = sorted({0, *computed})
    costs = Costs.of(model)
    cells = [(*place, s) for place in costs.parts for s in range(len(times)) if s not in kept]
    behind = [cell for cell in cells if lines and len(kept) > 1 and cell[2] > kept[1]]
    return Plan.of(model, times, cells, lines=behind)


def even_steps(steps: int, number: int, power: float = 1.0) -> list[int]:
    """So many of the steps, from the first on, at even distances.

    Args:
        steps: of the run.
        number: of them, at most as many.
        power: the i-th is at `steps * (i / number) ** power`: below 1 they lie closer towards the
            end.

    >>> even_steps(10, 4), even_steps(10, 4, power=0.5)
    ([0, 2, 5, 7], [0, 5, 7, 8])
    """
    found: list[int] = []
    for i in range(number):
        at = int(steps * (i / number) ** power + 1e-9)
        # each another one, and room for those that follow
        found.append(min(max(at, found[-1] + 1 if found else 0), steps - number + i))
    return found


def number_of_steps(model: HookedDiT, steps: int, budget: float, nearest: bool = False) -> int:
    """How many whole steps can be computed within a budget; at least one.

    Args:
        model: the opened model.
        steps: of the run.
        budget: the share of multiply-accumulates that may be left.
        nearest: take the number that comes nearest to the budget, within it or not.
    """
    costs = Costs.of(model)
    held = 1 - costs.share([(*place, 0) for place in costs.parts], 1)  # of a step, held whole
    number = (budget - (1 - held)) / held * steps + (0.5 if nearest else 1e-9)
    return max(1, min(steps, int(number)))
