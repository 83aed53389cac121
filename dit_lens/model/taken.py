"""Taking and giving back: the one way in which dit_lens changes something that outlives a call.

Everything that is put into a model or a context (forwards, listeners, watchers, a pass's state) is
noted in a `Taken` *before* it is put there, with what takes it out again. That is run when the
`with` block is left; it is run twice, so that an interrupt in the midst of it does no harm; and
where even the leaving is interrupted it is run when the `Taken` is dropped, at the latest with the
exception's traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Taken(ExitStack):
    """What was taken, and how it is given back.

    with Taken() as taken:
        taken.undo(point.drop, listener)    # first how it goes,
        point.add(listener)                 # then it comes
        ...
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[bool] = []  # and not this object itself, which would then never be dropped

    def undo(self, give_back: Callable[..., Any], *args: Any) -> None:
        """Note what gives something back.

        Args:
            give_back: called when all is given back. It may be called twice, before anything was
                taken, or when half of it is given back; so it has to look.
            *args: what it is called with.
        """
        self.callback(_unless_kept, self._kept, give_back, *args)
        self.callback(_unless_kept, self._kept, give_back, *args)

    def keep(self, answer: T) -> T:
        """What was taken stays taken; gives the answer on.

        Args:
            answer: what the caller returns.
        """
        # one expression, so that nothing can come between what is kept and the answer
        return (self._kept.append(True), answer)[1]  # type: ignore[func-returns-value]

    __del__ = ExitStack.close


def _unless_kept(kept: list[bool], give_back: Callable[..., Any], *args: Any) -> None:
    if not kept:
        give_back(*args)


class Layers(Generic[T]):
    """A value that belongs to whoever runs a pass, a thread or a task: what is put on comes off
    again, with all that lies on top of it, and in no one else's context.

    Args:
        name: of the context variable.
        base: the value where nothing is put on.
    """

    def __init__(self, name: str, base: T) -> None:
        self._stack: ContextVar[tuple[list[T], ...]] = ContextVar(name, default=([base],))

    @property
    def top(self) -> T:
        """The value in force here."""
        return self._stack.get()[-1][0]

    def put(self, taken: Taken, value: T) -> None:
        """Put a value on, until `taken` gives it back.

        Args:
            taken: notes it.
            value: what is in force from now on.
        """
        layer = [value]  # a list of its own: known again by identity
        taken.undo(self._off, layer)
        self._stack.set((*self._stack.get(), layer))

    def _off(self, layer: list[T]) -> None:
        stack = self._stack.get()
        for i, each in enumerate(stack):
            if each is layer:
                self._stack.set(stack[:i])
