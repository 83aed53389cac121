"""Results: xarray datasets as sealed netCDF."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xarray as xr

from ..errors import InvalidValue
from .seals import EMPTY_SEAL, check_seal, seal, versions
from .writing import replacing

KIND, VERSIONS, SEAL_NAME = "dit_lens_kind", "dit_lens_versions", "dit_lens_seal"


def save_dataset(
    path: str | Path, kind: str, results: xr.Dataset, device: torch.device | str | None = None
) -> Path:
    """Write a result as netCDF.

    Args:
        path: the file; its folder is made.
        kind: what it is.
        results: the result.
        device: that computed it.

    Returns:
        The path.

    Raises:
        UnwritableFile: where it can't be written.
    """
    mark = {SEAL_NAME: EMPTY_SEAL, KIND: kind, VERSIONS: json.dumps(versions(device))}
    sealed = results.assign_attrs()
    sealed.attrs = mark | {k: v for k, v in results.attrs.items() if k not in mark}
    with replacing(path) as part:
        sealed.to_netcdf(part, engine="scipy")
        seal(part)
    return Path(path)


def made_with(path: str | Path) -> dict[str, str]:
    """The versions and the device that made a file of `save_dataset`, by name.

    Args:
        path: the file, read and found whole before.
    """
    with xr.open_dataset(path, engine="scipy") as results:
        found: dict[str, str] = json.loads(results.attrs[VERSIONS])
    return found


def load_dataset(path: str | Path, expected: str) -> tuple[str, xr.Dataset]:
    """The kind and the result of a file of `save_dataset`.

    Args:
        path: the file.
        expected: what it should be, in words.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: if it is damaged, or something else.
    """
    check_seal(path, expected)
    try:
        results = xr.load_dataset(path, engine="scipy")
    except Exception as error:  # scipy raises several kinds for files that are not netCDF
        reason = str(error).partition("\n")[0]
        raise InvalidValue(
            f"{str(path)!r} is not netCDF ({reason}); expected {expected}."
        ) from None
    kind = str(results.attrs.get(KIND))
    for key in (SEAL_NAME, KIND, VERSIONS):
        results.attrs.pop(key, None)
    return kind, results
