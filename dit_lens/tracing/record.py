"""What a trace has kept: the inputs of every call, and what was recorded. Data only.

A trace fills it, recomputation and files read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..families.config import Config
from ..families.parts.sites import Axes
from ..hooks.edits import Steps, step_test
from ..model.call import Call
from ..model.noise_schedule import log_snr
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
        forgets: whether calls are only shown to probes, and nothing can be read.
        state: a glance at the model when the trace opened, to name what changed since.
        exact: whether all that was recomputed so far was so bit for bit.
        file: of a trace from a file: which.
        lost: of a trace from a file: what acted in a call and is not in the file, in words that
            follow "this trace was".
        log_snr: of a trace from a file: the noise level of each step, if it is known.
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
    forgets: bool = False
    state: State | None = None
    exact: bool = True
    file: str = ""
    lost: dict[int, str] = field(default_factory=dict)
    log_snr: dict[int, float] = field(default_factory=dict)

    def noise_levels(self, steps: Sequence[int]) -> list[float] | None:
        """The log SNR of each of these steps; None where the scheduler's noise levels are not
        known, or the items of a step are at different ones.

        Args:
            steps: denoising steps of the record.
        """
        if self.file or self.scheduler is None:
            return [self.log_snr[s] for s in steps] if self.log_snr else None
        own = [self.calls[self.calls_at[s][0]].context.log_snr for s in steps]
        known = [level for level in own if level is not None]
        if len(known) == len(own):
            return known
        of_steps = [torch.cat([self.calls[c].t for c in self.calls_at[s]]) for s in steps]
        if any(bool((times != times[0]).any()) for times in of_steps):
            return None
        times = torch.stack([times[0] for times in of_steps]).cpu().float()
        try:
            found: list[float] = log_snr(self.scheduler, times).tolist()
        except InvalidValue:  # a scheduler of a kind of its own
            return None
        return found

    def branches_as_steps(self) -> int | None:
        """The first of two calls in a row that are given one x_t at one time and other conditions,
        as the two of guidance are, and that count as two steps, for nothing told their step.
        """

        def differ(one: Any, other: Any) -> bool:
            both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            kind = [(e.shape, e.dtype, e.device) for e in (one, other)] if both else []
            return both and (kind[0] != kind[1] or not torch.equal(one, other))

        for i, (one, other) in enumerate(zip(self.calls, self.calls[1:], strict=False)):
            told = any(c.place is not None or c.context.step is not None for c in (one, other))
            if told or differ(one.t, other.t) or differ(one.x, other.x):
                continue
            if any(differ(v, other.condition.get(k)) for k, v in one.condition.items()):
                return i
        return None

    def kept(self, value: Tensor) -> Tensor:
        """An activation as it is kept: a copy, as whatever comes after it in the pass, a module or
        somebody's hook, may change it in place.
        """
        return value.detach().to(self.device or value.device, self.dtype, copy=True)
