"""What every cell would do to the finished latents of a run under a plan, to first order: one
backward pass through it for each random direction (`dit_lens.patching.first_order.directions`).

Around the plan, not around the plain run, since with half of all cells held a model answers
otherwise to what comes to it: a held part does not answer at all, and its answer at the step that
it is held from counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..hooks.hold import Added, parts
from ..hooks.points import HookPoint
from ..measures import Array
from ..pieces import Arrays, Piece, results
from ..plans.kept import weights
from ..plans.plan import Plan
from ..sampling.guidance import n_passes
from ..sampling.loop import advance, model_output
from ..sampling.run import Run
from ..sampling.settings import edits_at

TOGETHER, ROOM = 16, 1 << 30
"""Items that are gone through at once, at most, and bytes for what all parts add at all steps."""
Additions = dict[Added, Tensor]
"""What each place adds at a step, [batch, ...]."""


def slopes(
    name: str,
    run: Run,
    under: Callable[[], Run],
    plan: Plan,
    columns: Sequence[tuple[int, str]],
    aims: Tensor,
    reach: int,
    batch: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Array:
    """Projections on the directions, [column, step, back, band, direction, item]: how the finished
    latents move when a cell adds what its part would `back` steps earlier, in place of what it
    would now.

    Args:
        name: for the pieces, each of which is some items.
        run: the samples under no plan.
        under: gives them under the plan.
        plan: which it is.
        columns: (layer, part).
        aims: directions, as `directions` gives them, [band, direction, item, *latent_shape].
        reach: how many steps back are asked for.
        batch: images that are gone through at once, at most.
        progress: called with how much is done, and how much there is.
    """
    cfg, steps, n = run.model.cfg, plan.steps, len(run.labels)
    one = len(columns) * steps * math.prod(cfg.grid) * cfg.d_model * aims.element_size()
    most = TOGETHER if batch is None else min(TOGETHER, batch // run.passes)
    at_once = max(1, min(most, ROOM // (one * run.passes)))
    firsts = range(0, n, at_once)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 2 * steps * len(firsts))

    def of_items(number: int) -> Arrays:
        part = slice(firsts[number], firsts[number] + at_once)

        def ahead(done: int) -> None:
            tell(2 * steps * number + done)

        own = under().select(part)
        return {"slopes": _slopes(own, plan, columns, aims[:, :, part], reach, ahead)}

    pieces = [
        Piece(f"{name}, items from {first}", partial(of_items, number))
        for number, first in enumerate(firsts)
    ]
    found = results(pieces, lambda number: tell(2 * steps * (number + 1)))
    return np.concatenate([each["slopes"] for each in found], axis=-1)


def _slopes(
    under: Run,
    plan: Plan,
    columns: Sequence[tuple[int, str]],
    aims: Tensor,
    reach: int,
    told: Callable[[int], object],
) -> Array:
    """The same of all items at once; told of the steps done, twice the run's in all."""
    of_column = [parts(under.model.names, layer)[part] for layer, part in columns]
    held = _Held(plan, columns, of_column)
    steps, passes = plan.steps, n_passes(under.model, under.settings.guidance)

    # Forwards: what every place would add.
    fresh: list[Additions] = []
    for step in range(steps):
        fresh.append({})
        x = under.here(under.latents[step])
        _next(under, x, step, fresh[-1], held.values(step, fresh), held.places)
        told(step + 1)

    # Backwards: how the finished latents answer to each.
    found: Array = np.zeros((len(columns), steps, reach + 1, *aims.shape[:3]), np.float32)
    pulls = aims.flatten(0, 1).clone()
    owed: dict[tuple[Added, int], Tensor] = {}  # [direction, ...], by what is held from a step
    for step in reversed(range(steps)):
        x = under.here(under.latents[step]).clone().requires_grad_()
        given = {p: v.detach().requires_grad_() for p, v in held.values(step, fresh).items()}
        seen: Additions = {}
        with torch.enable_grad():
            following = _next(under, x, step, seen, given, held.places)
        free = [p for p in held.places if p not in given]
        debts = [p for p in free if (p, step) in owed]
        values = [given.get(p, seen[p]) for p in held.places]
        direct: dict[Added, list[Tensor]] = {p: [] for p in held.places}
        for i in range(len(pulls)):
            into = [pulls[i], *(owed[p, step][i] for p in debts)]
            pulls[i], *pulled = torch.autograd.grad(
                [following, *(seen[p] for p in debts)],
                [x, *values],
                into,
                retain_graph=i + 1 < len(pulls),
                materialize_grads=True,  # a text that only held attentions would read: nothing
            )
            for p, pull in zip(held.places, pulled, strict=True):
                direct[p].append(pull - owed[p, step][i] if (p, step) in owed else pull)
        own = {p: torch.stack(direct[p]) for p in held.places}
        for p in given:
            for source, weight in held.weights[p][step].items():
                part = weight * own[p]
                owed[p, source] = owed[p, source] + part if (p, source) in owed else part
        owed = {key: value for key, value in owed.items() if key[1] < step}
        back = min(reach, step)
        for c, places in enumerate(of_column if back else ()):
            for p in places:
                moves = torch.stack(
                    [fresh[step - k][p] - fresh[step][p] for k in range(1, back + 1)]
                )
                moved = torch.einsum("kbn,dbn->kdb", moves.flatten(2), own[p].flatten(2))
                moved = moved.unflatten(2, (passes, -1)).sum(2)
                found[c, step, 1 : back + 1] += (
                    moved.unflatten(1, aims.shape[:2]).float().cpu().numpy()
                )
        fresh.pop()
        told(2 * steps - step)
    return found


class _Held:
    """What a plan holds, by place."""

    def __init__(
        self,
        plan: Plan,
        columns: Sequence[tuple[int, str]],
        of_column: Sequence[Sequence[Added]],
    ) -> None:
        self.places = list(dict.fromkeys(p for places in of_column for p in places))
        self.weights: dict[Added, dict[int, dict[int, float]]] = {p: {} for p in self.places}
        for (layer, part), places in zip(columns, of_column, strict=True):
            for step in plan.held.get((layer, part), ()):
                made_of = weights(plan.timesteps, step, plan.sources[layer, part, step])
                for place in places:
                    self.weights[place][step] = made_of

    def values(self, step: int, fresh: Sequence[Additions]) -> Additions:
        """What is put in at a step, from what would be added at earlier ones."""
        found = {}
        for place, of_steps in self.weights.items():
            if step in of_steps:
                parts = [w * fresh[source][place] for source, w in of_steps[step].items()]
                found[place] = torch.stack(parts).sum(0)
        return found


def _next(
    run: Run, x: Tensor, step: int, seen: Additions, given: Additions, places: Sequence[Added]
) -> Tensor:
    """The next x_t with what is given put in; `seen` gets what each place would add."""

    def put(place: Added, value: Tensor, hook: HookPoint) -> Tensor:
        seen[place] = value
        return given.get(place, value)  # what goes on is what was seen, also in a sequence

    model, scheduler = run.model, run.fresh_scheduler()
    hooks = [(place.name, partial(put, place)) for place in places]
    graph = torch.is_grad_enabled() and x.requires_grad
    with run.restored(), torch.set_grad_enabled(graph):
        with model.hooks([*edits_at(run.history, step), *hooks]):
            output = model_output(model, x, step, run.labels, run.settings, scheduler)
            return advance(scheduler, output, x, run.seeds_at(step), step, run.settings.eta)
