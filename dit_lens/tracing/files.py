"""Records on disk.

The file is one safetensors file: the inputs of every call, the recorded activations, and JSON
metadata (sizes, names, noise levels). Together with the model it can recompute every name, like the
trace it came from; where something acted that the file can't hold, such as a function, it says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import InvalidState, InvalidValue
from ..families.config import Condition, Config
from ..families.parts.sites import axes_of
from ..hooks.passes import PassContext
from ..model.call import Call
from ..model.kernels import Kernels
from ..model.witness import Checksum, Witness
from ..storage import load_tensors, save_tensors
from ..storage.schema import conform
from .recompute import order_of
from .record import Record
from .schema import DTYPES, CallParts, ContextParts, KeptCall, TraceFile

FORMAT = "dit_lens.trace/5"
EXPECTED = "a trace written by Trace.save"
DEPTH = 8
"""So many dicts and lists may lie in each other in the arguments of a call."""


def save(record: Record, path: str | Path) -> Path:
    """Write a record; see `Trace.save`."""
    for step in record.calls_at:
        if order_of(record, dict.fromkeys(record.calls_at[step])) is not None:
            raise InvalidState(
                f"Step {step} went through the model in parts that are not in the batch's order, "
                "which a file can't hold; trace a run without batch= to save it."
            )
    tensors: dict[str, Tensor] = {}
    packer = _Packer(tensors)
    calls = [_packed(c, record.lost.get(i), i, packer) for i, c in enumerate(record.calls)]
    for name, activations in record.activations.items():
        tensors |= {f"record/{c}/{name}": value for c, value in activations.items()}
    steps = sorted(record.calls_at)
    about: dict[str, Any] = {
        "cfg": dataclasses.asdict(record.cfg),
        "sites": {name: list(axes) for name, axes in record.sites.items()},
        "names": list(record.names),
        "calls": calls,
        "calls_at": [[step, record.calls_at[step]] for step in steps],
        "log_snr": record.noise_levels(steps),
    }
    if record.dtype is not None:
        about["dtype"] = str(record.dtype).removeprefix("torch.")
    device = record.calls[0].x.device if record.calls else None
    if device is not None and device.type != "cpu":
        about["on_host"] = [key for key, value in tensors.items() if value.device.type == "cpu"]
    return save_tensors(path, FORMAT, about, tensors, device)


def load(path: str | Path, device: torch.device | None = None) -> Record:
    """Read a record back.

    Args:
        path: the file.
        device: where to put what was on the model's device; None is the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no trace, or is damaged.
    """
    said, tensors = load_tensors(path, FORMAT, EXPECTED)
    where = repr(str(path))
    about = conform(said, TraceFile, where)
    problem = next(_problems(about, tensors), None)
    if problem is not None:
        raise InvalidValue(f"{where} has {problem}; expected {EXPECTED}.")
    if device is not None:
        for key in tensors.keys() - set(about.on_host):
            tensors[key] = tensors[key].to(device)
    return _record(about, tensors, where)


def _record(about: TraceFile, tensors: dict[str, Tensor], where: str) -> Record:
    record = Record(
        sites=about.sites,
        cfg=Config(**dict(about.cfg)),
        names=list(about.names),
        dtype=None if about.dtype is None else DTYPES[about.dtype],
        calls=[_restored(how, i, tensors) for i, how in enumerate(about.calls)],
        calls_at={step: list(calls) for step, calls in about.calls_at},
        activations={name: {} for name in about.names},
        lost={i: how.lost for i, how in enumerate(about.calls) if how.lost},
        file=where,
    )
    if about.log_snr is not None:
        record.log_snr = dict(zip(record.calls_at, about.log_snr, strict=True))
    for key, value in tensors.items():
        kind, call, name = key.split("/", 2)
        if kind == "record":
            record.activations[name][int(call)] = value
    if record.names:  # of these the recorded steps are what reading gives, as in the original
        recorded = record.activations[record.names[0]]
        kept = [s for s, calls in record.calls_at.items() if recorded.keys() & set(calls)]
        record.steps, record.wanted = kept, set(kept).__contains__
    return record


# Calls.


class _Lost(Exception):
    """Something that the file can't hold, in words."""


