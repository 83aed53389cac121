"""What a family provides: sizes, names, and forwards with hook points in them.

dit_lens changes a model by putting a callable of its own into the `forward` of some module
*instances*: the transformer, its blocks, and the parts of a block in which something happens that
has a name. A `Forward` is such a callable: an object and no closure, so that a deep copy of the
model gets forwards that compute with the copy's weights, and pickling works. It calls the module's
children by `child(...)`, so the user's own module hooks, adapters and offloading stay in force.
Whatever lies between the blocks (embedders, refiners, rotary tables) stays diffusers' own code.

A family declares: the sites of one block and its forwards, the sites and forwards outside the
blocks, the options of the model's configuration that it honours. The loops over layers are made
here. A family also says how its transformer is called: which arguments hold x_t and the time, in
which units, how latents are packed, how a prompt becomes a condition. Everything else in dit_lens
knows latents, timesteps in the scheduler's units, and conditions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .parts.sites import FINAL_SITES, RESID, SAMPLE, Axes, Sites

__all__ = [
    "Axes",
    "BlockForward",
    "Condition",
    "Config",
    "Family",
    "Forward",
    "Pass",
    "Points",
    "Sites",
    "Size",
    "Tap",
    "TransformerForward",
    "image_config",
    "shift_of",
]

Points = dict[str, HookPoint]
Size = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """Sizes of a hooked model, under TransformerLens's names where it has one.

    Attributes:
        n_layers: how many blocks there are.
        d_model: the width of the residual stream.
        n_heads: how many heads the image's attention has.
        d_head: the width of a head.
        d_mlp: how many neurons an MLP has.
        patch_size: the side of a token in the latents.
        in_channels: how many channels x_t has.
        out_channels: how many channels the model returns.
        latent_shape: one item's x_t: (channel, height, width), for video with frames among them,
            the last two height and width.
        grid: the image tokens' grid: (height, width), or (frame, height, width).
        n_classes: how many classes the model knows; 0 where prompts or the like condition it.
        restartable: whether the residual stream is all that a block is given, so that a pass can
            start at any layer.
        distilled_guidance: whether the model takes the strength of guidance as an input, instead of
            a second, null pass.
        joint: whether image and text attend as one sequence, so that the text's tokens are among
            the keys of the image's attention.
        own_axes: lengths of the axes that only this model has or has otherwise, by name. Of "key"
            it is the length without the text.

    >>> Config(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=64, patch_size=2, in_channels=4,
    ...     out_channels=4, latent_shape=(4, 8, 8), grid=(4, 4)).tokens
    16
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    patch_size: int
    in_channels: int
    out_channels: int
    latent_shape: Size
    grid: Size
    n_classes: int = 0
    restartable: bool = True
    distilled_guidance: bool = False
    joint: bool = False
    own_axes: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latent_shape[-2], self.latent_shape[-1]

    @property
    def tokens(self) -> int:
        """How many image tokens there are."""
        return math.prod(self.grid)

    def axis_sizes(self, batch: int | None = None, text: int | None = None) -> dict[str, int]:
        """How long each axis of a hook point is, by the axis names of `model.sites`.

        Args:
            batch: items; without it the axis "batch" is left out.
            text: text tokens as the blocks compute them, padding included: the length of
                "text_token". Without it the axes that it sets are left out, in a joint attention
                "key" among them.

        Returns:
            Lengths by axis name. Of a model that is opened read-only they are what its own
            configuration says, which may be nothing.

        >>> import dit_lens
        >>> dit_lens.load("digits").cfg.axis_sizes(batch=2)["patch"]
        4
        """
        sizes = {} if batch is None else {"batch": batch}
        if not self.grid:
            return sizes | ({"d_model": self.d_model} if self.d_model else {})
        elements = math.prod(self.latent_shape) // self.in_channels  # of one channel
        sizes |= {
            "token": self.tokens,
            "query": self.tokens,
            "key": self.tokens,
            "image_key": self.tokens,
            "head": self.n_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "patch": self.out_channels * elements // self.tokens,
            "channel": self.out_channels,
            "frame": elements // math.prod(self.pixels),
            "height": self.pixels[0],
            "width": self.pixels[1],
            **self.own_axes,
        }
        if text is not None:
            sizes |= {"text_token": text, "text_query": text, "text_key": text}
        if self.joint:
            keys = sizes.pop("key")
            sizes |= {} if text is None else {"key": keys + text}
        return sizes

    @property
    def null_class(self) -> int:
        """The label that stands for 'no condition' in classifier-free guidance: one after the last
        class; -1 for prompts.
        """
        return self.n_classes or -1

    @property
    def learned_sigma(self) -> bool:
        """Whether the model also predicts a variance, in the second half of its output channels."""
        return self.out_channels == 2 * self.in_channels


