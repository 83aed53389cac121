"""How a trace is read: what was recorded, and what has to be recomputed from the inputs of its
calls, step by step.

A step is one call of the transformer, or one for each branch of guidance; reading joins them along
the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidState, InvalidValue
from ..hooks.edits import Steps, step_test
from ..hooks.points import HookPoint, Observer, StopForward, stop
from ..model.call import Call
from ..model.hooked import HookedDiT
from ..model.instrumentation import Instrumentation
from .probe import Site

if TYPE_CHECKING:
    from .trace import Trace


def read(
    trace: Trace, names: Sequence[str], steps: Steps = None, branch: str | None = None
) -> dict[str, dict[int, Tensor]]:
    """`{name: {step: activation}}` of full names: as recorded where all of it was, recomputed
    otherwise.
    """
    if not trace.calls:
        raise InvalidState(
            "Nothing was traced: no forward of the model finished inside the `with` block."
        )
    test = step_test(steps)
    default = trace.wanted_steps if steps is None else test
    wanted = [s for s in range(len(trace.calls_at)) if default(s)]
    if not wanted:
        asked = trace.recorded_steps if steps is None else steps
        raise InvalidValue(
            f"No step matches {asked!r}; the trace has {len(trace.calls_at)} steps, 0 to "
            f"{len(trace.calls_at) - 1}."
        )
    rows = {s: rows_of(trace, s, branch) for s in wanted}
    calls = [c for s in wanted for c in rows[s]]
    missing = [n for n in names if not all(c in trace.records.get(n, {}) for c in calls)]
    found = {n: trace.records[n] for n in names if n not in missing}
    if missing:
        found |= recompute(trace, missing, calls)
    return {n: {s: joined(n, found[n], rows[s]) for s in wanted} for n in names}


def rows_of(trace: Trace, step: int, branch: str | None) -> dict[int, list[int] | None]:
    """Which items of which calls make up a step: all of them but skip-layer guidance's, or those of
    one branch.
    """
    chosen: dict[int, list[int] | None] = {}
    for c in trace.calls_at[step]:
        words = Site("", step, (), trace.calls[c], trace.model.cfg.null_class).branch
        items = [
            i for i, word in enumerate(words) if (word == branch if branch else word != "skip")
        ]
        if items:
            chosen[c] = None if len(items) == len(words) else items
    if not chosen:
        raise InvalidValue(
            f"Step {step} has no items of the branch {branch!r}; expected 'cond' or 'uncond', "
            "where guidance ran."
        )
    return chosen


def joined(name: str, found: dict[int, Tensor], rows: dict[int, list[int] | None]) -> Tensor:
    """One step's activation: its calls' items, one behind the other."""
    absent = [c for c in rows if c not in found]
    if absent:
        raise InvalidState(
            f"{name!r} did not run in call {absent[0]} of the transformer: its block was skipped "
            "there."
        )
    parts = [found[c] if items is None else found[c][items] for c, items in rows.items()]
    if len({part.shape[1:] for part in parts}) > 1:
        raise InvalidValue(
            f"{name!r} has different shapes in the branches of guidance "
            f"({', '.join(str(list(p.shape)) for p in parts)}); "
            "read one: t.get(name, branch='cond')."
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def recompute(trace: Trace, names: list[str], calls: Sequence[int]) -> dict[str, dict[int, Tensor]]:
    """`{name: {call: activation}}`: each call once more, with its own inputs, edits and couplings,
    up to the last name asked for.
    """
    if trace.lost_edits:
        raise InvalidState(
            f"{names[0]!r} was not recorded, and this trace was edited at {trace.lost_edits[0]!r} "
            "by a function that the "
            "file can't hold; trace again with names= for what you will read."
        )
    if not isinstance(trace.model, HookedDiT):
        raise InvalidState(
            f"{names[0]!r} was not recorded; to recompute it, load the trace with its model: "
            "load_trace(path, model)."
        )
    # in train mode labels are dropped at random: no recomputation but another run
    trace.model._require_eval()
    trace._check_weights()
    found: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    model, close = trace.model, False
    if not model.instrumentation.installed:
        instrumentation, close = Instrumentation.of(model.transformer)
        model.instrumentation = instrumentation
    last = max(names, key=trace.names.index)
    try:
        for c in calls:
            call = trace.calls[c]

            def keep(value: Tensor, point: HookPoint, c: int = c) -> None:
                found[point.name][c] = trace._keep(value)

            listeners: list[tuple[str, Any]] = [
                *call.edits,
                *((n, Observer(keep)) for n in names),
                (last, Observer(stop)),
            ]
            with (
                model.instrumentation.alone(listeners),
                model.instrumentation.part(call.span, call.stream),
                conditions_of(call),
            ):
                model.instrumentation.couplings = call.couplings
                try:
                    model.transformer(**call.inputs, return_dict=False)
                except StopForward:
                    pass
    finally:
        if close:
            model.instrumentation.remove()
    return found


@contextmanager
def conditions_of(call: Call) -> Iterator[None]:
    """The grad mode and autocast under which the call was made: the same kernels, so the same bits."""
    autocast = torch.autocast(
        call.x.device.type, dtype=call.autocast, enabled=call.autocast is not None
    )
    with torch.set_grad_enabled(call.grad), autocast:
        yield
