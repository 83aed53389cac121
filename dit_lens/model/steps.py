"""Counting steps: which denoising step a call of the transformer is."""

from __future__ import annotations

from ..hooks.hold import Clock
from .call import Call


class StepCounter:
    """Numbers the calls that it is shown: a loop of ours and a pipeline say which step one is;
    elsewhere each call is the next step.

    Attributes:
        call: the one under way, or the latest.
        run: which run it is of, a pipeline's or one of ours, if that is known.
        runs: how many runs ended before it, as far as can be seen.
        step: of that run.
        row: counted over all runs, those of a second one behind the first one's.
        offset: how far rows are ahead of steps.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.run: object | None = None
        self.runs = self.step = self.row = self.offset = 0

    def number(self, call: Call, last: int) -> None:
        """Number a call.

        Args:
            call: it begins.
            last: the last row of a call that was finished; -1 if none was.
        """
        context = call.context
        run, step = call.place or (context.run, context.step)
        another = self.call is not None and run != self.run
        if step is None:
            step = 0 if another else last + 1 - self.offset
        elif run is None and self.call is not None and step <= self.step:
            another = another or context.part is None or not context.part.later
        if another:
            self.offset = last + 1 - step  # its steps come behind
            self.runs += 1
        self.run, self.step, self.row, self.call = run, step, step + self.offset, call

    def clock(self) -> Clock:
        """Where the call under way is."""
        call = self.call
        if call is None:
            return Clock(self.runs, self.step)
        rows = None if call.context.part is None else call.context.part.rows
        words = " | ".join(dict.fromkeys(call.branch or ()))
        return Clock(self.runs, self.step, words, rows)
