"""Running a part of the blocks: what stands in the place of their forwards meanwhile.

Blocks before the start hand on what they are given, the last of them a stream that is put in; the
pass ends before the block where it should, with an exception that carries the stream. Embedders and
the last layer are diffusers' own as ever, so this works for every family.

A module has one forward, and all threads see it. So what stands in asks the context of whoever
calls, and lets every pass but a partial one through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..families.base import Family
from ..hooks.passes import PassContext, Span
from ..hooks.points import LOCK, HookPoint, Listener, StopForward

Now = Callable[[], tuple[PassContext, dict[str, Any]]]
"""What the pass of whoever calls is run under, and the transformer's arguments in it."""


class StoppedAtLayer(StopForward):
    """Ends a pass on purpose before a layer; `stream` is what would have entered it."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("stop_at_layer")
        self.stream = stream


class InjectStream(Listener):
    """Replaces the activation before anybody else sees it, in passes of one scope."""

    def __init__(self, stream: Tensor, scope: object) -> None:
        super().__init__()
        self.order, self.stream, self.scope = (False, -1), stream, scope

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:  # noqa: ARG002 (replaced unseen)
        return self.stream.clone()  # a block may change what it is given in place


class StandIn:
    """In place of a block's forward while somebody runs a part of the blocks.

    Args:
        family: of the model.
        blocks: its blocks, in forward order.
        layer: the block's number.
        now: the pass of whoever calls.
    """

    def __init__(self, family: Family, blocks: list[nn.Module], layer: int, now: Now) -> None:
        self.family, self.now = family, now
        self.block, self.layer, self.n_layers = blocks[layer], layer, len(blocks)
        self.users: set[object] = set()
        self.before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context, inputs = self.now()
        (start, end), i = context.span, self.layer
        if start is not None and i < start:
            streams, returned = self.family.skip_block(inputs, args, kwargs)
            put_in = context.stream if i == start - 1 else None
            return returned(streams if put_in is None else streams | {"": put_in})
        if i == end:
            raise StoppedAtLayer(self.family.stream_in(self.block, inputs, args, kwargs))
        found = self.own(*args, **kwargs)
        if end == self.n_layers and i == end - 1:
            raise StoppedAtLayer(self.family.stream_out(self.block, inputs, found))
        return found

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes."""
        return self._before(*args, **kwargs)

    @property
    def _before(self) -> Callable[..., Any]:
        found: Callable[..., Any] = self.before or type(self.block).forward.__get__(self.block)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._before,)  # nobody runs a part of a copied model

    @property
    def there(self) -> bool:
        """Whether it stands on top of whatever else was put on the block."""
        return self.block.__dict__.get("forward") is self

    def enter(self, user: object) -> None:
        """Stand in, for one more who wants it."""
        with LOCK:
            self.users.add(user)
            if not self.there:
                self.before = self.block.__dict__.get("forward")
                self.block.__dict__["forward"] = self

    def leave(self, user: object) -> None:
        """One less wants it; after the last one the block has its own forward back."""
        with LOCK:
            self.users.discard(user)
            if self.users or not self.there:
                return
            if self.before is not None:
                self.block.__dict__["forward"] = self.before
            else:
                self.block.__dict__.pop("forward", None)


def _itself(before: Callable[..., Any]) -> Callable[..., Any]:
    return before


def replaced(span: Span, n_layers: int) -> list[int]:
    """The layers whose blocks do not run, or end the pass.

    Args:
        span: (start, end); None is the model's own.
        n_layers: how many the model has.

    >>> replaced((2, 4), 6), replaced((None, 6), 6)
    ([0, 1, 4], [5])
    """
    start, end = span
    skipped = list(range(start or 0))
    if end is None or end in skipped:
        return skipped
    last = min(end, n_layers - 1)
    return skipped if last in skipped else [*skipped, last]
