"""Traces on disk and as xarray.

The file is one safetensors file: the inputs of every call, the recorded activations, and JSON metadata (model class, sizes,
fingerprint of the weights, scheduler). Together with the model it can recompute every name, like the trace it came from.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .families.base import Axes, Config
from .names import NamesFilter, layer_of, select, site_of
from .wiring import Call

if TYPE_CHECKING:
    import xarray as xr

    from .interventions import Steps
    from .tracing import Trace

FORMAT = "dit_lens.trace/1"


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
        raise RuntimeError("The trace is still open; save it after the `with` block.")
    tensors: dict[str, torch.Tensor] = {}
    for s, call in enumerate(trace.calls):
        tensors |= {f"call/{s}/x": call.x, f"call/{s}/t": call.t, f"call/{s}/y": call.y}
    for name, record in trace.records.items():
        tensors |= {f"record/{s}/{name}": value for s, value in record.items()}
    scheduler = trace.model.scheduler
    meta = {
        "format": FORMAT,
        "cfg": dataclasses.asdict(trace.model.cfg),
        "sites": trace.model.sites,
        "recorded_names": trace.recorded_names,
        "weights": trace.weights,
        "calls": [
            {"span": c.span, "grad": c.grad, "autocast": str(c.autocast).removeprefix("torch."), "twin": c.twin}
            for c in trace.calls
        ],
        "edits": sorted({name for c in trace.calls for name, _ in c.edits} | set(trace.lost_edits)),
        "scheduler": None
        if scheduler is None
        else {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()}, path, {"dit_lens": json.dumps(meta, default=str)}
    )
    return path


def load_trace(path: str | Path, model: Any = None) -> Trace:
    """Read a trace back. With `model` (the one it came from) everything can be recomputed; without, what was recorded can be read.

    Raises FileNotFoundError; ValueError for a file that is no trace, or a model of other sizes. Weights that differ are an error
    when something has to be recomputed.
    """
    from .model import HookedDiT
    from .tracing import Trace

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no trace at {str(path)!r}; expected a file written by Trace.save.")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("dit_lens", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}); expected one written by Trace.save."
        ) from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} is safetensors but no trace of this format; expected {FORMAT!r}, found {meta.get('format')!r}."
        )
    cfg, sites = Config(**meta["cfg"]), {n: tuple(a) for n, a in meta["sites"].items()}
    if model is None:
        owner: Any = SavedModel(list(sites), sites, cfg, _scheduler(meta["scheduler"]))
    else:
        owner = model if isinstance(model, HookedDiT) else HookedDiT(model)
        if owner.cfg != cfg:
            raise ValueError(f"{str(path)!r} was traced on another model, {cfg}; got {owner.cfg}.")
    trace = Trace(owner)
    trace.recorded_names, trace.lost_edits = meta["recorded_names"], meta["edits"]
    trace.weights = tuple(meta["weights"])
    trace._before = meta["weights"][0]
    trace.records = {name: {} for name in trace.recorded_names}
    for key, value in tensors.items():
        kind, step, name = key.split("/", 2)
        if kind == "record":
            trace.records[name][int(step)] = value
    for s, how in enumerate(meta["calls"]):
        x, t, y = (tensors[f"call/{s}/{v}"] for v in "xty")
        autocast = None if how["autocast"] == "None" else getattr(torch, how["autocast"])
        twin = tuple(how["twin"]) if how["twin"] else None
        trace.calls.append(Call(x, t, y, tuple(how["span"]), how["grad"], autocast, twin=twin))
    if trace.recorded_names:  # of these the recorded steps are what reading gives, as in the original
        kept = sorted(trace.records[trace.recorded_names[0]])
        trace.recorded_steps, trace.wanted_steps = kept, set(kept).__contains__
    return trace


def to_xarray(trace: Trace, names: NamesFilter = None, steps: Steps = None) -> xr.Dataset:
    """One variable a site, [layer, step, batch, ...], with coordinates layer, step, timestep, log_snr, label, branch, twin."""
    import xarray as xr

    chosen = trace.recorded_names if names is None else select(names, trace.names)
    if not chosen:
        raise ValueError("No names were recorded; say which to recompute: t.to_xarray('resid_post').")
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
    first = trace.calls[at[0]]
    timesteps = [float(trace.calls[s].t[0]) for s in at]
    labels = first.y.expand(len(first.x)).tolist()
    coords: dict[str, Any] = {
        "step": at,
        "timestep": ("step", timesteps),
        "label": ("batch", labels),
        "branch": ("batch", ["uncond" if y == trace.model.cfg.null_class else "cond" for y in labels]),
        "twin": ("batch", list(first.twin or [""] * len(labels))),
    }
    if trace.model.scheduler is not None:
        from .schedules import log_snr

        coords["log_snr"] = ("step", log_snr(trace.model.scheduler, torch.tensor(timesteps)).tolist())
    return xr.Dataset(variables, coords=coords)


def _scheduler(saved: dict[str, Any] | None) -> Any:
    import diffusers

    return None if saved is None else getattr(diffusers, saved["class"]).from_config(saved["config"])
