"""Branches: many ways to go on from the steps of a run, of which only the ends are wanted.

Each is the run from a step on with noise of its own, exactly as `Run.replay(step, seeds=...)` would
go, but that nothing is run twice: a branch begins with what the model answered to the run at that
step, which is stored, and branches of different steps go through the model together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import n_passes
from .loop import advance, answered
from .parts import Splitter
from .run import Run
from .settings import edits_at


@dataclass(frozen=True)
class Branch:
    """One way to go on.

    Attributes:
        run: that is left.
        step: at which it is left.
        seeds: of the noise from there on, one for each item.
        latents: x_t at that step, in place of the run's own; the scheduler then remembers nothing
            of the run.
    """

    run: Run
    step: int
    seeds: tuple[int, ...]
    latents: Tensor | None = None

    def begin(self) -> tuple[Tensor, Any]:
        """x_t at the step, and the scheduler that goes on from there."""
        if self.latents is None:
            return self.run.here(self.run.latents[self.step]), self.run.scheduler_at(self.step)
        return self.latents, self.run.fresh_scheduler()


@dataclass
class _Lane:
    branch: Branch
    x: Tensor
    scheduler: Any
    output: Tensor | None = None


@torch.no_grad()
def ends(
    branches: Sequence[Branch],
    batch: int | None = None,
    told: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """The finished latents of each branch, [item, *latent_shape].

    Args:
        branches: of runs of one model, with the same settings and kernels.
        batch: images at once; None is all.
        told: called with the images that went through a step, as they do.
    """
    lanes = [_Lane(b, *b.begin()) for b in branches]
    with branches[0].run.restored():
        _advance(lanes, batch, told)
    return [lane.x for lane in lanes]


def _advance(
    lanes: Sequence[_Lane], batch: int | None, told: Callable[[int], object] | None
) -> None:
    """All lanes to their ends."""
    first = lanes[0].branch.run
    model, settings = first.model, first.settings
    splitter = Splitter(batch, n_passes(model, settings.guidance))
    for step in range(min(lane.branch.step for lane in lanes), settings.steps):
        going = [lane for lane in lanes if lane.branch.step <= step]
        fresh = []
        for lane in going:
            run = lane.branch.run
            stored = step == lane.branch.step >= run.tied_until and lane.branch.latents is None
            lane.output = run.here(run.outputs[step]) if stored else None
            if not stored:
                fresh.append(lane)
        edits = edits_at(first.history, step)
        # edits see a run's own batch
        together = [[lane] for lane in fresh] if edits else [fresh] if fresh else []
        for some in together:
            x = torch.cat([lane.x for lane in some])
            labels = torch.cat([lane.branch.run.labels for lane in some])
            output, _, _ = answered(
                model, x, step, labels, settings, some[0].scheduler, edits, splitter
            )
            for lane, own in zip(some, output.split(len(some[0].x)), strict=True):
                lane.output = own
        for lane in going:
            assert lane.output is not None
            lane.x = advance(
                lane.scheduler, lane.output, lane.x, lane.branch.seeds, step, settings.eta
            )
            lane.output = None
        if told is not None:
            told(sum(len(lane.x) for lane in going))
