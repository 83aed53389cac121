"""Running a part of the blocks: what stands in the place of the others' forwards meanwhile.

Blocks before the start hand on what they are given, the last of them a stream that is put in; the
pass ends before the block where it should, with an exception that carries the stream. Embedders and
the last layer are diffusers' own as ever, so this works for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..families.base import Family
from ..hooks.passes import Span
from ..hooks.points import HookPoint, Listener, StopForward

Inputs = Callable[[], dict[str, Any]]
"""The transformer's arguments in the call under way."""


class StoppedAtLayer(StopForward):
    """Ends a pass on purpose before a layer; `stream` is what would have entered it."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("stop_at_layer")
        self.stream = stream


class InjectStream(Listener):
    """Replaces the activation before anybody else sees it."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.order, self.stream = (False, -1), stream

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:  # noqa: ARG002 (replaced unseen)
        return self.stream


class SkippedBlock:
    """In place of a block's forward: hands on what it is given, or the given stream."""

    def __init__(self, family: Family, inputs: Inputs, stream: Tensor | None) -> None:
        self.family, self.inputs, self.stream = family, inputs, stream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, returned = self.family.passed(self.inputs(), args, kwargs)
        return returned(x if self.stream is None else self.stream)


class StopBefore:
    """In place of a block's forward: ends the pass with the stream that enters it, or that leaves
    `after` it.
    """

    def __init__(self, family: Family, inputs: Inputs, block: nn.Module, after: Any) -> None:
        self.family, self.inputs, self.block, self.after = family, inputs, block, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.after is None:
            raise StoppedAtLayer(self.family.entering(self.block, self.inputs(), args, kwargs))
        raise StoppedAtLayer(self.family.leaving(self.inputs(), self.after(*args, **kwargs)))


@contextmanager
def only(
    span: Span,
    stream: Tensor | None,
    family: Family,
    blocks: list[nn.Module],
    embed: HookPoint,
    inputs: Inputs,
) -> Iterator[None]:
    """Run only the blocks of `span`, from a given stream and up to `StoppedAtLayer`.

    Args:
        span: (start, end); None is the model's own.
        stream: [batch, token, d_model], what enters the first block that runs.
        family: of the model.
        blocks: its blocks, in forward order.
        embed: the hook point ahead of the first block.
        inputs: gives the transformer's arguments in the call under way.
    """
    start, end = span
    with ExitStack() as stack:
        for i, block in enumerate(blocks if span != (None, None) else ()):
            if start is not None and i < start:
                put_in = stream if i == start - 1 else None
                stack.enter_context(_standing_in(block, SkippedBlock(family, inputs, put_in)))
            elif i == end:
                stack.enter_context(_standing_in(block, StopBefore(family, inputs, block, None)))
            elif end == len(blocks) and i == end - 1:
                last = StopBefore(family, inputs, block, block.forward)
                stack.enter_context(_standing_in(block, last))
        if stream is not None and start == 0:
            put = InjectStream(stream)
            embed.add(put)
            stack.callback(embed.listeners.remove, put)
        yield


@contextmanager
def _standing_in(block: nn.Module, forward: Any) -> Iterator[None]:
    """A forward in place of a block's, which gets its own back."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is not None:
            block.__dict__["forward"] = before
        else:
            block.__dict__.pop("forward", None)
