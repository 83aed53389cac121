"""What a family provides.

A family declares: the sites of one block and its forwards, the sites and forwards outside the
blocks, the options of the model's configuration that it honours. The loops over layers are made
here. A family also says how its transformer is called: which arguments hold x_t and the time, in
which units, how latents are packed, how a prompt becomes a condition. Everything else in dit_lens
knows latents, timesteps in the scheduler's units, and conditions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .config import Condition, Config, Size
from .forwards import Forward, Points, Tap, TransformerForward
from .parts.sites import FINAL_SITES, RESID, SAMPLE, Sites
from .parts.words import Text

Skipped = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]
"""What takes the place of a block that is left out; see `Family.skip_block`."""


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
        prompt_names: its pipelines' arguments that hold the prompts of the text's keys; one that
            is not given is the first one, `prompt`.
        known_options: the options of the model's configuration that the family honours, whatever
            their values; None: all. Others are refused unless they have the class's own default.
        read_only: whether hooks may only look: nothing can be sampled, coupled, edited or read
            through the last layer.
        computes: for each part of a block that is added to the streams ("attn", "mlp", ...) the
            block's children that compute it and nothing else; where a part is not among them it can
            only be left out together with the whole block.
        pads: whether the blocks' sequence has tokens that are neither image nor text and that
            others attend to; these have no hook points, and get nothing from a part that is left
            out.
        empty: the condition that asks for nothing, batch axis 1, where it is known without a
            pipeline.
        described: how the transformer's user described it: blocks, parts, adapter; None where
            nobody did.
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
    prompt_names: tuple[str, ...] = ("prompt",)
    known_options: frozenset[str] | None = None
    read_only = False
    described: tuple[Any, ...] | None = None
    pads = False
    empty: Condition | None = None
    computes: dict[str, tuple[str, ...]] = {
        "attn": ("attn1",),
        "cross_attn": ("attn2",),
        "mlp": ("ff",),
    }
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

    def call(self, transformer: Any, inputs: dict[str, Any]) -> Any:
        """What the transformer answers, not yet as the scheduler expects it.

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
        """
        answer = transformer(**inputs, return_dict=False)
        # some classes answer with the bare tensor
        return answer if isinstance(answer, Tensor) else answer[0]

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        """What the transformer answered, as the scheduler expects it, in the latents' shape.

        Args:
            transformer: the transformer.
            answer: what it returned.
            inputs: the arguments that it was given.
        """
        return answer

    def final(
        self, transformer: Any, stream: Tensor, inputs: dict[str, Any], memo: dict[str, Any]
    ) -> Tensor | None:
        """The last layer alone, as the lens reads a stream by it; None, the default, where only the
        transformer's own forward can say what follows the blocks.

        It calls `module.forward`, so that nobody's module hooks hear of it.

        Args:
            transformer: the transformer.
            stream: [batch, token, d_model].
            inputs: the transformer's arguments, of which x does not matter.
            memo: for what is the same for all streams read with these arguments.
        """
        return None

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

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        """What the keys of a prompt come from: the text that each tokenizer is given.

        Args:
            pipe: the pipeline.
            prompt: the prompt.
        """
        return [Text(pipe.tokenizer, prompt)]

    def said(self, prompt: str) -> str:
        """The prompt that a user gave, from what its pipeline makes of it.

        Args:
            prompt: what the pipeline holds as its prompt while it runs.
        """
        return prompt

    def text_length(self, inputs: dict[str, Any], item: int) -> int | None:
        """How many of an item's text tokens are no padding; None where the arguments don't say.

        Args:
            inputs: the transformer's arguments by name.
            item: which one.
        """
        for name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
            mask = inputs.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 2 and item < len(mask):
                return int((mask[item] > 0).sum())
        return None

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        """Where the text's keys are among those of the image's attention, a slice or positions
        [batch, n]; all of them in a cross-attention.

        Args:
            transformer: the transformer.
            inputs: its arguments by name.
            keys: how many keys there are.
        """
        return slice(None)

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        """Conditions of single items as one of a batch.

        Args:
            conditions: one an item.
        """
        return Condition({name: torch.cat([c[name] for c in conditions]) for name in conditions[0]})

    def check_labels(self, labels: Tensor, items: int, known: Callable[[Tensor], object]) -> None:
        """Refuse labels that the model does not have; most families do in `check_input`.

        Args:
            labels: as the user gave them.
            items: how many items there are.
            known: raises for a label that the model does not have.
        """

    def check_condition(self, prompt: str, condition: Condition) -> None:
        """Refuse a condition, given by hand, that the transformer can't be given.

        Args:
            prompt: its prompt.
            condition: the transformer's further arguments, batch axis 1.
        """

    def shares_steps(self, transformer: Any, pipe: Any) -> bool:
        """Whether a pipeline computes some of its steps with a second transformer.

        Args:
            transformer: that is opened.
            pipe: its pipeline, or None.
        """
        second = getattr(pipe, "transformer_2", None)
        return isinstance(second, nn.Module) and second is not transformer

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

    def count_time(self, scheduler: Any, alone: bool) -> None:
        """Told, as a model is opened, which scheduler its timesteps will be of; most families give
        them to the model as they are.

        Args:
            scheduler: a diffusers scheduler, or None.
            alone: whether nobody else has this model open.
        """

    def certain_at(self, name: str) -> str:
        """The hook name up to which a pass has to go for a value to be certain; itself where its
        module runs once.

        Args:
            name: the value's hook name.
        """
        return name

    # Skipping a block.

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        """What takes the place of a block that is left out.

        Args:
            inputs: the transformer's arguments.
            args: the block's positional arguments.
            kwargs: the block's arguments by name.

        Returns:
            The streams that enter the block, by the prefix of their names: the image's at "", and
            "text." where the block changes a text; and a function from streams that leave it to
            what the block would return.
        """
        x = args[0] if args else kwargs["hidden_states"]
        return {"": x}, lambda streams: streams[""]

    def stream_in(self, block: Any, inputs: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        """A block's `hook_resid_pre`, from its arguments.

        Args:
            block: the block.
            inputs: the transformer's arguments.
            args: the block's positional arguments.
            kwargs: the block's arguments by name.
        """
        return self.skip_block(inputs, args, kwargs)[0][""]

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
