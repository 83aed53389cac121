"""Claims on pieces: a file that says who is at it, which outlives neither its process nor its host.

The file's time is set anew every few seconds. A claim is void if its process is gone (where that
can be seen: on the same host), or if its time has not moved while somebody watched for longer than
any process is silent. No clocks are compared, so hosts may disagree about the time. Two processes
may still come to run the same piece, which only costs time: pieces are pure and written whole.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from ..errors import UnwritableFile

BEAT, PATIENCE = 5.0, 60.0
"""Seconds between two signs of life, and without one until a claim is void."""


def here() -> str:
    """This host, and the numbering of its processes, which containers have for themselves."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process of this host was started, in the system's own count; "" where that can't be
    told, None if there is no such process.
    """
    if os.name == "nt":  # there asking is killing
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return ""
    return None if state in "ZX" else fields[18]


class Leases:
    """Claims in a folder, at most one of them this process's at a time.

    Args:
        folder: where the claims lie; it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mine: Path | None = None
        self._seen: dict[Path, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def claim(self, name: str) -> bool:
        """Take a piece, unless somebody is at it.

        Args:
            name: of the piece.
        """
        path = self.folder / name
        try:
            if path.exists() and not (self._void(path) and self._cleared(path)):
                return False
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            self.mine = path
            with os.fdopen(handle, "w") as file:
                pid = os.getpid()
                json.dump({"host": here(), "pid": pid, "started": started(pid)}, file)
        except FileExistsError:
            return False
        except OSError as error:
            self.release()  # on a full disk there is a file with nothing in it
            raise UnwritableFile(
                f"{str(path)!r} can't be written ({error.strerror}); choose a place that can."
            ) from error
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat, daemon=True)
            self._beats.start()
        return True

    def release(self) -> None:
        """Give up what was claimed."""
        mine, self.mine = self.mine, None
        if mine is not None:
            with suppress(OSError):
                mine.unlink()

    def close(self) -> None:
        """The same, for good."""
        self.release()
        self._stop.set()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            if self.mine is not None:
                with suppress(OSError):
                    os.utime(self.mine)

    def _void(self, path: Path) -> bool:
        """Whether nobody is at the piece any more."""
        try:
            text, now = path.read_text(), path.stat().st_mtime_ns
        except OSError:  # given up just now
            return False
        with suppress(ValueError, KeyError, TypeError):
            owner = json.loads(text)
            if owner["host"] == here():
                now_there = started(int(owner["pid"]))
                if now_there != "":
                    return now_there != owner["started"]
        seen, since = self._seen.get(path, (0, 0.0))
        if seen != now:
            self._seen[path] = now, time.monotonic()
            return False
        return time.monotonic() - since > PATIENCE

    def _cleared(self, path: Path) -> bool:
        """Take a void claim away; of several that try, one does."""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.rename(aside)
        except OSError:
            return False
        aside.unlink(missing_ok=True)
        self._seen.pop(path, None)
        return True
