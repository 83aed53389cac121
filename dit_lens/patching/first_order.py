"""First order: how far small changes of what sites add would move the finished latents, all sites
and steps at once.

The move that a change makes is J times the change, J the derivative of the finished latents. That
product, for one change, costs a run; but its projection on a direction v is <Jᵀv, change>, and Jᵀv
for all sites and steps comes from one backward pass through the run. For v drawn from the standard
normal distribution of a band the square of the projection has the mean |P_band J change|²
(Hutchinson's estimator), so a few directions for every item give the move's energy in the band,
without bias; what they scatter is part of the scatter between items.

Projections of changes that are made together add up before they are squared. That is what tells a
plan whose changes cancel from one whose changes pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.hold import Added
from ..hooks.points import HookPoint
from ..measures.bands import Bands
from ..sampling.guidance import n_passes
from ..sampling.loop import advance, model_output, remembers
from ..sampling.noise import generators
from ..sampling.run import Run
from ..sampling.schedulers import default_name
from ..sampling.settings import edits_at

Additions = dict[Added, Tensor]
"""What each place adds at a step, [batch, ...]."""
Changes = Callable[[int, Additions, Callable[[int], Additions]], Sequence[Additions]]
"""What is asked: the changes of interest at a step, from what is added there and, by a function of
the step, at others. A place may be left out of a change."""


def directions(run: Run, bands: Bands, count: int, seed: int) -> Tensor:
    """Random directions for the finished latents, [band, direction, item, *latent_shape], each
    within its band.
    """
    drawn = [
        torch.randn(count, *run.latents.shape[2:], generator=generators([seed], item)[0])
        for item in range(len(run.labels))
    ]
    white = torch.stack(drawn, 1).to(run.finished)
    shape = white.shape
    return torch.stack([bands.project(white.flatten(0, 1), b).view(shape) for b in range(bands.n)])


def check_gradients(scheduler: Any) -> None:
    """Raise InvalidValue where no gradient can be taken through a run with this scheduler, its
    timesteps set.
    """
    if torch.is_inference_mode_enabled():
        raise InvalidValue(
            "Gradients are asked of a model in torch.inference_mode(); leave it, or use "
            "torch.no_grad() for what comes before."
        )
    if remembers(scheduler):
        raise InvalidValue(
            f"{type(scheduler).__name__} remembers earlier steps, which gradients here do not; use "
            f"scheduler={default_name(scheduler)!r}, or measure exactly (exact=True, patches)."
        )


def projected(
    run: Run, places: Sequence[Added], aims: Tensor, changes: Changes
) -> Iterator[tuple[int, list[dict[Added, NDArray[np.float64]]]]]:
    """For each step, the last first: the projection of each change on each direction.

    Args:
        run: that is changed.
        places: where.
        aims: directions, as `directions` gives them.
        changes: what is asked at a step.

    Yields:
        The step, and for each change and place [band, direction, item].
    """
    pulls = aims.clone()
    for step in reversed(range(run.settings.steps)):
        yield step, projected_at(run, step, places, pulls, changes)


def projected_at(
    run: Run, step: int, places: Sequence[Added], pulls: Tensor, changes: Changes
) -> list[dict[Added, NDArray[np.float64]]]:
    """The same of one step.

    Args:
        run: that is changed.
        step: of the run.
        places: where.
        pulls: the directions carried back to the end of this step, [band, direction, item, ...];
            carried on to its start.
        changes: what is asked at a step.
    """
    names = list(dict.fromkeys(name for place in places for name in place if name))
    passes = n_passes(run.model, run.settings.guidance)
    x = run.here(run.latents[step]).clone().requires_grad_()
    seen, following = _seen(run, x, step, names, graph=True)
    here = {p: _added(p, seen).detach() for p in places}

    def elsewhere(other: int) -> Additions:
        theirs, _ = _seen(run, run.here(run.latents[other]), other, names)
        return {p: _added(p, theirs) for p in places}

    asked = changes(step, here, elsewhere)
    found = [{p: np.zeros(pulls.shape[:3]) for p in change} for change in asked]
    flat = pulls.flatten(0, 1)
    for i in range(len(flat)):
        wanted = [x, *(seen[p.name] for p in places)]
        flat[i], *pulled = torch.autograd.grad(
            following,
            wanted,
            flat[i],
            retain_graph=i + 1 < len(flat),
            materialize_grads=True,  # what an edit behind it leaves unread: nothing
        )
        gradient = dict(zip(places, pulled, strict=True))
        for change, into in zip(asked, found, strict=True):
            for place, by in change.items():
                moved = (gradient[place] * by).flatten(1).sum(1).view(passes, -1).sum(0)
                into[place][divmod(i, pulls.shape[1])] = moved.double().cpu().numpy()
    return found


def _added(place: Added, seen: dict[str, Tensor]) -> Tensor:
    return place.of(seen[place.name], seen[place.entered] if place.entered else None)


def _seen(
    run: Run, x: Tensor, step: int, names: Sequence[str], graph: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """The activations of these names at a step of the run from x_t, and the next x_t."""
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> Tensor:
        seen[hook.name] = value
        return value  # so that what goes on is what was seen, also where it lies in a sequence

    model, scheduler = run.model, run.fresh_scheduler()
    with (
        run.restored(),
        torch.set_grad_enabled(graph),
        model.hooks([*edits_at(run.history, step), (names, keep)]),
    ):
        output = model_output(model, x, step, run.labels, run.settings, scheduler)
        following = advance(scheduler, output, x, run.seeds_at(step), step, run.settings.eta)
    return seen, following
