"""Any other diffusers transformer, opened for reading only.

Nothing is known here of how its blocks compute. Their own forwards run, and the hook points lie
where one module calls another: what a block is given and what it returns, and, where one of its
modules is clearly its attention or its MLP, what that is given and returns. What happens inside
(the stream between attention and MLP, modulations, heads, patterns) has no name; `absent` lists
what is missing. A hook may look and return None; one that returns another value is refused.

The axis of tokens is called `sequence`: it is what the block is given, which in some models is the
image's tokens with the text's or others among them, and where which of them lie is not known. The
time is in the transformer's own units. Whatever can't be told for certain (which of two tensors of
one shape is the image's, in which order blocks run) is refused when it is read; the model itself
runs on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..errors import InvalidState, InvalidType
from ..hooks.passes import Pass
from ..hooks.points import BackwardEditor, HookPoint
from .base import Family, Skipped
from .boundaries import argument_of, given, main_blocks, parts, registered_output
from .config import Condition, Config, Size
from .forwards import Forward, Points, TransformerForward
from .parts.sites import BLOCK_SITES, FINAL_SITES, OUTPUT, Axes, Sites

SEQUENCE: Axes = ("batch", "sequence", "d_model")
TIMES = ("timestep", "timesteps")
OTHER_MODELS = re.compile("UNet|ControlNet|Autoencoder|VAE|Prior")


BLOCKS = "blocks"
"""Among what is seen to run more than once in a pass: the blocks themselves."""


class Progress:
    """How far a pass is in which someone listens: what tells whether a value is what its name says.

    Attributes:
        again: what was seen to run more than once in a pass, so that its names would stand for
            several things: `BLOCKS`, or full names of parts. It outlives the pass, as a
            recomputation, which stops at what it reads, does not see it.
        items: the batch of the latents; None where nobody listens.
        layer: the block under way.
        shape: of the stream that entered it.
        called: its parts that ran.
        ordered: whether the blocks so far ran in the order of their numbers.
    """

    def __init__(self) -> None:
        self.again: set[str] = set()
        self.begin(None)

    def begin(self, latents: Any) -> None:
        """A pass begins, or ends.

        Args:
            latents: x_t, or None where nobody listens.
        """
        self.items = len(latents) if isinstance(latents, Tensor) else None
        self.layer, self.ordered, self.shape, self.called = -1, True, torch.Size(), set[str]()

    def enter(self, layer: int, stream: Any) -> None:
        """A block begins.

        Args:
            layer: its number.
            stream: what it is given.
        """
        if self.items is None:
            return
        if layer <= self.layer:
            self.again.add(BLOCKS)
        self.ordered = self.ordered and layer == self.layer + 1
        self.layer, self.called = layer, set[str]()
        self.shape = stream.shape if isinstance(stream, Tensor) else torch.Size()

    def show(self, point: HookPoint, x: Any) -> None:
        """Let those who listen see the stream, or a value of its shape, or what of a tuple has it:
        where it is certain that it is that.

        Args:
            point: the hook point.
            x: the value, or several.
        """
        if not point.listeners:
            return
        if not self.ordered or BLOCKS in self.again:
            refuse(
                point,
                "the blocks do not run once each, one list after the other, so that their numbers "
                "would mislead",
            )
        if len(self.shape) != 3 or self.shape[0] != self.items:
            refuse(
                point,
                f"the stream is {list(self.shape)}; expected [{self.items}, sequence, d_model], "
                "the latents' batch",
            )
        if isinstance(x, (tuple, list)):
            fits = [each for each in x if isinstance(each, Tensor) and each.shape == self.shape]
            if len(fits) > 1:
                refuse(
                    point,
                    f"there are {len(fits)} tensors of shape {list(self.shape)}, and which is the "
                    "image's can't be told; use a prompt or a size that makes text and image "
                    "differ in length",
                )
            x = fits[0] if fits else x
        if not isinstance(x, Tensor) or x.shape != self.shape:
            got = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            refuse(
                point,
                f"it is {got} where the block's stream is {list(self.shape)}, and where the stream "
                "lies in it can't be told",
            )
        look(point, x)


def refuse(point: HookPoint, why: str) -> NoReturn:
    """Raise InvalidState: the point can't be read.

    Args:
        point: the hook point.
        why: the reason.
    """
    raise InvalidState(f"{point.name!r} can't be read: {why}.")


def look(point: HookPoint, x: Any) -> None:
    """Let those who listen see a value.

    Args:
        point: the hook point.
        x: the value.

    Raises:
        InvalidState: if one of them wants to change it.
    """
    if not isinstance(x, Tensor):
        refuse(point, f"it is a {type(x).__name__}, and no tensor")
    if point.wants(BackwardEditor):
        refuse(
            point, "this model is opened read-only, and no gradient passes through its hook points"
        )
    new = point(x)
    if point.changed and not torch.equal(new, x):
        raise InvalidState(
            f"The hook at {point.name!r} returned another value, and this model is opened "
            "read-only; expected None. Only a model with a family of its own can be edited "
            "(docs: Families)."
        )


class ReadTransformer(TransformerForward):
    """The whole model, which returns what its class returns, in whatever form.

    Args:
        module: the transformer.
        points: all hook points.
        current_pass: the pass, to which every call is shown.
        progress: how far it is.
        x_name: the argument that holds x_t.
    """

    def __init__(
        self, module: Any, points: Points, current_pass: Pass, progress: Progress, x_name: str
    ) -> None:
        super().__init__(module, points, current_pass)
        self.progress, self.x_name = progress, x_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.taken.by_name(args, kwargs)
        form = {"return_dict": inputs.pop("return_dict")} if "return_dict" in inputs else {}
        with self.current_pass.forward(inputs):
            if self.current_pass.couplings:
                raise InvalidState(
                    f"{type(self.module).__name__} is opened read-only, and its attention can't "
                    "couple twins; expected a model with a family of its own."
                )
            heard = self.current_pass.listening or self.current_pass.watchers
            self.progress.begin(inputs.get(self.x_name) if heard else None)
            try:
                returned = self.own(**inputs, **form)
            finally:
                self.progress.begin(None)
            if self.sample.listeners:
                look(self.sample, returned if isinstance(returned, Tensor) else returned[0])
        return returned


class ReadBlock(Forward):
    """A block, with hook points on what enters and what leaves it.

    Args:
        module: the block.
        points: its hook points.
        progress: how far the pass is.
        layer: the block's number.
    """

    repeats = False

    def __init__(self, module: Any, points: Points, progress: Progress, layer: int) -> None:
        super().__init__(module)
        self.progress, self.layer, self.argument = progress, layer, argument_of(module)
        entering = ("hook_embed", "hook_resid_pre")
        self.before = [points[name] for name in entering if name in points]
        self.after = points["hook_resid_post"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = given(self.argument, args, kwargs)
        self.progress.enter(self.layer, x)
        for point in self.before:
            self.progress.show(point, x)
        returned = self.own(*args, **kwargs)
        if self.after.listeners:
            self.progress.show(self.after, registered_output(self.module, returned))
        return returned


class ReadPart(Forward):
    """An attention or an MLP, with hook points on what enters and what leaves it.

    Args:
        module: the attention or MLP.
        points: its block's hook points.
        progress: how far the pass is.
        prefix: the prefix of its names.
    """

    repeats = False

    def __init__(self, module: Any, points: Points, progress: Progress, prefix: str) -> None:
        super().__init__(module)
        self.progress, self.argument = progress, argument_of(module)
        self.before, self.after = points[f"{prefix}hook_in"], points[f"{prefix}hook_out"]
        self.name = self.before.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        progress = self.progress
        if progress.items is None:
            return self.own(*args, **kwargs)
        if self.name in progress.called:
            progress.again.add(self.name)
        if self.name in progress.again and (self.before.listeners or self.after.listeners):
            refuse(
                self.before,
                "its block calls this module more than once, each time for something else",
            )
        progress.called.add(self.name)
        progress.show(self.before, given(self.argument, args, kwargs))
        returned = self.own(*args, **kwargs)
        progress.show(self.after, returned)
        return returned


class ReadOnlyFamily(Family):
    """How dit_lens opens a diffusers transformer that has no family of its own; one a transformer.

    Args:
        transformer: the transformer.

    Attributes:
        arguments: names and positions of the arguments in which its blocks are given the stream.
        progress: how far the transformer's current pass is.
    """

    differs = "unknown: opened read-only, with the names that lie on its modules' boundaries"
    batch_order = None
    read_only = True
    last_sites = {"hook_sample": OUTPUT}
    first_sites = {"hook_embed": SEQUENCE}

    def __init__(self, transformer: nn.Module) -> None:
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.model_class = type(transformer).__name__
        self.x_name = "hidden_states" if "hidden_states" in names else names[0]
        self.t_name = next(name for name in TIMES if name in names)
        self.arguments = sorted({argument_of(block) for block in main_blocks(transformer)})
        self.progress = Progress()

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return main_blocks(transformer)

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        """Sizes as far as the model's own config has them under their usual names; 0, or empty,
        where it has not.
        """

        def number(*names: str) -> int:
            return next((c[name] for name in names if isinstance(c.get(name), int)), 0)

        c = transformer.config
        heads, d_head = number("num_attention_heads"), number("attention_head_dim")
        return Config(
            n_layers=len(main_blocks(transformer)),
            d_model=number("hidden_size") or heads * d_head,
            n_heads=heads,
            d_head=d_head,
            d_mlp=0,
            patch_size=number("patch_size"),
            in_channels=number("in_channels"),
            out_channels=number("out_channels", "in_channels"),
            latent_shape=(),
            grid=(),
            restartable=False,
        )

    def block_sites(self, block: Any) -> Sites:
        inside = [f"{prefix}hook_{end}" for prefix, _ in parts(block) for end in ("in", "out")]
        return dict.fromkeys(("hook_resid_pre", *inside, "hook_resid_post"), SEQUENCE)

    def absent(self, transformer: Any) -> list[str]:
        """The standard names that this model does not have; `blocks.*` where no block has it.

        Args:
            transformer: the transformer.
        """
        sites, blocks, missing = self.sites(transformer), range(len(main_blocks(transformer))), []
        for site in BLOCK_SITES:
            without = [name for i in blocks if (name := f"blocks.{i}.{site}") not in sites]
            missing += without if len(without) < len(blocks) else [f"blocks.*.{site}"]
        return missing + list(FINAL_SITES)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        forwards = [ReadBlock(block, points, self.progress, layer)]
        return forwards + [
            ReadPart(getattr(block, name), points, self.progress, prefix)
            for prefix, name in parts(block)
        ]

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return ReadTransformer(transformer, points, current_pass, self.progress, self.x_name)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return []

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        for name, value in inputs.items():
            if not _plain(value) or (name == self.x_name and not isinstance(value, Tensor)):
                raise InvalidType(
                    f"{name} is or holds what {self.model_class} can't be given again for a "
                    f"recomputation ({type(value).__name__}); expected latents in one tensor, and "
                    "further tensors, numbers and words only."
                )
        x: Tensor = inputs[self.x_name]
        return x

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        """In the transformer's own units; of several for an item, the largest."""
        t = torch.as_tensor(inputs[self.t_name])
        return t.reshape(len(t), -1).amax(1) if t.ndim > 1 else t.reshape(-1)

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        return ()

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        own = next((each for each in self.arguments if each[0] in kwargs), self.arguments[0])
        return {"": given(own, args, kwargs)}, self._skips_nothing

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream = registered_output(block, returned)
        if not isinstance(stream, Tensor):
            self._refuse(
                "its last block returns more than the stream", "the hook_resid_post of that block"
            )
        return stream

    # What it can't do.

    def _skips_nothing(self, streams: dict[str, Tensor]) -> Any:
        self._refuse("no block of it can be left out", "a whole pass, or one that stops at a layer")

    def encode(self, pipe: Any, prompt: str) -> Condition:
        self._refuse(
            "its prompts can't be encoded here", "a dict of the transformer's own arguments"
        )

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        self._refuse("its latents can't be decoded here", "its pipeline's own images")

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        self._refuse("can't be sampled here", "its pipeline's own call inside dit_lens.trace(pipe)")

    def _refuse(self, why: str, instead: str) -> NoReturn:
        raise InvalidState(
            f"{self.model_class} is opened read-only, and {why}; expected {instead}."
        )


def _plain(value: Any) -> bool:
    """Whether a value can be kept and given again."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(
        value, (Tensor, bool, int, float, str, torch.dtype, torch.device)
    )


def read_only(transformer: nn.Module) -> ReadOnlyFamily | None:
    """A read-only family for a diffusers transformer; None for what is none: a U-Net, a VAE, a
    ControlNet, no blocks, no time.

    Args:
        transformer: any module.
    """
    if not isinstance(transformer, ModelMixin) or OTHER_MODELS.search(type(transformer).__name__):
        return None
    names, blocks = (
        inspect.signature(type(transformer).forward).parameters,
        main_blocks(transformer),
    )
    if (
        not names.keys() & set(TIMES)
        or "return_dict" not in names
        or not blocks
        or len(set(blocks)) < len(blocks)
    ):
        return None
    return ReadOnlyFamily(transformer)
