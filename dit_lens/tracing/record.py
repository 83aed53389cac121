"""What a trace has kept: the inputs of every call, and what was recorded. Data only.

A trace fills it, recomputation and files read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..families.config import Config
from ..families.parts.sites import Axes
from ..hooks.edits import Steps, step_test
from ..hooks.names import layer_of
from ..model.call import Call
from ..model.state import State


@dataclass
class Record:
    """One traced run.

    Attributes:
        sites: every hook name of the model with its axes, in forward order.
        cfg: the model's sizes.
        scheduler: the model's, for noise levels; None where its time may be in other units.
        names: the hook names that were recorded.
        steps: the steps that were asked for, as given.
        wanted: whether a step was asked for.
        device: where recorded activations are kept; None is where they are.
        dtype: as what; None is as they are.
        calls: each call of the transformer, with all that its forward depended on.
        calls_at: each step's calls: one, or one for each branch of guidance; more where a step was
            run more than once.
        activations: what was recorded, by hook name and call.
        state: a glance at the model when the trace opened, to name what changed since.
        exact: whether all that was recomputed so far was so bit for bit.
        lost_edits: of a trace from a file: where functions acted that the file can't hold.
    """

    sites: dict[str, Axes]
    cfg: Config
    scheduler: Any = None
    names: list[str] = field(default_factory=list)
    steps: Steps = None
    wanted: Callable[[int], bool] = step_test(None)
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    calls: list[Call] = field(default_factory=list)
    calls_at: dict[int, list[int]] = field(default_factory=dict)
    activations: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    state: State | None = None
    exact: bool = True
    lost_edits: list[str] = field(default_factory=list)

    @property
    def timesteps(self) -> Tensor:
        """The diffusion timestep of each step, [step]."""
        first = [self.calls[self.calls_at[s][0]].t[0] for s in sorted(self.calls_at)]
        return torch.stack(first) if first else torch.zeros(0)

    def kept(self, name: str, value: Tensor) -> Tensor:
        """An activation as it is kept: what leaves the model, and so the library, as a copy."""
        leaves = layer_of(name) is None
        return value.detach().to(self.device or value.device, self.dtype, copy=leaves)
