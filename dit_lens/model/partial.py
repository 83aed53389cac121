"""A part of the blocks: what stands in the place of the others' forwards while it runs.

Blocks before the start hand on what they are given, the last of them a stream that is put in; the
pass ends before the block where it should, with an exception that carries the stream. Embedders and
the last layer are diffusers' own as ever, so this works for every family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..hooks.points import HookPoint, Listener, StopForward

if TYPE_CHECKING:
    from .instrumentation import Instrumentation


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

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        return self.stream


class SkippedBlock:
    """In place of a block's forward: hands on what it is given, or the given stream."""

    def __init__(self, instrumentation: Instrumentation, stream: Tensor | None) -> None:
        self.instrumentation, self.stream = instrumentation, stream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, returned = self.instrumentation.family.skip_block(
            self.instrumentation.now or {}, args, kwargs
        )
        return returned(x if self.stream is None else self.stream)


class StopBefore:
    """In place of a block's forward: ends the pass with the stream that enters it, or that leaves
    `after` it.
    """

    def __init__(self, instrumentation: Instrumentation, block: nn.Module, after: Any) -> None:
        self.instrumentation, self.block, self.after = instrumentation, block, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.instrumentation.now or {}
        if self.after is None:
            raise StoppedAtLayer(
                self.instrumentation.family.stream_in(self.block, inputs, args, kwargs)
            )
        raise StoppedAtLayer(
            self.instrumentation.family.stream_out(self.block, inputs, self.after(*args, **kwargs))
        )
