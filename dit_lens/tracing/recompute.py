"""Reading a record: what was recorded, and what has to be recomputed from the inputs of its calls.

A step is one call of the transformer, or one for each branch of guidance or part of its batch;
reading joins them along the batch, parts in the order of the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from ..arguments import shown
from ..errors import DitLensError, InvalidState, InvalidValue
from ..hooks.edits import Steps, step_test
from ..hooks.points import HookPoint, Listener, Observer, StopForward
from ..model.call import Call
from ..model.hooked import HookedDiT
from ..model.instrumentation import Instrumentation
from ..model.state import State
from ..model.steps import StepCounter
from ..model.taken import Taken
from ..model.witness import Departure, NotReproduced, Proof, until
from ..sampling.parts import together
from .record import Record

Rows = dict[int, list[int] | None]
"""Which items of which calls make up a step; None is all items."""


def read(
    record: Record,
    model: HookedDiT | None,
    names: Sequence[str],
    steps: Steps = None,
    branch: str | None = None,
) -> dict[str, dict[int, Tensor]]:
    """`{name: {step: activation}}`: as recorded where all of it was, recomputed otherwise.

    Args:
        record: of the trace.
        model: that was traced, or None if only the record is at hand.
        names: full hook names.
        steps: which steps; None is those that were recorded.
        branch: only the items of one branch of guidance, "cond", "uncond" or "skip".
    """
    rows = {s: rows_of(record, s, branch) for s in steps_of(record, steps)}
    found = _by_call(record, model, names, [c for of_step in rows.values() for c in of_step])
    orders = {s: order_of(record, rows[s]) for s in rows}
    return {n: {s: joined(record, n, found[n], rows[s], orders[s]) for s in rows} for n in names}


def read_branches(
    record: Record, model: HookedDiT | None, names: Sequence[str]
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """`{name: {step: {branch: activation}}}`: what can be put into another run of the same kind,
    call by call. A step that went through the model in parts is put together.

    Args:
        record: of the trace, which must hold one run.
        model: that was traced, or None if only the record is at hand.
        names: full hook names.
    """
    steps = steps_of(record, None)
    counter, runs, last = StepCounter(), set[int](), -1
    for call in record.calls:
        counter.number(call, last)
        last = max(last, counter.row)
        runs.add(counter.offset)
    if len(runs) > 1:
        raise InvalidValue(
            f"The source trace holds {len(runs)} runs, whose steps can't be paired with those of "
            "another; expected a trace of one run: trace each by itself."
        )
    found = _by_call(record, model, names, [c for s in steps for c in record.calls_at[s]])
    taken: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in names}
    for s in steps:
        groups: dict[str, Rows] = {}
        parts: Rows = {c: None for c in record.calls_at[s]}
        if any(record.calls[c].context.part is not None for c in parts):
            groups[_told(record, parts)] = parts
        for c in record.calls_at[s] if not groups else ():
            branch = record.calls[c].told
            if branch in groups:
                raise InvalidValue(
                    f"The source trace has several calls of the branch {branch!r} at step {s}, "
                    "which can't be told apart; expected one, or one for each branch of guidance."
                )
            groups[branch] = {c: None}
        for name in names:
            taken[name][s] = {
                branch: joined(record, name, found[name], rows, order_of(record, rows)).clone()
                for branch, rows in groups.items()
            }
    return taken


def _told(record: Record, parts: Rows) -> str:
    """The branches of guidance of a step that went through the model in parts, as `Call.told`."""
    words = [w for c in parts for w in record.calls[c].branch or ("",) * len(record.calls[c].x)]
    order = order_of(record, parts)
    return " | ".join(dict.fromkeys(words if order is None else [words[i] for i in order.tolist()]))


def _by_call(
    record: Record, model: HookedDiT | None, names: Sequence[str], calls: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """`{name: {call: activation}}`, as recorded or recomputed."""
    found: dict[str, dict[int, Tensor]] = {name: {} for name in names}

    def keep(name: str, call: int, value: Tensor) -> None:
        found[name][call] = record.kept(value)

    recorded, missing = split(record, names, calls)
    found |= {name: record.activations[name] for name in recorded}
    recompute(record, model, missing, calls, keep)
    return found


def stacked(
    record: Record,
    model: HookedDiT | None,
    names: Sequence[str],
    steps: Steps = None,
    branch: str | None = None,
) -> Tensor | None:
    """[name, step, batch, ...]: what `read` gives as one tensor, which is filled as the activations
    come, so that nothing is in memory twice. None where they can't be stacked.

    Args:
        record: of the trace.
        model: that was traced, or None if only the record is at hand.
        names: full hook names.
        steps: which steps; None is those that were recorded.
        branch: only the items of one branch of guidance.
    """
    rows = {s: rows_of(record, s, branch) for s in steps_of(record, steps)}
    if any(order_of(record, of_step) is not None for of_step in rows.values()):
        return None
    place: dict[int, tuple[int, slice]] = {}  # of each call: its step, and its items in the batch
    for i, of_step in enumerate(rows.values()):
        start = 0
        for c, items in of_step.items():
            stop = start + len(record.calls[c].x if items is None else items)
            place[c], start = (i, slice(start, stop)), stop
    items_of = {c: items for of_step in rows.values() for c, items in of_step.items()}
    whole: Tensor | None = None
    filled = 0

    def put(name: str, call: int, value: Tensor) -> None:
        nonlocal whole, filled
        (i, batch), items = place[call], items_of[call]
        part = value.detach() if items is None else value.detach()[items]
        if whole is None:
            size = max(b.stop for j, b in place.values() if j == i)
            shape = len(names), len(rows), size, *part.shape[1:]
            whole = part.new_empty(shape, dtype=record.dtype, device=record.device or part.device)
        target = whole[names.index(name), i, batch]
        if target.shape == part.shape:
            target.copy_(part)
            filled += part.numel()

    recorded, missing = split(record, names, list(place))
    for name in recorded:
        for c in place:
            put(name, c, record.activations[name][c])
    recompute(record, model, missing, list(place), put)
    return whole if whole is not None and filled == whole.numel() else None


def split(
    record: Record, names: Sequence[str], calls: Sequence[int]
) -> tuple[list[str], list[str]]:
    """The names that were recorded in all of these calls, and the others."""
    recorded = [n for n in names if all(c in record.activations.get(n, {}) for c in calls)]
    return recorded, [n for n in names if n not in recorded]


def steps_of(record: Record, steps: Steps) -> list[int]:
    """The steps of a trace that are asked for; None is those that were recorded."""
    if not record.calls:
        raise InvalidState(
            "Nothing was traced: no forward of the model finished inside the `with` block."
        )
    chosen = record.wanted if steps is None else step_test(steps)
    seen = sorted(record.calls_at)
    wanted = [s for s in seen if chosen(s)]
    if not wanted:
        asked = record.steps if steps is None else steps
        raise InvalidValue(
            f"No step matches {shown(asked)}; the trace has {len(seen)} steps, "
            f"{seen[0]} to {seen[-1]}."
        )
    return wanted


def rows_of(record: Record, step: int, branch: str | None) -> Rows:
    """Which items of which calls make up a step: all of them but skip-layer guidance's, or those of
    one branch.
    """
    chosen: Rows = {}
    for c in record.calls_at[step]:
        words = record.calls[c].branch_words(record.cfg.null_class)
        items = [i for i, w in enumerate(words) if (w == branch if branch else w != "skip")]
        if items:
            chosen[c] = None if len(items) == len(words) else items
    if not chosen:
        raise InvalidValue(
            f"Step {step} has no items of the branch {branch!r}; expected 'cond' or 'uncond', "
            "where guidance ran."
        )
    return chosen


def order_of(record: Record, rows: Mapping[int, list[int] | None]) -> Tensor | None:
    """Where the items of a step that went through the model in parts come from, among its calls'
    items one behind the other; None where they are in order.
    """
    places: list[int] = []
    for c, items in rows.items():
        part = record.calls[c].context.part
        if part is None:
            return None
        places += part.rows if items is None else [part.rows[i] for i in items]
    order = sorted(range(len(places)), key=places.__getitem__)
    return None if order == list(range(len(places))) else torch.tensor(order)


def joined(
    record: Record,
    name: str,
    found: dict[int, Tensor],
    rows: Rows,
    order: Tensor | None = None,
) -> Tensor:
    """One step's activation: its calls' items, one behind the other, or in this order."""
    absent = [c for c in rows if c not in found]
    if absent:
        raise InvalidState(
            f"{name!r} did not run in call {absent[0]} of the transformer: its block was skipped "
            "there."
        )
    parts = [found[c] if items is None else found[c][items] for c, items in rows.items()]
    if any(record.calls[c].context.part is not None for c in rows):
        whole = together(parts, record.sites[name])
        return whole if order is None else whole[order.to(whole.device)]
    if len({part.shape[1:] for part in parts}) > 1:
        raise InvalidValue(
            f"{name!r} has different shapes in the branches of guidance "
            f"({', '.join(str(list(p.shape)) for p in parts)}); read one: t.get(name, "
            "branch='cond')."
        )
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if order is None else whole[order.to(whole.device)]


def over_steps(name: str, at: Mapping[int, Tensor], instead: str) -> Tensor:
    """[step, ...]: what a trace has at each step; raises InvalidValue where shapes differ.

    Args:
        name: of what it is.
        at: by step.
        instead: what can be done where shapes differ.
    """
    shapes = {tuple(v.shape) for v in at.values()}
    if len(shapes) > 1:
        raise InvalidValue(
            f"{name!r} has different shapes at different steps "
            f"({', '.join(map(str, sorted(shapes)))}); {instead}."
        )
    return torch.stack([at[s] for s in sorted(at)])


def recompute(
    record: Record,
    model: HookedDiT | None,
    names: Sequence[str],
    calls: Sequence[int],
    keep: Callable[[str, int, Tensor], None],
) -> None:
    """Each call once more, with its own inputs, edits and couplings, up to the last name asked for.

    Args:
        record: of the trace.
        model: that was traced.
        names: full hook names.
        calls: which calls.
        keep: is given name, call and live activation, which it must copy or detach.
    """
    if not names:
        return
    for c in calls:
        absent = [name for name in names if name in record.calls[c].left_out]
        if absent:
            raise InvalidState(
                f"{absent[0]!r} was not computed in call {c} of the transformer: a reuse plan held "
                "what it belongs to; expected other steps, or what is added, such as "
                "'hook_attn_out'."
            )
    lost = [record.lost[c] for c in calls if c in record.lost]
    if lost:
        raise InvalidState(
            f"{names[0]!r} was not recorded, and this trace was {lost[0]} that the file can't "
            "hold; trace again with names= for what you will read."
        )
    if model is None:
        raise InvalidState(
            f"{names[0]!r} was not recorded; to recompute it, load the trace with its model: "
            "load_trace(path, model)."
        )
    model.require_eval()  # in train mode labels are dropped at random: it would be another run
    order = list(record.sites)
    furthest = max(names, key=order.index)
    steps = {c: step for step, calls_of in record.calls_at.items() for c in calls_of}
    with Taken() as taken:
        reader = object()
        taken.undo(Instrumentation.let_go, model.transformer, reader)
        model.instrumentation = Instrumentation.of(model.transformer, reader)
        for c in calls:

            def see(value: Tensor, point: HookPoint, c: int = c) -> None:
                keep(point.name, c, value)

            witness = record.calls[c].witness
            last = until(furthest, order, witness)
            proof = Proof(witness, order, last)
            observers: list[tuple[str, Listener]] = [*proof.listeners]
            observers += [(name, Observer(see)) for name in names]
            observers += model.instrumentation.stopping(last)
            with _understood(record, model, c, steps[c]):
                _again(model, record.calls[c], observers)
            _judge(proof.departure(), steps[c], record, model)


def _again(model: HookedDiT, call: Call, observers: Sequence[tuple[str, Listener]]) -> None:
    """One call of the transformer once more, as it was, with these observers."""
    inst, context = model.instrumentation, call.context
    with (
        inst.alone([*call.edits, *observers]),
        inst.under(**vars(context)),
        inst.part(context.span, context.stream),
        call.kernels.restored(call.x.device.type),
        suppress(StopForward),
    ):
        model.family.call(model.transformer, call.inputs)


@contextmanager
def _understood(record: Record, model: HookedDiT, c: int, step: int) -> Iterator[None]:
    """That the model can't be called as it was: of a call out of a file the file's mistake, of a
    model that has changed since, such as by a cast, the change's.
    """
    try:
        yield
    except DitLensError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or repr(error)
        if not record.file:
            changes = record.state.changes(State.of(model.transformer)) if record.state else []
            if not changes or isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotReproduced(
                f"Step {step} can't be recomputed, the model can no longer be called so "
                f"({reason}); {'; '.join(changes)}. Run it again, with names= for what you will "
                "read."
            ) from error
        raise InvalidValue(
            f"Call {c} of {record.file} can't be run on this model ({reason}); expected the model "
            "that was traced."
        ) from error


def _judge(departure: Departure | None, step: int, record: Record, model: HookedDiT) -> None:
    """Raise NotReproduced for another computation; warn once for rounding."""
    if departure is None:
        return
    before = record.state
    causes = [] if before is None else before.changes(State.of(model.transformer))
    if departure.is_other(causes):
        raise departure.error(step, causes)
    if record.exact:
        record.exact = False
        warnings.warn(departure.warning(step, causes), stacklevel=6)
