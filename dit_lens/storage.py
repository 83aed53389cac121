"""Files that outlive the process: written whole or not at all, and read only if no bit has changed.

What is written goes to a temporary file of its own in the same folder, is synced and renamed. What
will be read back carries a seal: the SHA-256 of the whole file, with the seal's own digits as
zeros, and with it what kind of file it is and what made it. A seal tells damage and foreign files;
it is no signature, so what is read is held against a schema too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import platform
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InvalidState, InvalidValue, MissingFile, UnwritableFile

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is told
    fcntl = None  # type: ignore[assignment]

SEAL = b"sha256 of this file with zeros here: "
DIGITS = 64
SEALED = re.compile(re.escape(SEAL) + rb"([0-9a-f]{%d})" % DIGITS)
HEAD = 1 << 27
"""Bytes at the start of a file among which its seal is: more than a safetensors header may have."""


# Writing.


def versions(device: torch.device | str | None = None) -> dict[str, str]:
    """What made a file.

    Args:
        device: that computed it, if it is known.

    >>> sorted(versions())
    ['device', 'diffusers', 'dit_lens', 'torch']
    """
    kind = torch.device(device or "cpu")
    name = platform.machine() if kind.type != "cuda" else torch.cuda.get_device_name(kind)
    packages = {"dit_lens": "dit-lens", "torch": "torch", "diffusers": "diffusers"}
    found = {name: _version(package) for name, package in packages.items()}
    return found | {"device": "unknown" if device is None else f"{kind.type} ({name})"}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "unknown"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the `with` block to write; at its end that file takes the
    place of `path`, at once and on the disk. If the block fails, `path` is as it was.

    Args:
        path: the file; its folder is made.

    Raises:
        UnwritableFile: where it can't be written.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a" / "b.txt") as part: _ = part.write_text("whole")
    >>> [p.name for p in (folder / "a").iterdir()]
    ['b.txt']
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UnwritableFile(_unwritable(path, error)) from error
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:  # of a folder that is none
            pass


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return f"{str(path)!r} can't be written ({reason}); choose a place that can."


def try_folder(folder: str | Path) -> None:
    """Find out now, before minutes are spent, whether files can be written to a folder.

    Args:
        folder: it need not be there, and is not made.

    Raises:
        UnwritableFile: if they can't.
    """
    folder = Path(folder)
    absent = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"dit_lens")
    except OSError as error:
        raise UnwritableFile(_unwritable(folder, error)) from error
    finally:
        for made in absent:
            if made.is_dir():
                made.rmdir()


def file_name(name: str) -> str:
    """A name as a file may have it: what would lead into another folder is taken out.

    Args:
        name: of a model or a probe, say.

    >>> file_name("../../etc/passwd"), file_name("digits")
    ('passwd', 'digits')
    """
    last = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    return re.sub(r"[\x00-\x1f:*?\"<>|]", "_", last).lstrip(".")[:100] or "unnamed"


# Seals.


def _seal(path: Path) -> None:
    """Put the digest of a file into the place that was left for it."""
    with path.open("r+b") as file:
        found = _found(file)
        assert found is not None, "written with EMPTY_SEAL"
        digest = _digest(file, found[0])
        file.seek(found[0])
        file.write(digest)


EMPTY_SEAL = SEAL.decode() + "0" * DIGITS


def _found(file: IO[bytes]) -> tuple[int, bytes] | None:
    """Where the digits of a file's seal begin, and what they are."""
    if not os.fstat(file.fileno()).st_size:
        return None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = SEALED.search(content, 0, HEAD)
        return found and (found.start(1), bytes(found[1]))


def _digest(file: IO[bytes], digits: int) -> bytes:
    """The SHA-256 of a file, with zeros where its seal's digits are.

    Args:
        file: an open file.
        digits: where they begin.
    """
    total = hashlib.sha256()
    file.seek(0)
    total.update(file.read(digits))
    total.update(b"0" * DIGITS)
    file.seek(digits + DIGITS)
    while block := file.read(1 << 22):
        total.update(block)
    return total.hexdigest().encode()


