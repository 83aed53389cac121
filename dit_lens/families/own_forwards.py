"""What runs in place of the modules of a transformer of the user's own: hook points on what the
model, a block, and a named part of a block are given and return."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidState
from ..hooks.passes import Pass
from .adapter import SpokenTransformer, heard, name_of, through
from .boundaries import Argument, argument_of, given
from .forwards import Forward, Points
from .parts.joint import Point


class OwnTransformer(SpokenTransformer):
    """The whole model, whose attention nobody knows.

    Args:
        module: the transformer.
        points: all hook points.
        current_pass: the pass.
        x_name: the argument that holds x_t.
        turned: the adapter's `output`; None where there is none.
    """

    def __init__(
        self,
        module: Any,
        points: Points,
        current_pass: Pass,
        x_name: str,
        turned: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__(module, points, current_pass, turned)
        self.x_name = x_name

    def passed(self, inputs: dict[str, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self.current_pass.couplings:
            raise InvalidState(
                f"{type(self.module).__name__} is opened by its modules' boundaries, and its "
                "attention can't couple twins; expected tie='noise', or a family of its own "
                "(docs: Your own model)."
            )
        return super().passed(inputs, args, kwargs)

    def meant(self, answers: Mapping[str, Any], inputs: dict[str, Any]) -> Tensor | None:
        x, tensors = inputs[self.x_name], [e for e in answers.values() if isinstance(e, Tensor)]
        like = [each for each in tensors if each.ndim == x.ndim and each.shape[2:] == x.shape[2:]]
        return like[0] if len(like) == 1 and "sample" not in answers else None


class Progress:
    """How far a pass is: what tells whether a value is what its name says.

    Attributes:
        now: the arguments of the pass; None outside of one.
        layer: the block that ran last.
        given: a weak reference to what it was given, if it returned something else.
        called: the parts that ran.
        again: the parts that ran more than once in some pass, which a later one may not come to.
    """

    def __init__(self) -> None:
        self.again: set[str] = set()
        self.begin(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Progress, ()  # a copy of the model has passes of its own

    def begin(self, now: Any) -> None:
        """Another pass begins.

        Args:
            now: its arguments.
        """
        self.now, self.layer, self.given, self.called = now, -1, nothing, set[str]()

    def within(self, now: Any) -> None:
        """A module runs in a pass, which may be a new one.

        Args:
            now: the arguments of the pass.
        """
        if now is not self.now or now is None:
            self.begin(now)


class OwnBlock(Forward):
    """A block, with hook points on the stream that enters and leaves it.

    Args:
        module: the block.
        points: its hook points.
        current_pass: the pass.
        layer: the block's number.
        progress: how far the pass is.
        x_name: the model's argument that holds x_t.
    """

    repeats = False

    def __init__(
        self,
        module: Any,
        points: Mapping[str, Point],
        current_pass: Pass,
        layer: int,
        progress: Progress,
        x_name: str,
    ) -> None:
        super().__init__(module)
        self.current_pass, self.layer, self.progress = current_pass, layer, progress
        self.x_name = x_name
        entering = ("hook_embed", "hook_resid_pre")
        self.before = [points[name] for name in entering if name in points]
        self.after, self.argument = points["hook_resid_post"], argument_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now, progress = self.current_pass.now, self.progress
        progress.within(now)
        x = stream = given(self.argument, args, kwargs)
        if any(point.listeners for point in (*self.before, self.after)):
            if progress.layer >= self.layer:
                raise InvalidState(
                    f"Block {self.layer} runs after block {progress.layer}, so that layer numbers "
                    "would mislead; expected blocks that run once each, in the order of blocks=."
                )
            heard_before = any(point.listeners for point in self.before)
            if heard_before and stream is not None and progress.given() is stream:
                raise InvalidState(same_again(self.layer, self.module, self.argument))
        items = items_of(now, self.x_name)
        for point in self.before:
            x = heard(point, x, items)
        if x is not stream:
            args, kwargs = put(x, self.argument, args, kwargs)
        returned = self.own(*args, **kwargs)
        kept = isinstance(stream, Tensor) and returned is not stream and returned is not x
        # weak, so that no activation is kept for it
        progress.layer, progress.given = self.layer, weakref.ref(stream) if kept else nothing
        return through(self.after, returned, x, items)


def nothing() -> Any:
    """In place of a weak reference to what is not to be found again."""


def same_again(layer: int, block: nn.Module, argument: Argument) -> str:
    """What is said of a block whose first argument is no stream.

    Args:
        layer: its number.
        block: the block.
        argument: its first argument.
    """
    return (
        f"Block {layer} is given as {argument[0]!r} the very tensor that the block before was "
        f"given, and not what that returned; expected the stream as the first argument of "
        f"{type(block).__name__}.forward, or as 'hidden_states' (docs: Your own model)."
    )


def items_of(inputs: Mapping[str, Any] | None, x_name: str) -> int:
    """How many items a model is called with; 0 where that is not known.

    Args:
        inputs: its arguments by name.
        x_name: of the one that holds x_t.
    """
    x = (inputs or {}).get(x_name)
    return len(x) if isinstance(x, Tensor) and x.ndim else 0


class OwnPart(Forward):
    """A part of a block, with hook points on what enters and leaves it.

    Args:
        module: the part.
        before: the hook point on its first argument, wherever that stands among the arguments.
        after: the hook point on what it returns.
        current_pass: the pass.
        progress: how far it is.
        x_name: the model's argument that holds x_t.
    """

    repeats = False

    def __init__(
        self,
        module: Any,
        before: Point,
        after: Point,
        current_pass: Pass,
        progress: Progress,
        x_name: str,
    ) -> None:
        super().__init__(module)
        self.current_pass, self.progress, self.x_name = current_pass, progress, x_name
        self.name = name_of(before)
        self.before, self.after, self.argument = before, after, argument_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now, progress = self.current_pass.now, self.progress
        progress.within(now)
        if self.name in progress.called:
            progress.again.add(self.name)
        progress.called.add(self.name)
        if self.name in progress.again and (self.before.listeners or self.after.listeners):
            raise InvalidState(
                f"{self.name!r} runs more than once in a pass, each time on something else, and "
                "has no one value; expected a part that runs once."
            )
        x, items = given(self.argument, args, kwargs), items_of(now, self.x_name)
        new = heard(self.before, x, items)
        if new is not x:  # queries, keys and values may be given one by one
            args = tuple(new if arg is x else arg for arg in args)
            kwargs = {name: new if arg is x else arg for name, arg in kwargs.items()}
        return through(self.after, self.own(*args, **kwargs), new, items)


def put(
    x: Tensor, argument: Argument, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another stream."""
    name, position = argument
    if name in kwargs:
        return args, {**kwargs, name: x}
    return (*args[:position], x, *args[position + 1 :]), kwargs
