"""Activations of a record as an `xarray.Dataset` with named axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from ..errors import InvalidValue
from ..families.parts.sites import axes_of
from ..hooks.names import layer_of, site_of
from .recompute import order_of, over_steps, rows_of
from .record import Record


def to_dataset(record: Record, read: Mapping[str, Mapping[int, Tensor]]) -> xr.Dataset:
    """One variable a site, [layer, step, batch, ...], with the coordinates layer, step, timestep,
    log_snr, label, branch and twin; the last three over [step, batch] where they differ by step.

    Args:
        record: of the trace.
        read: `{name: {step: activation}}`, as `recompute.read` gives it.
    """
    at = sorted(next(iter(read.values())))
    by_site: dict[str, list[str]] = {}
    for name in read:
        by_site.setdefault(site_of(name), []).append(name)
    variables = {site: _variable(record, members, read) for site, members in by_site.items()}
    try:
        return xr.Dataset(variables, coords=_coordinates(record, at))
    except ValueError as error:  # an axis with two lengths
        raise InvalidValue(
            f"These activations have no axes in common ({error}); read fewer names at once."
        ) from None


def _variable(
    record: Record, names: list[str], read: Mapping[str, Mapping[int, Tensor]]
) -> xr.DataArray:
    """One site, of every layer that was read."""
    instead = "read one step at a time: t.to_xarray(names, steps=3)"
    value = torch.stack([over_steps(name, read[name], instead) for name in names])
    array = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    axes = ("step", *axes_of(record.sites[names[0]], array.ndim - 2))
    layers = [layer_of(name) for name in names]
    if layers[0] is None:
        return xr.DataArray(array[0], dims=axes)
    return xr.DataArray(array, dims=("layer", *axes), coords={"layer": layers})


def _coordinates(record: Record, at: list[int]) -> dict[str, Any]:
    times = timesteps(record, at)
    axes = ("step", "batch")[: times.ndim]
    coords: dict[str, Any] = {"step": at, "timestep": (axes, times.cpu().double().numpy())}
    of_step = [_items(record, s) for s in at]
    for name in of_step[0]:
        words = [items[name] for items in of_step if name in items]
        if len(words) == len(at):  # labels may be known in some of the steps only
            same = all(each == words[0] for each in words)
            coords[name] = ("batch", words[0]) if same else (("step", "batch"), words)
    noise_levels = record.noise_levels(at)
    if noise_levels is not None:
        coords["log_snr"] = ("step", noise_levels)
    return coords


def timesteps(record: Record, steps: Sequence[int]) -> Tensor:
    """The diffusion timestep of some steps, [step]; [step, batch] where items of a step have
    different ones.

    Args:
        record: of the trace.
        steps: which steps.
    """
    found: list[Tensor] = []
    for s in steps:
        rows, parts = rows_of(record, s, None), list[Tensor]()
        for c, items in rows.items():
            call = record.calls[c]
            parts.append(call.t.expand(len(call.x))[slice(None) if items is None else items])
        whole, order = torch.cat(parts), order_of(record, rows)
        found.append(whole if order is None else whole[order.to(whole.device)])
    if all(bool((each == each[0]).all()) for each in found):
        found = [each[0] for each in found]
    if not found:
        return torch.zeros(0)
    return over_steps("timesteps", dict(enumerate(found)), "trace each run by itself")


def _items(record: Record, step: int) -> dict[str, list[Any]]:
    """What is known of each item of a step's batch, in its order."""
    rows = rows_of(record, step, None)
    found: dict[str, list[Any]] = {"branch": [], "twin": []}
    calls = [(record.calls[c], items) for c, items in rows.items()]
    if all(call.labels is not None for call, _ in calls):
        found["label"] = []
    for call, items in calls:
        n = len(call.x)
        known: dict[str, Sequence[Any]] = {
            "branch": call.branch_words(record.cfg.null_class),
            "twin": call.context.twin or ("",) * n,
        }
        if call.labels is not None:
            known["label"] = call.labels.expand(n).tolist()
        for name, values in found.items():
            values += [known[name][i] for i in (range(n) if items is None else items)]
    order = order_of(record, rows)
    if order is None:
        return found
    return {name: [values[i] for i in order.tolist()] for name, values in found.items()}
