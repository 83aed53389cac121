"""Counting steps: which denoising step a call of the transformer is."""

from __future__ import annotations

from ..hooks.hold import Clock
from .call import Call


class StepCounter:
    """Numbers the calls that it is shown: a loop of ours and a pipeline say which step one is;
    elsewhere each call is the next step.

    Attributes:
        call: the one under way, or the latest.
        run: which run of a pipeline it is of, if that is known.
        step: of that run.
        row: counted over all runs, those of a second one behind the first one's.
        offset: how far rows are ahead of steps.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.run: int | None = None
        self.step = self.row = self.offset = 0

    def number(self, call: Call, last: int) -> None:
        """Number a call.

        Args:
            call: it begins.
            last: the last row of a call that was finished; -1 if none was.
        """
        run, step = call.place or (None, call.context.step)
        if step is None:
            step = last + 1 - self.offset
        elif call.context.part is not None and call.context.part.later:
            pass  # the step goes on
        elif self.call is not None and (run != self.run or (run is None and step <= self.step)):
            self.offset = last + 1 - step  # another run: its steps come behind
        self.run, self.step, self.row, self.call = run, step, step + self.offset, call

    def clock(self) -> Clock:
        """Where the call under way is."""
        call = self.call
        if call is None:
            return Clock(self.offset, self.step)
        rows = None if call.context.part is None else call.context.part.rows
        words = " | ".join(dict.fromkeys(call.branch or ()))
        return Clock(self.offset, self.step, words, rows)