def check_seal(path: str | Path, expected: str) -> None:
    """Refuse a file of which anything has changed since it was written.

    Args:
        path: the file.
        expected: what it should be, such as "a trace written by Trace.save".

    Raises:
        MissingFile: if it is not there.
        InvalidValue: if it is not as it was written, or was not written by dit_lens.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            found = _found(file)
            whole = found is not None and _digest(file, found[0]) == found[1]
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"There is no file {str(path)!r}; expected {expected}.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidValue(
            f"{str(path)!r} can't be read ({reason}); expected {expected}."
        ) from None
    if found is None:
        raise InvalidValue(
            f"{str(path)!r} has no seal of this version of dit_lens, or a damaged one; expected "
            f"{expected}."
        )
    if not whole:
        raise InvalidValue(
            f"{str(path)!r} is damaged: it is not what was written, by its checksum; expected "
            f"{expected}."
        )


# Tensors with a description in JSON.


def save_tensors(
    path: str | Path,
    kind: str,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None = None,
) -> Path:
    """Write a safetensors file.

    Args:
        path: the file; its folder is made.
        kind: what it is, and its version, such as "dit_lens.trace/4".
        about: the description, which JSON can hold.
        tensors: by name.
        device: that computed them.

    Returns:
        The path.

    Raises:
        UnwritableFile: where it can't be written.
    """
    metadata = {
        "seal": EMPTY_SEAL,
        "kind": kind,
        "versions": json.dumps(versions(device)),
        "about": json.dumps(about),
    }
    with replacing(path) as part:
        save_file(_separate(tensors), part, metadata)
        _seal(part)
    return Path(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def load_tensors(path: str | Path, kind: str, expected: str) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors of a file of `save_tensors`.

    Args:
        path: the file.
        kind: what it should be.
        expected: the same in words.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: if it is damaged, or something else.
    """
    check_seal(path, expected)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            # cloned: in the file tensors lie anywhere, and CPU kernels give other last bits on
            # unaligned memory
            tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
        about = json.loads(metadata.get("about", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InvalidValue(
            f"{str(path)!r} is not a whole file ({error}); expected {expected}."
        ) from None
    if metadata.get("kind") != kind:
        raise InvalidValue(
            f"{str(path)!r} is of the kind {metadata.get('kind')!r}; expected {kind!r}, {expected}."
        )
    return about, tensors


# Datasets.

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
        _seal(part)
    return Path(path)


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


# Locks.


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep a file to oneself for the `with` block, by a lock file beside it that names the process.

    The lock is the operating system's and goes with its process: one that was killed leaves a file
    behind, but no lock.

    Args:
        path: the file.

    Raises:
        InvalidState: if another process, or another thread, has it.
        UnwritableFile: where no lock file can be written.
    """
    lock = Path(path).with_name(Path(path).name + ".lock")
    file = _taken(Path(path), lock)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _taken(path: Path, lock: Path) -> IO[str]:
    """The lock file, locked."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")
        except OSError as error:
            raise UnwritableFile(_unwritable(lock, error)) from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
            file.close()  # its owner had just removed it
        except FileNotFoundError:
            file.close()
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            if not isinstance(error, BlockingIOError):
                raise UnwritableFile(_unwritable(lock, error)) from error
            raise InvalidState(
                f"{str(path)!r} is in use by {holder}; wait for it, or give another path."
            ) from None
        except BaseException:
            file.close()
            raise


# Schemas.


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`; its docstring's place in a schema is a type's."""

    least: int = 0
    most: int = 1 << 40

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Named:
    """A dict with any names; their values all have one schema."""

    schema: Any


@dataclass(frozen=True)
class Among:
    """A text out of a list."""

    words: frozenset[str]
    what: str

    def __str__(self) -> str:
        return self.what


def conform(value: Any, schema: Any, where: str, at: str = "") -> None:
    """Hold what came out of a file against a schema.

    Args:
        value: what JSON gave.
        schema: a type; `Whole`, `Named` or `Among`; `[schema]`, a list of such; a dict with exactly
            these names; or a tuple of schemas, one of which must do.
        where: the file, for the error.
        at: the place in it.

    Raises:
        InvalidValue: if it does not fit, with the place.

    >>> conform({"a": [1, 2]}, {"a": [Whole()]}, "file.json")
    """
    fits: bool
    if isinstance(schema, dict):
        fits = isinstance(value, dict) and value.keys() == schema.keys()
        if fits:
            for name, inner in schema.items():
                conform(value[name], inner, where, f"{at}.{name}")
    elif isinstance(schema, Named):
        fits = isinstance(value, dict)
        if fits:
            for name, each in value.items():
                conform(each, schema.schema, where, f"{at}.{name:.60}")
    elif isinstance(schema, list):
        fits = isinstance(value, list)
        if fits:
            for i, each in enumerate(value):
                conform(each, schema[0], where, f"{at}[{i}]")
    elif isinstance(schema, tuple):
        errors = [_error(value, one, where, at) for one in schema]
        fits = None in errors
    elif isinstance(schema, Whole):
        fits = type(value) is int and schema.least <= value <= schema.most
    elif isinstance(schema, Among):
        fits = isinstance(value, str) and value in schema.words
    else:
        fits = value is None if schema is None else type(value) is schema
    if not fits:
        shown = (
            repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
        )
        raise InvalidValue(
            f"{where} has {at.lstrip('.') or 'metadata'} = {shown[:80]}; expected {_words(schema)}."
        )


def _error(value: Any, schema: Any, where: str, at: str) -> InvalidValue | None:
    try:
        conform(value, schema, where, at)
    except InvalidValue as error:
        return error
    return None


def _words(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(dict.fromkeys(map(_words, schema)))
    if isinstance(schema, dict):
        return f"a dict with the names {', '.join(schema)}"
    words = {str: "a text", bool: "true or false", float: "a number", None: "null"}
    if isinstance(schema, (list, Named)):
        return "a list" if isinstance(schema, list) else "a dict"
    return words.get(schema) or str(schema)
