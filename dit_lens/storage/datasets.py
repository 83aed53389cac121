"""Results: xarray datasets as sealed netCDF."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from ..errors import InvalidValue
from .provenance import provenance, wrote
from .seals import EMPTY_SEAL, check_seal, seal
from .writing import replacing

KIND, PROVENANCE, SEAL_NAME = "dit_lens_kind", "dit_lens_provenance", "dit_lens_seal"


def save_dataset(path: str | Path, kind: str, results: xr.Dataset) -> Path:
    """Write a result as netCDF, with what made it.

    Args:
        path: the file; its folder is made.
        kind: what it is.
        results: the result.

    Returns:
        The path.

    Raises:
        UnwritableFile: where it can't be written.
    """
    mark = {SEAL_NAME: EMPTY_SEAL, KIND: kind, PROVENANCE: json.dumps(provenance())}
    sealed = results.assign_attrs()
    sealed.attrs = mark | {k: v for k, v in results.attrs.items() if k not in mark}
    with replacing(path) as part:
        sealed.to_netcdf(part, engine="scipy")
        seal(part)
    wrote(Path(path))
    return Path(path)


def made_with(path: str | Path) -> dict[str, str]:
    """What made a file of `save_dataset`: versions and the date, and of a command its line, its
    model and the device, by name.

    Args:
        path: the file, read and found whole before.
    """
    with xr.open_dataset(path, engine="scipy") as results:
        found: dict[str, str] = json.loads(results.attrs[PROVENANCE])
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
    for key in (SEAL_NAME, KIND, PROVENANCE):
        results.attrs.pop(key, None)
    return kind, results
