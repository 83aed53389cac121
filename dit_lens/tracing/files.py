"""Records on disk.

The file is one safetensors file: the inputs of every call, the recorded activations, and JSON
metadata (sizes, names, scheduler). Together with the model it can
recompute every name, like the trace it came from.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InvalidValue, MissingFile
from ..families.config import Condition, Config
from ..hooks.passes import PassContext
from ..model.call import Call
from ..model.kernels import Kernels
from ..model.witness import Checksum, Witness
from .record import Record

FORMAT = "dit_lens.trace/3"
OF_CALL = ("inputs", "x", "t", "labels", "branch", "place", "grid", "condition")
OF_CONTEXT = ("span", "stream", "labels", "twin")


def save(record: Record, path: str | Path) -> Path:
    """Write a record; see `Trace.save`."""
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    written: dict[int, str] = {}
    calls = [_packed(c, f"call/{i}", tensors, written) for i, c in enumerate(record.calls)]
    for name, activations in record.activations.items():
        tensors |= {f"record/{c}/{name}": value for c, value in activations.items()}
    edited = {name for call in record.calls for name, _ in call.edits}
    edited |= {f"blocks.{i}.attn.hook_z" for call in record.calls for i in call.context.couplings}
    scheduler = record.scheduler
    meta = {
        "format": FORMAT,
        "cfg": dataclasses.asdict(record.cfg),
        "sites": record.sites,
        "names": record.names,
        "calls": calls,
        "calls_at": sorted(record.calls_at.items()),
        "edits": sorted(edited | set(record.lost_edits)),
        "scheduler": scheduler
        and {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_separate(tensors), path, {"dit_lens": json.dumps(meta, default=str)})
    return path


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a file takes them: contiguous, and no two in the same memory. Only those that
    are not so are copied: what a trace has recorded can be large.
    """
    apart, seen = {}, set()
    for key, value in tensors.items():
        own = value.detach().contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        apart[key] = own
    return apart


def load(path: str | Path) -> Record:
    """Read a record back.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no trace.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFile(
            f"There is no trace at {str(path)!r}; expected a file written by Trace.save."
        )
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("dit_lens", "{}"))
            # cloned: in the file tensors lie anywhere, and CPU kernels give other last bits on
            # unaligned memory
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key).clone() for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidValue(
            f"{str(path)!r} is not a whole safetensors file ({error}); expected one written by "
            "Trace.save."
        ) from None
    if meta.get("format") != FORMAT:
        raise InvalidValue(
            f"{str(path)!r} is safetensors but no trace of this format; expected {FORMAT!r}, found "
            f"{meta.get('format')!r}."
        )
    return _record(meta, tensors)


def _record(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Record:
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in meta["cfg"].items()
    }
    record = Record(
        sites={name: tuple(axes) for name, axes in meta["sites"].items()},
        cfg=Config(**sizes),
        scheduler=_scheduler(meta["scheduler"]),
        names=meta["names"],
        calls=[_unpacked(how, f"call/{i}", tensors) for i, how in enumerate(meta["calls"])],
        calls_at=dict(meta["calls_at"]),
        activations={name: {} for name in meta["names"]},
        lost_edits=meta["edits"],
    )
    for key, value in tensors.items():
        kind, call, name = key.split("/", 2)
        if kind == "record":
            record.activations[name][int(call)] = value
    if record.names:  # of these the recorded steps are what reading gives, as in the original
        recorded = record.activations[record.names[0]]
        kept = [s for s, calls in record.calls_at.items() if recorded.keys() & set(calls)]
        record.steps, record.wanted = kept, set(kept).__contains__
    return record


def _scheduler(saved: dict[str, Any] | None) -> Any:
    return saved and getattr(diffusers, saved["class"]).from_config(saved["config"])


def _packed(
    call: Call, key: str, tensors: dict[str, torch.Tensor], written: dict[int, str]
) -> dict[str, Any]:
    """A call as JSON, with its tensors put beside under names; a tensor that several calls share is
    written once.
    """

    def pack(value: Any, at: str) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in written:
                written[id(value)] = at
                tensors[at] = value
            return {"tensor": written[id(value)]}
        if isinstance(value, dict):
            return {"dict": {k: pack(v, f"{at}/{k}") for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [pack(v, f"{at}/{i}") for i, v in enumerate(value)]}
        return {"value": value}

    if call.witness:
        tensors[f"{key}/bits"] = torch.stack([c.bits for c in call.witness.values()])
        tensors[f"{key}/totals"] = torch.stack([c.total for c in call.witness.values()])
    return {
        "call": {name: pack(getattr(call, name), f"{key}/{name}") for name in OF_CALL},
        "context": {
            name: pack(getattr(call.context, name), f"{key}/context/{name}") for name in OF_CONTEXT
        },
        "kernels": call.kernels.as_json(),
        "witness": list(call.witness),
    }


def _unpacked(how: dict[str, Any], key: str, tensors: dict[str, torch.Tensor]) -> Call:
    def unpack(value: Any) -> Any:
        ((kind, inside),) = value.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "dict":
            return {k: unpack(v) for k, v in inside.items()}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(unpack(v) for v in inside)
        return inside

    parts = {name: unpack(how["call"][name]) for name in OF_CALL}
    parts["condition"] = Condition.numbered(parts["condition"], parts["labels"])
    context = PassContext(**{name: unpack(how["context"][name]) for name in OF_CONTEXT})
    witness: Witness = {}
    if how["witness"]:
        sums = zip(tensors[f"{key}/bits"], tensors[f"{key}/totals"], strict=True)
        witness = {n: Checksum(*both) for n, both in zip(how["witness"], sums, strict=True)}
    kernels = Kernels.from_json(how["kernels"])
    return Call(**parts, context=context, kernels=kernels, witness=witness)