def image_config(transformer: Any, size: Size | None = None, **own: Any) -> Config:
    """The sizes of an image transformer whose configuration has diffusers' usual names.

    Args:
        transformer: a diffusers transformer.
        size: (height, width) of the latents, instead of the model's own `sample_size`.
        own: further fields of `Config`, and those that this model has otherwise.

        return image_config(transformer, size, restartable=False)
    """
    c = transformer.config
    height, width = size or (c.sample_size, c.sample_size)
    heads = c.num_attention_heads
    d_head = own["d_head"] if "d_head" in own else c.attention_head_dim
    sizes = {
        "n_layers": c.num_layers,
        "d_model": heads * d_head,
        "n_heads": heads,
        "d_head": d_head,
        "d_mlp": 4 * heads * d_head,
        "patch_size": c.patch_size,
        "in_channels": c.in_channels,
        "out_channels": vars(transformer).get("out_channels") or c.out_channels,
        "latent_shape": (c.in_channels, height, width),
        "grid": (height // c.patch_size, width // c.patch_size),
    }
    return Config(**(sizes | own))


class Condition(dict[str, Any]):
    """All that a transformer is given besides x_t and the time, by its own argument names.

    Attributes:
        labels: the numbers [batch] of the prompts that it was made from, if it was; see
            `dit_lens.model.conditions`.

    Args:
        values: a dict of arguments, if any.
        named: arguments by name.

    >>> Condition(class_labels=torch.tensor([3, 7]))["class_labels"]
    tensor([3, 7])
    """

    labels: Tensor | None = None

    def __init__(self, *values: Mapping[str, Any], **named: Any) -> None:
        super().__init__(*values, **named)

    @classmethod
    def numbered(cls, values: Mapping[str, Any], labels: Tensor | None) -> Condition:
        """A condition that knows the numbers of its prompts or classes.

        Args:
            values: the transformer's arguments by name.
            labels: the numbers [batch], if they are known.
        """
        made = cls(values)
        made.labels = labels
        return made


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
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        return_dict = inputs.pop("return_dict", return_dict)
        with self.current_pass.forward(inputs):
            output = self.answer(self.own(**inputs, return_dict=False)[0])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

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
        self, module: Any, before: HookPoint | None = None, after: HookPoint | None = None
    ) -> None:
        super().__init__(module)
        self.before, self.after = before, after

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.own(x if self.before is None else self.before(x), *args, **kwargs)
        return x if self.after is None else self.after(x)


