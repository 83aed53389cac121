"""What a held cell of a plan adds: what its part added when it was last computed, or the point of
the line through the last two times that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidState
from ..hooks.hold import Added, Clock, Hold
from ..hooks.points import HookPoint
from ..hooks.regions import Region


class Computed(NamedTuple):
    """What a part added when it was computed.

    Attributes:
        step: of the run.
        time: in the scheduler's units.
        value: what was added.
    """

    step: int
    time: float
    value: Tensor


def slope(time: float, last: float, earlier: float) -> float:
    """How far a point at `time` lies behind the last of two, in units of their distance: the line
    is `value + slope * (value - earlier value)`.

    >>> slope(900, 920, 960)
    0.5
    """
    return (time - last) / (last - earlier)


def weights(times: Sequence[float], step: int, sources: Sequence[int]) -> dict[int, float]:
    """How much of what was added at each of its sources a held cell adds.

    Args:
        times: of the run's steps, in the scheduler's units.
        step: at which it is held.
        sources: the steps that it is made of, one or two, the latest first.

    >>> weights([960, 920, 900], 2, [1, 0])
    {1: 1.5, 0: -0.5}
    """
    if len(sources) == 1:
        return {sources[0]: 1.0}
    by = slope(times[step], *(times[source] for source in sources))
    return {sources[0]: 1 + by, sources[1]: -by}


class KeptHold(Hold):
    """Holds one place from the calls in which it was last computed.

    Args:
        place: what is held.
        made_of: the steps that the call's value is made of, one or two, the latest first; None
            where nothing is held.
        now: where the run is.
        time: of the call, in the scheduler's units.
        other_steps: whether the run has other steps than `made_of` says; then it is made of those
            that there are.
        axes: of the place's hook point.
    """

    def __init__(
        self,
        place: Added,
        made_of: Callable[[], tuple[int, ...] | None],
        now: Callable[[], Clock],
        time: Callable[[], float],
        other_steps: bool,
        axes: tuple[str, ...],
    ) -> None:
        super().__init__(place, lambda _: made_of() is not None, now, 1, 0, Region(), axes)
        self.made_of, self.time, self.other_steps = made_of, time, other_steps
        self.computed: dict[Clock, list[Computed]] = {}  # the last two, the latest first

    def value(self) -> Tensor | None:
        steps = self.made_of()
        if steps is None:
            return None
        clock = self.now()
        known = self.computed.get(clock._replace(step=0), [])[: len(steps)]
        if not known or (not self.other_steps and tuple(each.step for each in known) != steps):
            raise InvalidState(
                f"{self.place.name!r} can't be held at step {clock.step}: the plan holds it from "
                f"step {' and '.join(map(str, steps))}, and there was "
                f"{' and '.join(str(each.step) for each in known) or 'none'} for these items; run "
                "all steps, in one batch."
            )
        last = known[0]
        if len(known) == 1:
            return last.value
        by = slope(self.time(), last.time, known[1].time)
        return torch.lerp(known[1].value, last.value, 1 + by)

    def remember(self, value: Tensor, point: HookPoint) -> None:
        self.made = None
        if self.made_of() is not None:
            return
        clock = self.now()
        if any(each.run != clock.run for each in self.computed):
            self.computed = {c: known for c, known in self.computed.items() if c.run == clock.run}
        known = self.computed.setdefault(clock._replace(step=0), [])
        earlier = [each for each in known if each.step < clock.step][:1]
        known[:] = [Computed(clock.step, self.time(), value.detach().clone()), *earlier]
