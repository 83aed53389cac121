"""What watches the calls of the model while a trace is open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..errors import InvalidState
from ..hooks.points import HookPoint, version
from ..model.call import Call, Copies
from ..model.steps import StepCounter
from .record import Record
from .site import Observing, Site


class Recorder(StepCounter):
    """Watches the calls of an open trace: counts its steps, keeps inputs and activations."""

    proves = True

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.begun: Call | None = None  # the call under way, as it is kept
        self.of_runs: set[int] = set()  # steps that were seen, counted within each run
        self.forget()

    def forget(self) -> None:
        """Drop references to the caller's tensors."""
        self.call = self.begun = None
        self.copies = Copies()

    def begin(self, call: Call) -> None:
        """Number the call's step, and copy its inputs, which the model may change in place."""
        self.number(call, max(self.record.calls_at, default=-1))
        self._drop_unfinished()
        self.begun = None if self.record.forgets else call.kept(self.copies)

    def end(self, call: Call, finished: bool) -> None:
        """Keep the call; one that failed is no step."""
        if not finished:
            self._drop_unfinished()
            return
        self.of_runs.add(self.step)
        record = self.record
        if record.forgets:
            record.calls_at.setdefault(self.row, [])
            return
        assert self.begun is not None
        kept = replace(self.begun, edits=call.edits, witness=call.witness, left_out=call.left_out)
        self.begun = None
        # in this order: an interrupt in between leaves a call that is no step's
        record.calls.append(kept)
        record.calls_at.setdefault(self.row, []).append(len(record.calls) - 1)

    def _drop_unfinished(self) -> None:
        """Forget what was recorded of a call that was not finished."""
        for activations in self.record.activations.values():
            activations.pop(len(self.record.calls), None)

    def moment(self, active: Callable[[int], bool]) -> tuple[bool, int, str]:
        """What an edit asks: whether it acts in the call under way, its step and its branch."""
        return active(self.step), self.step, "" if self.call is None else self.call.told

    def keep(self, value: Tensor, point: HookPoint) -> None:
        """Record an activation."""
        assert self.call is not None
        if self.record.wanted(self.row) and point.name not in self.call.left_out:
            self.record.activations[point.name][len(self.record.calls)] = self.record.kept(value)

    def showing(self, probe: Observing) -> Callable[[Tensor, HookPoint], None]:
        """An observer that shows a probe what it sees, and where."""

        def show(value: Tensor, point: HookPoint) -> None:
            call = self.call
            assert call is not None
            site = Site(point.name, self.row, call.grid, call, self.record.cfg.null_class)
            seen = value.detach()
            before = version(seen), version(call.x)
            answer = probe.observe(seen, site)
            if (version(seen), version(call.x)) != before:
                raise InvalidState(
                    f"{type(probe).__name__} changed its activation or site.x in place at "
                    f"{point.name!r}, and with it the run; a probe only looks: let it work on a "
                    "copy, activation.clone()."
                )
            if isinstance(answer, Tensor) and answer.shape == seen.shape:  # as an edit does
                raise InvalidState(
                    f"{type(probe).__name__} returned another activation for {point.name!r}, which "
                    "would be passed over; a probe only looks: expected a trace's edit(names, fn)."
                )

        return show
