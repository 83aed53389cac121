"""Forwards with hook points in them, which take the place of modules' own.

dit_lens changes a model by putting a callable of its own into the `forward` of some module
*instances*: the transformer, its blocks, and the parts of a block in which something happens that
has a name. A `Forward` is such a callable: an object and no closure, so that a deep copy of the
model gets forwards that compute with the copy's weights, and pickling works. It calls the module's
children by `child(...)`, so the user's own module hooks, adapters and offloading stay in force.
Whatever lies between the blocks (embedders, refiners, rotary tables) stays diffusers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .signature import Signature, signature_of

Identity = Callable[[Tensor], Tensor]
"""A hook point, or what stands for two of them."""

Points = dict[str, HookPoint]
"""Hook points by name; of one block without `blocks.{i}.`."""


class Forward:
    """A replacement for `module.forward`.

    Subclasses define `__call__` with the original's signature.

    Args:
        module: the module whose forward it replaces.

    Attributes:
        repeats: whether it computes what the module's class computes, operation for operation, so
            that a change of the class matters; False where it calls the class's own forward.

        class ReLUForward(Forward):
            def __init__(self, module, point):
                super().__init__(module)
                self.point = point

            def __call__(self, x):
                return self.point(x.relu())
    """

    repeats = True

    def __init__(self, module: Any) -> None:
        self.module = module

    __call__: Callable[..., Any]

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's class computes.

        Args:
            args: its positional arguments.
            kwargs: its arguments by name.
        """
        return type(self.module).forward(self.module, *args, **kwargs)


class TransformerForward(Forward):
    """The whole model as diffusers runs it, with `hook_sample` on what it returns.

    Args:
        module: the transformer.
        points: all hook points.
        current_pass: the pass, to which every call is shown.

        TransformerForward(transformer, points, current_pass)
    """

    repeats = False

    def __init__(self, module: Any, points: Points, current_pass: Pass) -> None:
        super().__init__(module)
        self.sample, self.current_pass = points["hook_sample"], current_pass

    @property
    def taken(self) -> Signature:
        """What its class's own forward takes."""
        return signature_of(type(self.module).forward)

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        inputs = self.taken.by_name(args, kwargs)
        return_dict = inputs.pop("return_dict", return_dict)
        with self.current_pass.forward(inputs):
            output = self.run(inputs)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def run(self, inputs: dict[str, Any]) -> Any:
        """What the transformer answers to these arguments, through its hook points.

        Args:
            inputs: its arguments by name.
        """
        return self.answer(self.own(**inputs, return_dict=False)[0])

    def answer(self, output: Any) -> Any:
        """What the transformer answers, after its hook point.

        Args:
            output: what the class's own forward returned.
        """
        return self.sample(output)


class BlockForward(Forward):
    """A block; subclasses define `__call__`.

    Args:
        module: the block.
        points: its hook points by site; the first block's also have `hook_embed`.

        class MyBlockForward(BlockForward):
            def __call__(self, hidden_states):
                x = self.enter(hidden_states)
                out = self.points["hook_mlp_out"](self.module.ff(x))
                return self.points["hook_resid_post"](x + out)
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.points = points

    def enter(self, x: Tensor) -> Tensor:
        """The image's stream as it enters the block: through `hook_embed` in the first one, then
        `hook_resid_pre`.

        Args:
            x: what the block was given.
        """
        return self._pre(self._embed(x))

    def enter_both(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The streams of image and text as they enter the block.

        Args:
            x: what the block was given of the image.
            text: what it was given of the text.
        """
        x, text = self._embed(x), self._embed(text, "text.")
        return self._pre(x), self._pre(text, "text.")

    def _embed(self, x: Tensor, stream: str = "") -> Tensor:
        embed = self.points.get(f"{stream}hook_embed")
        return x if embed is None else embed(x)

    def _pre(self, x: Tensor, stream: str = "") -> Tensor:
        return self.points[f"{stream}hook_resid_pre"](x)


class Tap(Forward):
    """Any module, with a hook point before and after it, or only one of them.

    Args:
        module: the module.
        before: the hook point on its first argument.
        after: the hook point on what it returns.

        Tap(transformer.proj_out, points["final.hook_in"], points["final.hook_out"])
    """

    repeats = False

    def __init__(
        self, module: Any, before: Identity | None = None, after: Identity | None = None
    ) -> None:
        super().__init__(module)
        self.before, self.after = before, after

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.own(x if self.before is None else self.before(x), *args, **kwargs)
        return x if self.after is None else self.after(x)
