"""Activations of a record as an `xarray.Dataset` with named axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.names import layer_of, site_of
from .recompute import order_of, rows_of
from .record import Record


def to_dataset(record: Record, read: Mapping[str, Mapping[int, Tensor]]) -> xr.Dataset:
    """One variable a site, [layer, step, batch, ...], with the coordinates layer, step, timestep,
    log_snr, label, branch and twin.

    Args:
        record: of the trace.
        read: `{name: {step: activation}}`, as `recompute.read` gives it.
    """
    at = sorted(next(iter(read.values())))
    by_site: dict[str, list[str]] = {}
    for name in read:
        by_site.setdefault(site_of(name), []).append(name)
    variables = {site: _variable(record, members, read, at) for site, members in by_site.items()}
    try:
        return xr.Dataset(variables, coords=_coordinates(record, at))
    except ValueError as error:  # an axis with two lengths
        raise InvalidValue(
            f"These activations have no axes in common ({error}); read fewer names at once."
        ) from None


def _variable(
    record: Record, names: list[str], read: Mapping[str, Mapping[int, Tensor]], at: list[int]
) -> xr.DataArray:
    """One site, of every layer that was read."""
    value = torch.stack([torch.stack([read[name][s] for s in at]) for name in names])
    array = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    axes = ("step", *record.sites[names[0]])
    layers = [layer_of(name) for name in names]
    if layers[0] is None:
        return xr.DataArray(array[0], dims=axes)
    return xr.DataArray(array, dims=("layer", *axes), coords={"layer": layers})


def _coordinates(record: Record, at: list[int]) -> dict[str, Any]:
    rows = rows_of(record, at[0], None)
    calls, order = [record.calls[c] for c in rows], order_of(record, rows)
    timesteps = [float(record.calls[record.calls_at[s][0]].t[0]) for s in at]
    branch = [word for call in calls for word in call.branch_words(record.cfg.null_class)]
    twin = [word for call in calls for word in call.context.twin or ("",) * len(call.x)]
    coords: dict[str, Any] = {
        "step": at,
        "timestep": ("step", timesteps),
        "branch": ("batch", branch),
        "twin": ("batch", twin),
    }
    known = [call.labels.expand(len(call.x)) for call in calls if call.labels is not None]
    if len(known) == len(calls):
        coords["label"] = ("batch", torch.cat(known).tolist())
    if order is not None:
        for name in {"branch", "twin", "label"} & coords.keys():
            coords[name] = ("batch", [coords[name][1][i] for i in order.tolist()])
    noise_levels = record.noise_levels(at)
    if noise_levels is not None:
        coords["log_snr"] = ("step", noise_levels)
    return coords
