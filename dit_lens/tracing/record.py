"""What a trace has kept: the inputs of every call, and what was recorded. Data only.

A trace fills it, recomputation and files read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..families.base import Axes, Config
from ..hooks.edits import Steps, step_test
from ..model.call import Call


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
        calls_at: each step's calls: one, or one for each branch of guidance.
        activations: what was recorded, by hook name and call.
        weights: fingerprints of the model's weights when the trace opened and closed.
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
    calls_at: list[list[int]] = field(default_factory=list)
    activations: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    weights: tuple[str, str | None] = ("", None)
    lost_edits: list[str] = field(default_factory=list)

    @property
    def timesteps(self) -> Tensor:
        """The diffusion timestep of each step, [step]."""
        first = [self.calls[calls[0]].t[0] for calls in self.calls_at]
        return torch.stack(first) if first else torch.zeros(0)

    def kept(self, value: Tensor) -> Tensor:
        """An activation as it is kept."""
        value = value.detach()
        if self.device is None and self.dtype is None:
            return value
        return value.to(self.device or value.device, self.dtype)
