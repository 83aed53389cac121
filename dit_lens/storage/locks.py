"""Locks: a file that one process, or one thread, has for itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import InvalidState, UnwritableFile
from .writing import unwritable

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is told
    fcntl = None  # type: ignore[assignment]


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
        _sign(file, lock)
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _sign(file: IO[str], lock: Path) -> None:
    """Write into a lock file whose it is."""
    mine = f"process {os.getpid()} on {socket.gethostname()}".encode()
    try:
        file.truncate(0)
        os.write(file.fileno(), mine)  # of a buffer the rest would be written once more
    except OSError as error:
        raise UnwritableFile(unwritable(lock, error)) from error


def _taken(path: Path, lock: Path) -> IO[str]:
    """The lock file, locked."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")
        except OSError as error:
            raise UnwritableFile(unwritable(lock, error)) from error
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
                raise UnwritableFile(unwritable(lock, error)) from error
            raise InvalidState(
                f"{str(path)!r} is in use by {holder}; wait for it, or give another path."
            ) from None
        except BaseException:
            file.close()
            raise
