"""The work at hand: which pieces are wanted, who runs them, and where they are kept."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import InvalidState
from .store import Arrays

POLL = 0.05, 1.0
"""Seconds between two looks at what others do, at first and at most."""


@dataclass(frozen=True)
class Piece:
    """A part of a measurement: a function of the measurement's own arguments and of earlier pieces,
    and of nothing else.

    Attributes:
        name: what tells it from the measurement's other pieces, in a few words.
        make: runs it; gives arrays of numbers by name.
    """

    name: str
    make: Callable[[], Arrays]


class NothingLeft(Exception):
    """A helper has come to where the measurement needs no more pieces."""


class Kept(Protocol):
    """Where pieces are kept: a folder (`Store`), or a cluster's memory."""

    def there(self, names: Sequence[str]) -> set[str]:
        """Which of these pieces are there."""

    def names(self) -> list[str]:
        """All pieces that are there."""

    def read(self, name: str) -> tuple[Any, float]:
        """A piece's arrays, and how many seconds it took."""

    def write(self, name: str, arrays: Arrays, seconds: float) -> None:
        """Keep a finished piece."""

    def claim(self, name: str) -> bool:
        """Take a piece that nobody is at."""

    def release(self) -> None:
        """Give up the piece that was taken."""


class Work:
    """One measurement's pieces.

    Args:
        store: where they are kept.
        key: of the measurement; goes into every piece's name.
        helping: whether the measurement is another process's.
        others: where other processes run the pieces: called while they are waited for, with the
            names wanted, to see to it that they do.
        workers: how many processes run pieces.
        model: that the key tells.

    Attributes:
        before: seconds that what was found finished had taken.
    """

    def __init__(
        self,
        store: Kept,
        key: str,
        helping: bool = False,
        others: Callable[[Sequence[str]], object] | None = None,
        workers: int = 1,
        model: Any = None,
    ) -> None:
        self.store, self.key, self.helping, self.others = store, key, helping, others
        self.model = model
        self.workers, self.early = workers, set(store.names())
        self.scopes: list[str] = []
        self.before = 0.0
        self.asked: set[str] = set()

    def knows(self, value: Any) -> bool:
        """Whether a value is the model that the key tells."""
        return value is not None and value is self.model

    def found(self) -> int:
        """How many pieces were there already."""
        return len(self.early)

    def name(self, piece: Piece) -> str:
        """A piece's name in the store: readable, and a digest of all that it depends on."""
        full = "/".join([self.key, *self.scopes, piece.name])
        if full in self.asked:
            raise AssertionError(f"two pieces are named {full!r}")
        self.asked.add(full)
        readable = re.sub(r"[^a-z0-9]+", "-", piece.name.lower()).strip("-")[:60]
        return f"{readable}-{hashlib.sha256(full.encode()).hexdigest()[:12]}"

    def results(self, pieces: Sequence[Piece], told: Callable[[int], object]) -> list[Arrays]:
        """What the pieces give, in order.

        Args:
            pieces: that are wanted now.
            told: called with the number of each as it is there.
        """
        names = [self.name(piece) for piece in pieces]
        found: dict[str, Arrays] = {}
        waited = POLL[0]
        while True:
            known = len(found)
            there = self.store.there([name for name in names if name not in found])
            for i, name in enumerate(names):
                if name in there:
                    found[name], seconds = self.store.read(name)
                    self.before += seconds / self.workers if name in self.early else 0.0
                    told(i)
            missing = [i for i, name in enumerate(names) if name not in found]
            if not missing:
                return [found[name] for name in names]
            if self.others is not None:
                self.others([names[i] for i in missing])
            elif any(self._made(names[i], pieces[i]) for i in missing):
                continue
            waited = POLL[0] if len(found) > known else min(2 * waited, POLL[1])
            time.sleep(waited)

    def _made(self, name: str, piece: Piece) -> bool:
        """Run a piece and keep it, unless somebody is at it."""
        if not self.store.claim(name):
            return False
        try:
            if not self.store.there([name]):
                start = time.monotonic()
                with _alone():
                    arrays = piece.make()
                self.store.write(name, arrays, time.monotonic() - start)
        finally:
            self.store.release()
        return True


_WORK: ContextVar[Work | None] = ContextVar("work", default=None)


def current() -> Work | None:
    """The work at hand, if there is any to be kept."""
    return _WORK.get()


@contextmanager
def at(work: Work | None) -> Iterator[None]:
    """Within the block this is the work at hand."""
    token = _WORK.set(work)
    try:
        yield
    finally:
        _WORK.reset(token)


def _alone() -> Any:
    """Within the block pieces are run here and now: they are parts of one."""
    return at(None)


def results(
    pieces: Sequence[Piece], told: Callable[[int], object] = lambda _: None
) -> list[Arrays]:
    """What these pieces give, in order: run here and now, or kept and shared as the work at hand
    has it.

    Args:
        pieces: that are needed now, with names of their own.
        told: called with the number of each as it is there.

    >>> import numpy as np
    >>> [found] = results([Piece("two", lambda: {"x": np.array(2)})])
    >>> int(found["x"])
    2
    """
    work = current()
    if work is not None:
        return work.results(pieces, told)
    found = []
    for number, piece in enumerate(pieces):
        found.append(piece.make())
        told(number)
    return found


def enough() -> None:
    """Say that the measurement needs no more pieces: those who help need not go on."""
    work = current()
    if work is not None and work.helping:
        raise NothingLeft


def helped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a part of a measurement gives; None for those who help and have no use for it.

    Args:
        function: the part.
        *args: its arguments.
        **kwargs: its arguments by name.

    >>> helped(max, 1, 2)
    2
    """
    try:
        return function(*args, **kwargs)
    except NothingLeft:
        return None


def helping() -> bool:
    """Whether this process runs pieces of another's measurement, and so has nothing to show."""
    work = current()
    return work is not None and work.helping


def quiet(call: Callable[[], Any], store: Kept, key: str, model: Any = None) -> None:
    """Make a call as one who helps, without a word.

    Args:
        call: the measurement.
        store: where pieces are kept.
        key: of the measurement.
        model: that the key tells.
    """
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        at(Work(store, key, helping=True, model=model)),
        suppress(NothingLeft),
    ):
        call()


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Within the block pieces' names are told apart by this one too.

    Args:
        name: of a part of the measurement.
    """
    work = current()
    if work is None:
        yield
        return
    work.scopes.append(name)
    try:
        yield
    finally:
        work.scopes.pop()


def stopped(reason: str) -> InvalidState:
    """The error for work that can't go on elsewhere."""
    return InvalidState(f"{reason}; what was finished is kept: start again to go on.")
