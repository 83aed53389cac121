"""Writing so that no reader ever sees half a file, and trying a folder before time is spent."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UnwritableFile


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
    target = file_at(path)
    part = target.with_name(f".{target.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        os.replace(part, target)
        if os.name != "nt":  # Windows opens no folders
            _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise UnwritableFile(unwritable(path, error)) from error
    finally:
        with suppress(OSError):  # of a folder that is none
            part.unlink(missing_ok=True)


def file_at(path: str | Path) -> Path:
    """The file that a path leads to, through links; it need not be there.

    Args:
        path: the file.

    Raises:
        UnwritableFile: where a folder or a device lies there, or no file can.
    """
    try:
        found = Path(os.path.realpath(path))
        if found.exists() and not found.is_file():
            raise ValueError("a folder is there" if found.is_dir() else "it is no file")
    except (OSError, ValueError) as error:
        raise UnwritableFile(unwritable(path, error)) from error
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: str | Path, error: Exception) -> str:
    """The sentence for a path at which nothing can be written."""
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
    absent: list[Path] = []
    try:
        absent += [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"dit_lens")
    except (OSError, ValueError) as error:
        raise UnwritableFile(unwritable(folder, error)) from error
    finally:
        for made in absent:
            with suppress(OSError, ValueError):  # never made, or somebody else's file is in it
                made.rmdir()


def try_file(path: str | Path) -> None:
    """The same for a file, which is not made.

    Args:
        path: the file.

    Raises:
        UnwritableFile: if it can't be written.
    """
    try_folder(file_at(path).parent)


def file_name(name: str) -> str:
    """A name as a file may have it: what would lead into another folder is taken out.

    Args:
        name: of a model or a probe, say.

    >>> file_name("../../etc/passwd"), file_name("digits")
    ('passwd', 'digits')
    """
    last = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    return re.sub(r"[\x00-\x1f:*?\"<>|]", "_", last).lstrip(".")[:100] or "unnamed"
