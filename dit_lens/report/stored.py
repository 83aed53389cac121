"""Stored results, read back and shown again: what `dit-lens report` does."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from ..errors import InvalidValue, MissingFile
from . import coupling_sweep, gap, knock_outs

FILES = {
    "gap.nc": "layer_gap",
    "coupling_sweep.nc": "parting",
    "knock_outs.nc": "effect",
    "patches.nc": "move",
}
"""The files that the commands write, and a variable by which each is known."""


def show(path: Path) -> None:
    """Print the tables and sentences of stored results and draw their pictures again.

    Args:
        path: a folder that `dit-lens gap` or `dit-lens patch` wrote, for all that is in it, or one
            of the files in it.

    Raises:
        MissingFile: if there is nothing at the path, or no result in the folder.
        InvalidValue: for a file that is no result.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
    else:
        found = [path] if path.exists() else []
    if not found:
        raise MissingFile(
            f"There are no results at {str(path)!r}; expected the folder that `dit-lens gap` or "
            f"`dit-lens patch` wrote, or one of {', '.join(FILES)} in it."
        )
    kinds = {kind: (file, results) for file in found for kind, results in [read(file)]}
    for kind, (file, results) in kinds.items():
        if kind == "gap.nc":
            gap.write(results, file.parent)
        elif kind == "coupling_sweep.nc":
            coupling_sweep.write(results, file.parent)
        elif kind == "knock_outs.nc" or "knock_outs.nc" not in kinds:
            _show_causes(file.parent)


def read(path: Path) -> tuple[str, xr.Dataset]:
    """One stored result, and which of `FILES` it is by what is in it.

    Args:
        path: of the file, by any name.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for a file that is no result of dit_lens.
    """
    if not path.exists():
        raise MissingFile(f"There is no file {str(path)!r}; expected a stored result.")
    try:
        results = xr.load_dataset(path, engine="scipy")
    except Exception as error:  # scipy raises several kinds for files that are not netCDF
        reason = str(error).partition("\n")[0]
        raise InvalidValue(
            f"{str(path)!r} is not a result of `dit-lens gap` or `patch` ({reason}); expected "
            f"one of {', '.join(FILES)}."
        ) from None
    for kind, variable in FILES.items():
        if variable in results:
            return kind, results
    raise InvalidValue(
        f"{str(path)!r} is netCDF but not a result of `dit-lens gap` or `patch`: it has none of "
        f"the variables {', '.join(FILES.values())}."
    )


def _show_causes(folder: Path) -> None:
    """Knock-outs and patches together, compared with the layer profiles where they are known."""
    _, knocked = read(folder / "knock_outs.nc")
    _, patched = read(folder / "patches.nc")
    onsets = None
    if (folder / "gap.nc").exists():
        onsets = gap.onsets(read(folder / "gap.nc")[1])
    knock_outs.write(knocked, patched, folder, onsets)
