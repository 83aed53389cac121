"""Stores: a folder that is a zarr group, with a group of its own for each finished piece.

The root's attributes say which measurement it is of: name, settings, model, versions. A piece is
written beside its place and moved there whole; what was cut off leaves a part behind that nobody
reads. Any reader of zarr opens it, as `xarray.open_zarr(folder / piece)`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import cut
from ..errors import DitLensError, InvalidState, InvalidValue, MissingFile, UnwritableFile
from ..storage import locked, replacing, try_folder
from ..storage.writing import unwritable
from .leases import Leases, here

KIND = "dit_lens.pieces/1"
ROOT, CLAIMS, LOCK, DEVICE = "zarr.json", ".claims", ".driver", ".device"
NEEDED = "A store of pieces needs zarr 3, which is not installed; pip install 'dit-lens[scale]'."

Arrays = Mapping[str, NDArray[Any]]
"""What a piece gives: arrays by name, numbers and truth values only."""


def has_zarr() -> bool:
    """Whether stores can be written here: they take zarr 3."""
    try:
        return int(importlib.metadata.version("zarr").partition(".")[0]) >= 3
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


class Store:
    """A folder of finished pieces.

    Args:
        folder: where; it is made.
        about: which measurement it is of: `measurement`, `settings`, `model` and `versions`, texts
            by name.
        extra: what else its root says, for those who help.
        device: the kind that runs pieces here; None where none are run.

    Raises:
        MissingFile: where zarr is not installed.
        InvalidValue: for a store of another measurement, or a folder that is none.
        UnwritableFile: for a folder that can't be written.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> None:
        if not has_zarr():
            raise MissingFile(NEEDED)
        self.folder, self.about = folder.absolute(), dict(about)
        try:
            self._open(extra)
            if device is not None:
                self._one_kind_of(device)
        except OSError as error:
            if isinstance(error, DitLensError):
                raise
            raise UnwritableFile(unwritable(folder, error)) from error
        self.leases = Leases(self.folder / CLAIMS)
        self.kept = ExitStack()
        self.kept.callback(self.leases.close)

    def _open(self, extra: Mapping[str, Any] | None) -> None:
        """Write the root, or find it there."""
        known = read_root(self.folder) if self.folder.exists() else None
        if known is None:
            try_folder(self.folder)
            attributes = {"kind": KIND, "about": self.about} | dict(extra or {})
            root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
            with replacing(self.folder / ROOT) as part:
                part.write_text(json.dumps(root, indent=1))
        else:
            same_measurement(self.folder, known["about"], self.about)
            try_folder(self.folder)
        (self.folder / CLAIMS).mkdir(exist_ok=True)

    def _one_kind_of(self, device: str) -> None:
        """Refuse another kind of device than the first one's: it rounds otherwise."""
        first = self.folder / DEVICE
        if not first.exists():
            with replacing(first) as part:
                part.write_text(device)
        if (known := first.read_text(errors="replace")) != device:
            raise InvalidValue(
                f"The pieces in {str(self.folder)!r} are run on {known}, and this process has "
                f"{device}, which rounds otherwise; expected --device {known}, or another store."
            )

    def close(self) -> None:
        """Give up every claim."""
        self.kept.close()

    def lead(self) -> None:
        """Be the one that the measurement is for; others may only help.

        Raises:
            InvalidState: if another process is.
        """
        try:
            self.kept.enter_context(locked(self.folder / LOCK))
        except InvalidState as error:
            holder = str(error).partition(" in use by ")[2].partition(";")[0]
            raise InvalidState(
                f"{str(self.folder)!r} is in use by {holder or 'another process'}; wait for it, "
                "help it with dit-lens work, or give another --store."
            ) from None
        for part in self.folder.glob(".part-*"):
            owner = part.name.split("-")
            alive = owner[1:2] != [host_digest()] or _is_alive(owner[2])
            if not alive:
                shutil.rmtree(part, ignore_errors=True)

    def there(self, names: Sequence[str]) -> set[str]:
        """Which of these pieces are there.

        Raises:
            InvalidValue: if one is there in part.
        """
        found = {name for name in names if (self.folder / name / ROOT).exists()}
        for name in names:
            path = self.folder / name
            if name not in found and os.path.lexists(path) and not (path / ROOT).exists():
                raise InvalidValue(
                    f"The piece {str(path)!r} is not whole, as in a store that was copied in part; "
                    "delete it and start again: only it is run once more."
                )
        return found

    def names(self) -> list[str]:
        """The pieces that are there."""
        return sorted(p.parent.name for p in self.folder.glob(f"[!.]*/{ROOT}"))

    def read(self, name: str) -> tuple[dict[str, NDArray[Any]], float]:
        """A piece's arrays, and how many seconds it took.

        Args:
            name: of the piece.

        Raises:
            InvalidValue: if it is damaged.
        """
        import xarray as xr

        path = self.folder / name
        try:
            with xr.open_zarr(path, consolidated=False, decode_cf=False, chunks=None) as opened:
                held, about = opened.load(), dict(opened.attrs)
            arrays = {key: np.asarray(held[key].values) for key in about["order"]}
            whole, seconds = checksum(arrays) == about["sha256"], float(about["seconds"])
        except Exception as error:  # zarr raises many kinds for damaged files
            raise InvalidValue(
                f"The piece {str(path)!r} can't be read ({_first(error)}); delete that folder and "
                "start again: only it is run once more."
            ) from None
        if not whole:
            raise InvalidValue(
                f"The piece {str(path)!r} is damaged: it is not what was written, by its checksum; "
                "delete that folder and start again: only it is run once more."
            )
        return arrays, seconds

    def write(self, name: str, arrays: Arrays, seconds: float) -> None:
        """Keep a finished piece; one that is there already stays.

        Args:
            name: of the piece.
            arrays: what it gave.
            seconds: how long it took.

        Raises:
            UnwritableFile: where it can't be written, such as on a full disk.
        """
        import xarray as xr

        path = self.folder / name
        part = self.folder / f".part-{host_digest()}-{os.getpid()}-{name}"
        held = xr.Dataset(
            {
                key: ([f"{key}_{i}" for i in range(value.ndim)], value)
                for key, value in arrays.items()
            },
            attrs={"order": list(arrays), "seconds": seconds, "sha256": checksum(arrays)},
        )
        # one chunk an array, as it is: what is read is what was written
        encoding = {
            key: {"compressors": None, "chunks": tuple(max(1, n) for n in value.shape)}
            for key, value in arrays.items()
        }
        try:
            shutil.rmtree(part, ignore_errors=True)
            held.to_zarr(part, mode="w-", consolidated=False, zarr_format=3, encoding=encoding)
            with suppress(OSError):
                os.rename(part, path)
            if not self.there([name]):
                os.rename(part, path)
        except OSError as error:
            reason = error.strerror or _first(error)
            raise UnwritableFile(
                f"{str(path)!r} can't be written ({reason}); what was finished is kept: make room, "
                "or give another place, and start again."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def claim(self, name: str) -> bool:
        """Take a piece that nobody is at."""
        return self.leases.claim(name)

    def release(self) -> None:
        """Give up the piece that was taken."""
        self.leases.release()


def read_root(folder: Path) -> dict[str, Any] | None:
    """What the root of a store says; None for an empty folder.

    Args:
        folder: that is there.

    Raises:
        InvalidValue: for anything else than a store.
    """
    expected = "expected a store of pieces, or a folder that is empty or not there yet"
    if not folder.is_dir():
        raise InvalidValue(f"{str(folder)!r} is a file; {expected}.")
    root = folder / ROOT
    if not root.exists():
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if others:
            raise InvalidValue(f"{str(folder)!r} holds {others[0]!r} and no store; {expected}.")
        return None
    try:
        found = json.loads(root.read_text())["attributes"]
        kind, about = found["kind"], found["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValue(
            f"{str(root)!r} is damaged or not ours ({_first(error)}); {expected}."
        ) from None
    if kind != KIND or not isinstance(about, dict):
        raise InvalidValue(f"{str(folder)!r} is a store of the kind {kind!r}; expected {KIND!r}.")
    return dict(found)


def same_measurement(folder: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse a store of another measurement, model or version, naming the first difference.

    Args:
        folder: of the store.
        known: what it is of.
        about: what is measured now.

    Raises:
        InvalidValue: if they differ.
    """
    for what in dict.fromkeys([*known, *about]):
        was, now = known.get(what), about.get(what)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            name = next(k for k in [*was, *now] if was.get(k) != now.get(k))
            was, now, what = was.get(name), now.get(name), f"{what.rstrip('s')} {name}"
        raise InvalidValue(
            f"{str(folder)!r} holds pieces of another measurement: its {what} is {_shown(was)} and "
            f"here it is {_shown(now)}; give another store, or measure the same."
        )


def checksum(arrays: Arrays) -> str:
    """The SHA-256 of a piece's arrays."""
    found = hashlib.sha256()
    for name, value in arrays.items():
        found.update(f"{name} {value.dtype.str} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def host_digest() -> str:
    """This host in a few letters, for names of files."""
    return hashlib.sha256(here().encode()).hexdigest()[:8]


def _is_alive(pid: str) -> bool:
    from .leases import started

    return pid.isdigit() and started(int(pid)) is not None


def _shown(value: Any) -> str:
    return "not there" if value is None else cut(str(value), 60)


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__