class Family:
    """How dit_lens opens one class of transformers; subclass it and `register` an instance.

    A subclass declares the attributes below and defines `config`, `block_sites`, `block_forwards`
    and `small`; `encode` where prompts condition the model; any other method where its model
    differs from what is said here.

    Attributes:
        model_class: the diffusers class that it opens.
        differs: one line: where its block differs from the DiT block, for the docs.
        first_sites: the names before the blocks, in forward order.
        last_sites: the names after the blocks.
        last_projection: the transformer's child that computes `final.hook_out`.
        x_name: the argument that holds x_t.
        t_name: the argument that holds the time.
        labels_name: the argument that holds the class labels, in a class-conditional model.
        batch_order: how its pipelines guide: the branches in which a doubled batch is stacked,
            ("uncond", "cond") or ("cond", "uncond"), or None where each branch is a call of its
            own, the conditional one first.
        known_options: the options of the model's configuration that the family honours, whatever
            their values; None: all. Others are refused unless they have the class's own default.
        read_only: whether hooks may only look: nothing can be sampled, coupled, edited or read
            through the last layer.
        written_for: digests of the diffusers source that its forwards repeat, by "Class.method";
            see `dit_lens.families.upstream`.

        class MyFamily(Family):
            model_class = "MyTransformer2DModel"
            differs = "no gates"

            def config(self, transformer, size=None):
                return image_config(transformer, size)

            def block_sites(self, block):
                return SITES

            def block_forwards(self, block, points, current_pass, layer):
                return [MyBlockForward(block, points)]

        register(MyFamily())
    """

    model_class: str
    differs: str
    first_sites: Sites = {"hook_embed": RESID}
    last_sites: Sites = {**FINAL_SITES, "hook_sample": SAMPLE}
    last_projection = "proj_out"
    x_name, t_name, labels_name = "hidden_states", "timestep", "class_labels"
    batch_order: tuple[str, str] | None = ("uncond", "cond")
    known_options: frozenset[str] | None = None
    read_only = False
    written_for: dict[str, str] = {}

    # What a family declares.

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """The blocks in forward order, `blocks.{i}` of the names.

        Args:
            transformer: the transformer.
        """
        return list(transformer.transformer_blocks)

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        """The model's sizes; `image_config` has them for the usual configuration.

        Args:
            transformer: the transformer.
            size: (height, width) of the latents, or (frames, height, width), instead of the model's
                own.
        """
        raise NotImplementedError

    def block_sites(self, block: Any) -> Sites:
        """The names of one block, without `blocks.{i}.`, in forward order, each with its axes.

        Args:
            block: the block.
        """
        raise NotImplementedError

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        """The replacements within one block, its own among them.

        Args:
            block: the block.
            points: its hook points, by the names of `block_sites`; the first block is also given
                those of what enters it, `hook_embed`.
            current_pass: the pass that the forwards will run in.
            layer: the block's number.
        """
        raise NotImplementedError

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        """The replacement for the transformer's own forward.

        Args:
            transformer: the transformer.
            points: all hook points, by full name.
            current_pass: the pass that the forwards will run in.
        """
        return TransformerForward(transformer, points, current_pass)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        """The replacements outside the blocks, except the transformer's own: here the last
        projection.

        Args:
            transformer: the transformer.
            points: all hook points, by full name.
            current_pass: the pass that the forwards will run in.
        """
        last = getattr(transformer, self.last_projection)
        return [Tap(last, points["final.hook_in"], points["final.hook_out"])]

    def absent(self, transformer: Any) -> list[str]:
        """The standard names that a model lacks of which only the outside is known.

        Args:
            transformer: the transformer.
        """
        return []

    def check_model(self, transformer: Any) -> None:
        """Refuse a model that has something switched on which the forwards do not honour.

        A subclass adds its own refusals and then calls this one, which compares the configuration
        with the class's own defaults: an option that the family does not know, as a newer
        diffusers may have it, is refused unless it is at its default.

        Args:
            transformer: the transformer.

        Raises:
            InvalidValue: for the first thing that is not honoured.
        """
        if self.known_options is None:
            return
        # a subclass's defaults over those of its base classes
        inits = [vars(cls).get("__init__") for cls in reversed(type(transformer).__mro__)]
        defaults = {
            name: parameter.default
            for init in inits
            if init is not None
            for name, parameter in inspect.signature(init).parameters.items()
        }
        for name, default in defaults.items():
            if name in self.known_options or name not in transformer.config:
                continue
            value = transformer.config[name]
            if _plain(value) != _plain(default):
                raise InvalidValue(
                    f"The model has {name}={value!r}, an option of {type(transformer).__name__} "
                    f"that dit_lens does not know; expected {name}={default!r}, its default, or a "
                    "newer dit_lens."
                )

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        """Refuse arguments that the model would fail on or, worse, silently get wrong.

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
        """

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        """A tiny model with all weights alive and a condition for two items, for `dit-lens
        check-family`.

        Args:
            variant: 0, 1 or 2, as different as the family allows.
        """
        raise NotImplementedError

    def small_pipeline(self) -> Any:
        """A pipeline of tiny random parts around `small(0)`'s model, or None."""
        return None

    def small_call(self, guided: bool) -> dict[str, Any]:
        """What `small_pipeline()` is called with for two items in two steps.

        Args:
            guided: with guidance, or without.
        """
        return {
            "prompt": ["a red fox", "a boat"],
            "height": 16,
            "width": 16,
            "num_inference_steps": 2,
            "guidance_scale": 4.0 if guided else 1.0,
        }

    # What is made of that.

    @final
    def sites(self, transformer: Any) -> Sites:
        """Every hook name with the names of its axes, in forward order.

        Args:
            transformer: the transformer.
        """
        sites = dict(self.first_sites)
        for i, block in enumerate(self.blocks(transformer)):
            own = self.block_sites(block)
            sites |= {f"blocks.{i}.{site}": axes for site, axes in own.items()}
        return sites | self.last_sites

    @final
    def forwards(self, transformer: Any, points: Points, current_pass: Pass) -> list[Forward]:
        """The replacements, the transformer's own first.

        Args:
            transformer: the transformer.
            points: all hook points, by full name.
            current_pass: the pass that the forwards will run in.
        """
        forwards: list[Forward] = [self.whole_forward(transformer, points, current_pass)]
        embeds = {n: points[n] for n in self.first_sites if n.endswith("hook_embed")}
        for i, block in enumerate(self.blocks(transformer)):
            own = {site: points[f"blocks.{i}.{site}"] for site in self.block_sites(block)}
            own = own if i else embeds | own
            forwards += self.block_forwards(block, own, current_pass, i)
        return [*forwards, *self.outer_forwards(transformer, points, current_pass)]

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """What trying changed diffusers sources on the small models found, by their digests."""
        return {}

    # How its transformer is called.

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        """The transformer's arguments.

        Args:
            transformer: the transformer.
            x: latents [batch, *latent_shape].
            t: timesteps [batch], in the scheduler's units.
            condition: all further arguments.
        """
        return {self.x_name: x, self.t_name: t, **condition}

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        """What the transformer answered, as the scheduler expects it, in the latents' shape.

        Args:
            transformer: the transformer.
            answer: what it returned.
            inputs: the arguments that it was given.
        """
        return answer

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        """x_t [batch, *latent_shape] among the transformer's arguments.

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
        """
        x: Tensor = inputs[self.x_name]
        return x

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        """The time among the transformer's arguments, in the scheduler's units, [batch] or [1].

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
        """
        t: Tensor = inputs[self.t_name]
        return t

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        """The image tokens' grid for these arguments.

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
        """
        height, width = self.latents(transformer, inputs).shape[-2:]
        p = transformer.config.patch_size
        return height // p, width // p

    def encode(self, pipe: Any, prompt: str) -> Condition:
        """The condition of one prompt, batch axis 1, by the pipeline's own text encoders.

        Args:
            pipe: the pipeline.
            prompt: the prompt; "" is what guidance compares with.
        """
        raise NotImplementedError

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        """Conditions of single items as one of a batch.

        Args:
            conditions: one an item.
        """
        return Condition({name: torch.cat([c[name] for c in conditions]) for name in conditions[0]})

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents as images [batch, channel, height, width] (video: [batch, channel, frame, height,
        width]), about -1 to 1.

        Args:
            vae: the pipeline's autoencoder.
            latents: [batch, *latent_shape].
        """
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        image: Tensor = vae.decode(
            (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        ).sample
        return image

    def strength(self, transformer: Any, guidance: Tensor) -> Tensor:
        """What a distilled transformer is given as `guidance` for a strength of guidance.

        Args:
            transformer: the transformer.
            guidance: strengths [batch].
        """
        return guidance

    def guided(self, cond: Tensor, null: Tensor, strength: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), as the family's pipeline mixes two
        answers.

        Args:
            cond: the answer to the condition.
            null: the answer to none.
            strength: the guidance scale; 1 is none.
        """
        return null + strength * (cond - null)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Give the scheduler its timesteps as the family's pipeline does.

        Args:
            scheduler: a diffusers scheduler.
            steps: how many denoising steps.
            tokens: how many tokens an image has.
        """
        shifted = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(steps, **({"mu": shift_of(scheduler, tokens)} if shifted else {}))

    # Skipping a block.

    def skip_block(
        self, inputs: dict[str, Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """What takes the place of a block that is left out.

        Args:
            inputs: the transformer's arguments.
            args: the block's positional arguments.
            kwargs: the block's arguments by name.

        Returns:
            The image's stream that enters the block, and a function from a stream that leaves it to
            what the block would return.
        """
        x = args[0] if args else kwargs["hidden_states"]
        return x, lambda stream: stream

    def stream_in(self, block: Any, inputs: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        """A block's `hook_resid_pre`, from its arguments.

        Args:
            block: the block.
            inputs: the transformer's arguments.
            args: the block's positional arguments.
            kwargs: the block's arguments by name.
        """
        return self.skip_block(inputs, args, kwargs)[0]

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        """The image's stream that leaves a block, from what the block returned.

        Args:
            block: the block.
            inputs: the transformer's arguments.
            returned: what the block returned.
        """
        stream: Tensor = returned
        return stream


def _plain(value: Any) -> Any:
    """An option's value, with lists and tuples alike: a configuration is stored as JSON."""
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def shift_of(scheduler: Any, tokens: int) -> float:
    """The shift of a flow-matching schedule for images of so many tokens: linear between two sizes
    (Esser et al. 2024, section 5.3.2).

    Args:
        scheduler: a diffusers scheduler, whose configuration holds both sizes.
        tokens: how many tokens an image has.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> round(shift_of(FlowMatchEulerDiscreteScheduler(), tokens=4096), 2)
    1.15
    """
    c = scheduler.config
    few, many = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    low, high = c.get("base_shift", 0.5), c.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)
