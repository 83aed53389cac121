"""Joint sequences: text and image tokens in one tensor, taken apart for their hook points.

Where a model's block works on one sequence of both, a name such as `attn.hook_z` is the image's
part of it and `text.attn.hook_z` the text's. A `JointPoint` stands for both: to the code that calls
it, it is one hook point on the joint tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...hooks.passes import Pass
from ...hooks.points import HookPoint, Listener, laid_out

Where = slice | Tensor


class Joint:
    """Where image and text tokens lie in a joint sequence; tokens in neither have no name.

    Args:
        image: positions [batch, n], or a slice where all items are alike.
        text: the same for the text.

    >>> joint = Joint(image=slice(2, None), text=slice(2))
    >>> joint.take(torch.arange(4).view(1, 4), joint.image)
    tensor([[2, 3]])
    """

    def __init__(self, image: Where, text: Where) -> None:
        self.image, self.text = image, text

    def take(self, x: Tensor, at: Where, dim: int = 1) -> Tensor:
        """One stream's tokens.

        Args:
            x: the joint tensor.
            at: `image` or `text`.
            dim: the axis of the tokens.
        """
        moved = x.movedim(dim, 1)
        return moved[self._index(x, at)].movedim(1, dim)

    def put(self, x: Tensor, at: Where, value: Tensor, dim: int = 1) -> None:
        """Write one stream's tokens into the joint tensor, in place.

        Args:
            x: the joint tensor.
            at: `image` or `text`.
            value: that stream's tokens.
            dim: the axis of the tokens.
        """
        x.movedim(dim, 1)[self._index(x, at)] = value.movedim(dim, 1)

    def _index(self, x: Tensor, at: Where) -> tuple[Any, Any]:
        if isinstance(at, slice):
            return slice(None), at
        return torch.arange(len(x), device=x.device)[:, None], at.to(x.device)


Layout = Callable[[dict[str, Any], int, Any], Joint]
"""From the transformer's arguments, the length of a joint sequence, and the transformer: where
image and text lie in it. A function of a module or a bound method, so that it can be pickled.
"""


def text_first(inputs: dict[str, Any], length: int, transformer: Any = None) -> Joint:
    """`[text | image]`.

    Args:
        inputs: the transformer's arguments, `encoder_hidden_states` among them.
        length: how many tokens the joint sequence has.
        transformer: the transformer.

    >>> joint = text_first({"encoder_hidden_states": torch.zeros(1, 7, 32)}, 23)
    >>> joint.text, joint.image
    (slice(None, 7, None), slice(7, None, None))
    """
    text = inputs["encoder_hidden_states"].shape[1]
    return Joint(slice(text, None), slice(text))


def image_first(inputs: dict[str, Any], length: int, transformer: Any = None) -> Joint:
    """`[image | text]`.

    Args:
        inputs: the transformer's arguments, `encoder_hidden_states` among them.
        length: how many tokens the joint sequence has.
        transformer: the transformer.

    >>> joint = image_first({"encoder_hidden_states": torch.zeros(1, 7, 32)}, 23)
    >>> joint.image, joint.text
    (slice(None, 16, None), slice(16, None, None))
    """
    image = length - inputs["encoder_hidden_states"].shape[1]
    return Joint(slice(image), slice(image, None))


class JointPoint:
    """The hook points of image and text as one, called with a joint tensor.

    Listeners at either are given their stream's tokens; what an editor returns is put back. With
    nobody listening, or nothing changed, the joint tensor itself goes on.

    Args:
        image: the image's hook point.
        text: the text's; None where the text's part has no name.
        current_pass: the pass, whose arguments the layout depends on.
        layout: where image and text lie.
        dim: the axis of the tokens.

        point = JointPoint(points["hook_z"], points["text.hook_z"], current_pass, text_first)
        z = point(z)
    """

    def __init__(
        self,
        image: HookPoint,
        text: HookPoint | None,
        current_pass: Pass,
        layout: Layout,
        dim: int = 1,
    ) -> None:
        self.image, self.text = image, HookPoint("") if text is None else text
        self.current_pass, self.layout, self.dim = current_pass, layout, dim

    def __call__(self, x: Tensor) -> Tensor:
        inputs = self.current_pass.now if self.listeners else None
        # outside of a call, where gradient checkpointing runs a block once more, nobody is told
        if inputs is None:
            return x
        joint = self.layout(inputs, x.shape[self.dim], self.current_pass.transformer)
        joined = x
        for point, at in ((self.image, joint.image), (self.text, joint.text)):
            value = joint.take(x, at, self.dim)
            new = point(value)
            if new is not value:
                joined = x.clone() if joined is x else joined
                joint.put(joined, at, new, self.dim)
        return joined if joined is x or self.changed else laid_out(joined, x)

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Who listens: at the image's point, or else at the text's."""
        return self.image.listeners or self.text.listeners

    @property
    def changed(self) -> bool:
        """Whether an editor replaced a value in the latest call."""
        return any(point.listeners and point.changed for point in (self.image, self.text))

    @property
    def edited(self) -> bool:
        """Whether what the point returned must be computed with; see `HookPoint.edited`."""
        return self.image.edited or self.text.edited


Point = HookPoint | JointPoint
AnyPoints = Mapping[str, Point]


def joint_points(
    points: Mapping[str, HookPoint],
    current_pass: Pass,
    layout: Layout,
    names: Iterable[str] | None = None,
) -> dict[str, Point]:
    """A block's hook points with those of joint tensors in place of the image's.

    Args:
        points: its hook points by site.
        current_pass: the pass that they will be called in.
        layout: where image and text lie.
        names: the image's names on joint tensors; by default those that the text has too.

        hook = joint_points(points, current_pass, text_first)
        z = hook["attn.hook_z"](z)
    """
    names = [n for n in points if f"text.{n}" in points] if names is None else names
    joined = {
        name: JointPoint(
            points[name],
            points.get(f"text.{name}"),
            current_pass,
            layout,
            dim=2 if name.endswith(("scores", "pattern")) else 1,
        )
        for name in names
    }
    return {**points, **joined}
