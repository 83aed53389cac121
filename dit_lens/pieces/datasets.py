"""Datasets as the arrays of a piece, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def flat(dataset: xr.Dataset, name: str = "dataset") -> dict[str, NDArray[Any]]:
    """A dataset as arrays of numbers, its words in one of them.

    Args:
        dataset: with variables, coordinates and attributes that JSON can hold, or arrays.
        name: that the arrays' names begin with.
    """
    words: dict[str, Any] = {"attrs": dict(dataset.attrs), "dims": {}, "words": {}}
    found: dict[str, NDArray[Any]] = {}
    words["coords"] = [str(key) for key in dataset.coords]
    for key, value in dataset.variables.items():
        words["dims"][str(key)] = [str(dim) for dim in value.dims]
        if value.dtype.kind in "biuf":
            found[f"{name} {key}"] = np.asarray(value.values)
        else:
            words["words"][str(key)] = value.values.tolist()
    found[name] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    return found


def whole(arrays: Mapping[str, NDArray[Any]], name: str = "dataset") -> xr.Dataset:
    """The dataset that `flat` took apart.

    Args:
        arrays: as it gave them, among others.
        name: the same.

    >>> was = xr.Dataset({"x": ("band", [1.0, 2.0])}, {"band": ["low", "high"]}, {"steps": 3})
    >>> whole(flat(was)).identical(was)
    True
    """
    words = json.loads(arrays[name].tobytes())
    values = {
        key: (dims, words["words"][key] if key in words["words"] else arrays[f"{name} {key}"])
        for key, dims in words["dims"].items()
    }
    coords = {key: values.pop(key) for key in words["coords"]}
    return xr.Dataset(values, coords, words["attrs"])
