"""What a family provides: sizes, names, and forwards with hook points in them.

dit_lens changes a model by putting a callable of its own into the `forward` of some module
*instances*: the transformer, its blocks, and the parts of a block in which something happens that
has a name. A `Forward` is such a callable: an object and no closure, so that a deep copy of the
model gets forwards that compute with the copy's weights, and pickling works. It calls the module's
children by `child(...)`, so the user's own module hooks, adapters and offloading stay in force.
Whatever lies between the blocks (embedders, refiners, rotary tables) stays diffusers' own code.

A family also says how its transformer is spoken to: which arguments hold x_t and the time, in which
units, how latents are packed, how a prompt becomes a condition. Everything else in dit_lens knows
latents, timesteps in the scheduler's units, and conditions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..hooks.points import HookPoint

Axes = tuple[str, ...]
Points = dict[str, HookPoint]
Size = tuple[int, ...]

RESID, COND = ("batch", "token", "d_model"), ("batch", "d_model")
TEXT = ("batch", "text_token", "d_model")
SAMPLE = ("batch", "channel", "height", "width")


@dataclass(frozen=True)
class Config:
    """Sizes of a hooked model, under TransformerLens's names where it has one.

    Attributes:
        latent_shape: one item's x_t: (channel, height, width), for video with frames among them,
            the last two height and width.
        grid: the image tokens' grid: (height, width), or (frame, height, width).
        n_classes: how many classes the model knows; 0 where prompts or the like condition it.
        restartable: whether the residual stream is all that a block is given, so that a pass can
            start at any layer.
        distilled_guidance: whether the model takes the strength of guidance as an input, instead of
            a second, null pass.
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
            text: text tokens; without it the axes of the text are left out.
        """
        sizes = {
            "token": self.tokens,
            "query": self.tokens,
            "key": self.tokens,
            "head": self.n_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "patch": self.out_channels
            * (self.pixels[0] * self.pixels[1])
            // (self.grid[-2] * self.grid[-1]),
            "channel": self.out_channels,
            "frame": next(
                (n for n in self.latent_shape[:-2] if n != self.in_channels), self.in_channels
            ),
            "height": self.pixels[0],
            "width": self.pixels[1],
        }
        if batch is not None:
            sizes["batch"] = batch
        if text is not None:
            sizes |= {"text_token": text, "text_query": text, "text_key": text}
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


class Condition(dict[str, Any]):
    """All that a transformer is told besides x_t and the time, by its own argument names.

    Attributes:
        labels: the numbers [batch] of the prompts that it was made from, if it was; see
            `dit_lens.model.conditions`.
    """

    labels: Tensor | None = None

    @classmethod
    def numbered(cls, values: Mapping[str, Any], labels: Tensor | None) -> Condition:
        """A condition that knows the numbers [batch] of its prompts or classes."""
        made = cls(values)
        made.labels = labels
        return made


class Forward:
    """A replacement for `module.forward`.

    Subclasses define `__call__` with the original's signature.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    __call__: Callable[..., Any]

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's class computes."""
        return type(self.module).forward(self.module, *args, **kwargs)


class TransformerForward(Forward):
    """The whole model, as diffusers runs it, known to the instrumentation from its first argument
    to its answer.
    """

    def __init__(self, module: Any, points: Points, instrumentation: Any) -> None:
        super().__init__(module)
        self.sample, self.instrumentation = points["hook_sample"], instrumentation
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        return_dict = inputs.pop("return_dict", return_dict)
        with self.instrumentation.forward(inputs):
            output = self.answer(self.own(**inputs, return_dict=False)[0])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def answer(self, output: Any) -> Any:
        return self.sample(output)


class Tap(Forward):
    """Any module, with a hook point before and after it, or only one of them."""

    repeats = False  # it calls the class's own forward, so a changed one is no matter

    def __init__(
        self, module: Any, before: HookPoint | None = None, after: HookPoint | None = None
    ) -> None:
        super().__init__(module)
        self.before, self.after = before, after

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.own(x if self.before is None else self.before(x), *args, **kwargs)
        return x if self.after is None else self.after(x)


