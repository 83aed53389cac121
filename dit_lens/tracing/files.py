"""Traces on disk and as xarray.

The file is one safetensors file: the inputs of every call, the recorded activations, and JSON
metadata (model class, sizes, fingerprint of the weights, scheduler). Together with the model it can
recompute every name, like the trace it came from.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InvalidState, InvalidValue, MissingFile
from ..families.base import Axes, Condition, Config
from ..hooks.names import NamesFilter, layer_of, select, site_of
from ..model.call import Call
from .probe import Site
from .recompute import rows_of

if TYPE_CHECKING:
    import xarray as xr

    from ..hooks.edits import Steps
    from .trace import Trace

FORMAT = "dit_lens.trace/2"


@dataclasses.dataclass
class SavedModel:
    """What is known of a trace's model when only the file is at hand."""

    names: list[str]
    sites: dict[str, Axes]
    cfg: Config
    scheduler: Any = None


def save(trace: Trace, path: str | Path) -> Path:
    """Write the trace; see `Trace.save`."""
    path = Path(path)
    if trace._open:
        raise InvalidState("The trace is still open; save it after the `with` block.")
    tensors: dict[str, torch.Tensor] = {}
    written: dict[int, str] = {}
    described = [_packed(call, f"call/{c}", tensors, written) for c, call in enumerate(trace.calls)]
    for name, record in trace.records.items():
        tensors |= {f"record/{c}/{name}": value for c, value in record.items()}
    scheduler = trace.model.scheduler
    meta = {
        "format": FORMAT,
        "cfg": dataclasses.asdict(trace.model.cfg),
        "sites": trace.model.sites,
        "recorded_names": trace.recorded_names,
        "weights": trace.weights,
        "calls": described,
        "calls_at": trace.calls_at,
        "edits": sorted({name for c in trace.calls for name, _ in c.edits} | set(trace.lost_edits)),
        "scheduler": None
        if scheduler is None
        else {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()},
        path,
        {"dit_lens": json.dumps(meta, default=str)},
    )
    return path


def load_trace(path: str | Path, model: Any = None) -> Trace:
    """Read a trace back.

    With `model` (the one it came from) everything can be recomputed; without, what was recorded can
    be read.

    Raises FileNotFoundError; ValueError for a file that is no trace, or a model of other sizes.
    Weights that differ are an error when something has to be recomputed.
    """
    from ..model.hooked import HookedDiT
    from .trace import Trace

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
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
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
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in meta["cfg"].items()
    }
    cfg = Config(**sizes)
    sites = {n: tuple(a) for n, a in meta["sites"].items()}
    if model is None:
        owner: Any = SavedModel(list(sites), sites, cfg, _scheduler(meta["scheduler"]))
    else:
        owner = model if isinstance(model, HookedDiT) else HookedDiT(model)
        if owner.cfg != cfg:
            raise InvalidValue(
                f"{str(path)!r} was traced on another model, {cfg}; got {owner.cfg}."
            )
    trace = Trace(owner)
    trace.recorded_names, trace.lost_edits = meta["recorded_names"], meta["edits"]
    trace.weights = tuple(meta["weights"])
    trace._before = meta["weights"][0]
    trace.records = {name: {} for name in trace.recorded_names}
    for key, value in tensors.items():
        kind, step, name = key.split("/", 2)
        if kind == "record":
            trace.records[name][int(step)] = value
    trace.calls = [_unpacked(how, tensors) for how in meta["calls"]]
    trace.calls_at = meta["calls_at"]
    # of these the recorded steps are what reading gives, as in the original
    if trace.recorded_names:
        recorded = trace.records[trace.recorded_names[0]]
        kept = [s for s, calls in enumerate(trace.calls_at) if recorded.keys() & set(calls)]
        trace.recorded_steps, trace.wanted_steps = kept, set(kept).__contains__
    return trace


def to_xarray(trace: Trace, names: NamesFilter = None, steps: Steps = None) -> xr.Dataset:
    """One variable a site, [layer, step, batch, ...], with coordinates layer, step, timestep,
    log_snr, label, branch, twin.
    """
    import xarray as xr

    chosen = trace.recorded_names if names is None else select(names, trace.names)
    if not chosen:
        raise InvalidValue(
            "No names were recorded; say which to recompute: t.to_xarray('resid_post')."
        )
    read = trace.read(chosen, steps)
    at = sorted(next(iter(read.values())))
    by_site: dict[str, list[str]] = {}
    for name in chosen:
        by_site.setdefault(site_of(name), []).append(name)
    variables = {}
    for site, members in by_site.items():
        value = torch.stack([torch.stack([read[name][s] for s in at]) for name in members])
        array = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
        axes = ("step", *trace.model.sites[members[0]])
        layers = [layer_of(name) for name in members]
        if layers[0] is None:
            variables[site] = xr.DataArray(array[0], dims=axes)
        else:
            variables[site] = xr.DataArray(array, dims=("layer", *axes), coords={"layer": layers})
    calls = [trace.calls[c] for c in rows_of(trace, at[0], None)]
    timesteps = [float(trace.timesteps[s]) for s in at]
    sites = [Site("", at[0], (), call, trace.model.cfg.null_class) for call in calls]
    coords: dict[str, Any] = {
        "step": at,
        "timestep": ("step", timesteps),
        "branch": ("batch", [word for site in sites for word in site.branch]),
        "twin": ("batch", [word for site in sites for word in site.twin]),
    }
    known = [call.labels.expand(len(call.x)) for call in calls if call.labels is not None]
    if len(known) == len(calls):
        coords["label"] = ("batch", torch.cat(known).tolist())
    family = getattr(trace.model, "family", None)
    # whose time may be in other units
    if trace.model.scheduler is not None and not (family and family.read_only):
        from ..sampling.schedulers import log_snr

        coords["log_snr"] = (
            "step",
            log_snr(trace.model.scheduler, torch.tensor(timesteps)).tolist(),
        )
    return xr.Dataset(variables, coords=coords)


def _scheduler(saved: dict[str, Any] | None) -> Any:
    import diffusers

    return (
        None if saved is None else getattr(diffusers, saved["class"]).from_config(saved["config"])
    )


def _packed(
    call: Call, key: str, tensors: dict[str, torch.Tensor], written: dict[int, str]
) -> dict[str, Any]:
    """A call as JSON with its tensors put beside under names; a tensor that several calls share is
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

    parts = {name: pack(getattr(call, name), f"{key}/{name}") for name in PACKED}
    return parts | {"autocast": str(call.autocast).removeprefix("torch."), "grad": call.grad}


def _unpacked(how: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Call:
    def unpack(value: Any) -> Any:
        ((kind, inside),) = value.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "dict":
            return {k: unpack(v) for k, v in inside.items()}
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(unpack(v) for v in inside)
        return inside

    parts = {name: unpack(how[name]) for name in PACKED}
    parts["condition"] = Condition(parts["condition"])
    parts["condition"].labels = parts["labels"]
    autocast = None if how["autocast"] == "None" else getattr(torch, how["autocast"])
    return Call(**parts, grad=how["grad"], autocast=autocast)


PACKED = (
    "inputs",
    "x",
    "t",
    "labels",
    "span",
    "stream",
    "twin",
    "branch",
    "place",
    "grid",
    "condition",
)