class _Packer:
    """Values as JSON, with their tensors put beside under names; a tensor that comes again is
    written once.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.written: dict[int, str] = {}

    def pack(self, value: Any, at: str, depth: int = 0) -> Any:
        """A value, or _Lost."""
        if isinstance(value, Tensor):
            return {"tensor": self._put(value, at)}
        if isinstance(value, np.ndarray):
            return {"array": self._put(_as_tensor(value, at), at)}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if depth == DEPTH:
            raise _Lost(_words(at, value))
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {"dict": {k: self.pack(v, f"{at}/{k}", depth + 1) for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.pack(v, f"{at}/{i}", depth + 1) for i, v in enumerate(value)]}
        small = not isinstance(value, int) or abs(value) < 1 << 63
        if small and (value is None or isinstance(value, (bool, int, float, str))):
            return {"value": value}
        raise _Lost(_words(at, value))

    def _put(self, value: Tensor, at: str) -> str:
        if id(value) not in self.written:
            try:
                safetensors.torch.save({"": value.detach().reshape(-1)[:0].contiguous()})
            except (KeyError, ValueError, TypeError, RuntimeError, AttributeError):
                # a layout or dtype that safetensors does not have
                raise _Lost(_words(at, value)) from None
            self.written[id(value)] = at
            self.tensors[at] = value
        return self.written[id(value)]


def _as_tensor(value: np.ndarray, at: str) -> Tensor:
    try:
        return torch.from_numpy(value.copy())
    except TypeError:  # of objects or texts
        raise _Lost(_words(at, value)) from None


def _words(at: str, value: Any) -> str:
    _, _, part, *names = at.split("/")
    return f"called with {'.'.join(names) or part}, a {type(value).__name__}"


def _packed(call: Call, lost: str | None, number: int, packer: _Packer) -> dict[str, Any]:
    """A call as JSON."""
    key = f"call/{number}"
    if call.witness:
        sums = call.witness.together()
        packer.tensors |= {f"{key}/bits": sums.bits, f"{key}/totals": sums.total}
    missing = [*([lost] if lost else []), *_functions(call)]

    def pack(owner: Any, name: str, at: str) -> Any:
        try:
            return packer.pack(getattr(owner, name), at)
        except _Lost as what:
            missing.append(str(what))
            return {"dict": {}} if name in ("inputs", "condition") else {"value": None}

    return {
        "call": {name: pack(call, name, f"{key}/{name}") for name in CallParts.model_fields},
        "context": {
            name: pack(call.context, name, f"{key}/context/{name}")
            for name in ContextParts.model_fields
        },
        "kernels": dataclasses.asdict(call.kernels),
        "witness": list(call.witness),
        "lost": " and ".join(missing),
    }


def _functions(call: Call) -> Iterator[str]:
    """What acted in a call and is a function, in words that follow "this trace was"."""
    if call.edits:
        yield f"edited at {call.edits[0][0]!r} by a function"
    layers = sorted(call.context.couplings)
    if layers:
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        yield f"of twins coupled inside the attention of {which} by a function"


def _restored(how: KeptCall, number: int, tensors: dict[str, Tensor]) -> Call:
    parts = {name: packed.unpacked(tensors) for name, packed in how.call}
    parts["condition"] = Condition.numbered(parts["condition"], parts["labels"])
    context = PassContext(**{name: packed.unpacked(tensors) for name, packed in how.context})
    witness = Witness()
    if how.witness:
        key = f"call/{number}"
        witness.add(how.witness, Checksum(tensors[f"{key}/bits"], tensors[f"{key}/totals"]))
    kernels = Kernels(**dict(how.kernels))
    return Call(**parts, context=context, kernels=kernels, witness=witness)


# What does not fit.


def _problems(about: TraceFile, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What does not fit together, in words that follow "the file has"."""
    steps = [step for step, _ in about.calls_at]
    placed = [number for _, made in about.calls_at for number in made]
    named = {*about.names, *(name for how in about.calls for name in how.witness)}
    if not named <= about.sites.keys():
        yield "names that are none of its hook points"
    if steps != sorted(set(steps)) or sorted(placed) != list(range(len(about.calls))):
        yield "steps that are not in order, or calls that are of no step or of two"
    if not all(made for _, made in about.calls_at):
        yield "a step without calls"
    if about.log_snr is not None and len(about.log_snr) != len(steps):
        yield f"{len(about.log_snr)} noise levels for {len(steps)} steps"

    items: list[int] = []
    for i, how in enumerate(about.calls):
        try:
            call = _restored(how, i, tensors)
        except (KeyError, ValueError, TypeError):
            yield f"a call {i} of which tensors are missing"
            return
        problem = next(_problems_of(call), None)
        if problem is not None:
            yield f"{problem} in call {i}"
            return
        items.append(len(call.x))
    for key, value in tensors.items():
        kind, number, name = [*key.split("/", 2), "", ""][:3]
        if kind not in ("call", "record") or not re.fullmatch("[0-9]{1,9}", number):
            yield f"a tensor {key!r:.60}"
            return
        if kind == "call":
            continue
        if name not in about.names or int(number) >= len(items):
            yield f"a record {key!r:.60} of no hook point or call"
            return
        axes = axes_of(about.sites[name], value.ndim)
        if (
            not value.is_floating_point()
            or value.ndim != len(axes)
            or (axes[:1] == ("batch",) and value.shape[0] != items[int(number)])
        ):
            yield f"{value.dtype} {list(value.shape)} recorded at {name!r}"


def _problems_of(call: Call) -> Iterator[str]:
    if not isinstance(call.x, Tensor) or not call.x.is_floating_point() or call.x.ndim < 2:
        yield "no latents"
        return
    items = len(call.x)
    if not (
        isinstance(call.t, Tensor)
        and call.t.ndim == 1
        and len(call.t) in (1, items)
        and not call.t.is_complex()
        and bool(torch.isfinite(call.t).all())
    ):
        yield "no diffusion time"
    for labels in (call.labels, call.context.labels):
        if labels is not None and not (
            isinstance(labels, Tensor)
            and not labels.is_floating_point()
            and not labels.is_complex()
            and labels.ndim == 1
            and len(labels) in (1, items)
        ):
            yield "labels that are no numbers"
    for words in (call.branch, call.context.twin):
        if words is not None and len(words) != items:
            yield f"words for {items} items that are not as many"
    stream = call.context.stream
    if stream is not None and not (isinstance(stream, Tensor) and stream.ndim == 3):
        yield "no residual stream"
    for sums in call.witness.values():
        if sums.bits.shape != (items,) or sums.bits.dtype != torch.int64:
            yield "checksums that are none"
        elif sums.total.shape != (items,) or sums.total.dtype != torch.float32:
            yield "checksums that are none"