class Family:
    """The registry's unit: one instance per model class.

    Methods that are not defined here must be by the family.

    Attributes:
        model_class: the diffusers class that it opens.
        differs: one line: where its block differs from the DiT block, for the docs.
        x_name, t_name, labels_name: the arguments that hold x_t, the time and, in a
            class-conditional model, the class labels.
        batch_order: how its pipelines guide: the branches in which a doubled batch is stacked,
            ("uncond", "cond") or ("cond", "uncond"), or None where each branch is a call of its
            own, the conditional one first.
        read_only: whether hooks may only look: nothing can be sampled, coupled, edited or read
            through the last layer.
        written_for: digests of the diffusers source that its forwards repeat, by "Class.method";
            see `dit_lens.families.upstream`.
    """

    model_class: str
    differs: str
    x_name, t_name, labels_name = "hidden_states", "timestep", "class_labels"
    batch_order: tuple[str, str] | None = ("uncond", "cond")
    read_only = False
    written_for: dict[str, str] = {}

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """The blocks in forward order, `blocks.{i}` of the names."""
        return list(transformer.transformer_blocks)

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        """The model's sizes.

        `size` is (height, width) of the latents, or (frames, height, width), instead of the model's
        own.
        """
        raise NotImplementedError

    def sites(self, transformer: Any) -> dict[str, Axes]:
        """Every hook name with the names of its axes, in forward order."""
        raise NotImplementedError

    def absent(self, transformer: Any) -> list[str]:
        """The standard names that a model lacks of which only the outside is known."""
        return []

    def check_model(self, transformer: Any) -> None:
        """Raise one clear sentence if the model has something switched on that the forwards do not
        honour.
        """

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        """Raise one clear sentence for arguments that the model would fail on or, worse, silently
        get wrong.
        """

    def forwards(self, transformer: Any, points: Points, instrumentation: Any) -> Sequence[Forward]:
        """The replacements, the transformer's own first."""
        raise NotImplementedError

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        """A tiny model with all weights alive and a condition for two items: for `dit-lens
        check-family`. Three variants, 0 to 2.
        """
        raise NotImplementedError

    def small_pipeline(self) -> Any:
        """A pipeline of tiny random parts around `small(0)`'s model; None if the family has none."""
        return None

    def small_call(self, guided: bool) -> dict[str, Any]:
        """What `small_pipeline()` is called with for two items in two steps, with guidance and
        without.
        """
        return {
            "prompt": ["a red fox", "a boat"],
            "height": 16,
            "width": 16,
            "num_inference_steps": 2,
            "guidance_scale": 4.0 if guided else 1.0,
        }

    # How its transformer is spoken to.

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        """The transformer's arguments for latents [batch, *latent_shape], timesteps [batch] in the
        scheduler's units, and a condition.
        """
        return {self.x_name: x, self.t_name: t, **condition}

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        """What the transformer answered, as the scheduler expects it, in the latents' shape."""
        return answer

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        """x_t [batch, *latent_shape] among the transformer's arguments."""
        x: Tensor = inputs[self.x_name]
        return x

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        """The time among the transformer's arguments, in the scheduler's units, [batch] or [1]."""
        t: Tensor = inputs[self.t_name]
        return t

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        """The image tokens' grid for these arguments."""
        height, width = self.latents(transformer, inputs).shape[-2:]
        p = transformer.config.patch_size
        return height // p, width // p

    def encode(self, pipe: Any, prompt: str) -> Condition:
        """The condition of one prompt, batch axis 1, by the pipeline's own text encoders."""
        raise NotImplementedError

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        """Conditions of single items as one of a batch."""
        return Condition({name: torch.cat([c[name] for c in conditions]) for name in conditions[0]})

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents as images [batch, channel, height, width] (video: [batch, channel, frame, height,
        width]), about -1 to 1.
        """
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        image: Tensor = vae.decode(
            (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        ).sample
        return image

    def strength(self, transformer: Any, guidance: Tensor) -> Tensor:
        """What a distilled transformer is given as `guidance` [batch] for a strength of guidance."""
        return guidance

    def guided(self, cond: Tensor, null: Tensor, strength: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), as the family's pipeline mixes two
        answers.
        """
        return null + strength * (cond - null)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Give the scheduler its timesteps as the family's pipeline does, for images of so many
        tokens.
        """
        options = (
            {"mu": shift_of(scheduler, tokens)}
            if scheduler.config.get("use_dynamic_shifting")
            else {}
        )
        scheduler.set_timesteps(steps, **options)

    # What a block does if it does nothing.

    def passed(
        self, inputs: dict[str, Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """From a block's arguments: the image's stream that enters it, and what the block returns
        if a stream just goes through.

        `inputs` are the transformer's arguments.
        """
        x = args[0] if args else kwargs["hidden_states"]
        return x, lambda stream: stream

    def entering(self, block: Any, inputs: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        """From a block's arguments: its `hook_resid_pre`."""
        return self.passed(inputs, args, kwargs)[0]

    def leaving(self, inputs: dict[str, Any], returned: Any) -> Tensor:
        """From what a block returned: the image's stream that leaves it."""
        stream: Tensor = returned
        return stream


def shift_of(scheduler: Any, tokens: int) -> float:
    """The shift of a flow-matching schedule for images of so many tokens: linear between two sizes
    (Esser et al. 2024, section 5.3.2).
    """
    c = scheduler.config
    few, many = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    low, high = c.get("base_shift", 0.5), c.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)
