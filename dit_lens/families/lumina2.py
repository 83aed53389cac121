"""Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758) as diffusers' `Lumina2Transformer2DModel`.

Caption and image are one sequence, `[caption | image | padding]`, that goes through the same
weights. Each item's image comes right after its own caption, so it lies elsewhere in each item; the
hook points take the two apart. The plain names are the image's, the grid's tokens in order. The
prefix `text.` is all the rest: the caption, followed by the padding that makes the items equally
long, which the model computes and nothing attends to. Keys are in the model's own order. The
modulations are the same vectors for both parts; gates go through tanh (`hook_gate_*` is what comes
out of it), and there is no shift. What a sublayer puts out is normalised once more before it is
added (`ln1_post.`, `ln2_post.`), and several heads share a key and a value (the axis `kv_head`).

The refiners before the blocks, of the image alone and of the caption alone, stay diffusers' own.
The block is in `parts/one_sequence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .base import shift_of
from .config import Condition, Config, Size, image_config
from .forwards import Forward, Points
from .parts.attention import Kernel
from .parts.joint import AnyPoints, Joint
from .parts.layers import refuse_processors
from .parts.one_sequence import (
    LastForward,
    OneSequenceFamily,
    SandwichAttentionForward,
    SandwichForward,
    SandwichMLPForward,
    backwards,
    sandwich_sites,
)
from .parts.sites import Sites
from .parts.words import Text
from .registry import register
from .small import alive, small_text, small_vae


class Lumina2BlockForward(SandwichForward):
    """One block."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Tensor,
        temb: Tensor,
    ) -> Tensor:
        block, hook = self.module, self.points
        x = self.enter(hidden_states)

        # the norm also makes all modulations
        h, gate_attn, scale_mlp, gate_mlp = block.norm1(x, temb)
        gate_attn, gate_mlp = (
            hook[f"adaln.hook_gate_{sub}"](gate.unsqueeze(1).tanh().squeeze(1)).unsqueeze(1)
            for sub, gate in (("attn", gate_attn), ("mlp", gate_mlp))
        )

        # attention
        out = block.attn(
            h,
            encoder_hidden_states=h,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        x = self.after_attention(x, out, gate_attn, block.norm2)

        # MLP
        h = hook["ln2.hook_normalized"](block.ffn_norm1(x)) * (1 + scale_mlp.unsqueeze(1))
        return self.after_mlp(x, block.feed_forward(h), gate_mlp, block.ffn_norm2)


class NormForward(Forward):
    """LuminaRMSNormZero: the modulations, and the first normalisation.

    Args:
        module: the norm.
        points: the block's hook points, on the joint sequence.
    """

    def __init__(self, module: Any, points: AnyPoints) -> None:
        super().__init__(module)
        self.points = points

    def __call__(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        norm, hook = self.module, self.points
        chunks = norm.linear(norm.silu(hook["hook_cond"](emb))).chunk(4, dim=1)
        scale_attn, scale_mlp = (
            hook[f"adaln.hook_scale_{sub}"](chunks[i]) for i, sub in ((0, "attn"), (2, "mlp"))
        )
        h = hook["ln1.hook_normalized"](norm.norm(x)) * (1 + scale_attn[:, None])
        return hook["attn.hook_in"](h), chunks[1], scale_mlp, chunks[3]


class AttentionForward(SandwichAttentionForward):
    """Attention of all tokens with all; several heads share a key and a value."""

    processor = Lumina2AttnProcessor2_0

    def kernel(self, attn: Attention) -> Kernel:
        return partial(F.scaled_dot_product_attention, scale=attn.scale)


class MLPForward(SandwichMLPForward):
    """The gated MLP, by Lumina's names of its parts."""

    def parts(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        mlp = self.module
        return mlp.linear_1, mlp.silu, mlp.linear_3, mlp.linear_2


class FinalForward(LastForward):
    """The last norm and projection."""

    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        norm = self.module
        scale = norm.linear_1(norm.silu(conditioning_embedding).to(x.dtype))
        return self.projected(x, scale, norm.norm, norm.linear_2)


class Lumina2Family(OneSequenceFamily):
    """How dit_lens opens a `Lumina2Transformer2DModel`."""

    model_class = "Lumina2Transformer2DModel"
    differs = (
        "caption and image in one sequence, through the same weights; a norm before and after "
        "each sublayer; gates through tanh"
    )
    batch_order = None
    computes = {"attn": ("attn",), "mlp": ("feed_forward",)}
    written_for = {
        "Attention.forward": "f4dadb54",
        "Lumina2AttnProcessor2_0.__call__": "8114ed7f",
        "Lumina2TransformerBlock.forward": "ce4373cf",
        "LuminaFeedForward.forward": "c06931ca",
        "LuminaLayerNormContinuous.forward": "0dc09977",
        "LuminaRMSNormZero.forward": "f64e8253",
    }

    known_options = frozenset(
        "sample_size patch_size in_channels out_channels hidden_size num_layers "
        "num_refiner_layers num_attention_heads num_kv_heads multiple_of ffn_dim_multiplier "
        "norm_eps scaling_factor axes_dim_rope axes_lens cap_feat_dim".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c, block = transformer.config, transformer.layers[0]
        return image_config(
            transformer,
            size,
            d_model=c.hidden_size,
            d_head=c.hidden_size // c.num_attention_heads,
            d_mlp=block.feed_forward.linear_1.out_features,
            restartable=False,
            joint=True,
            own_axes={"kv_head": c.num_kv_heads, "d_cond": block.norm1.linear.in_features},
        )

    def block_sites(self, block: Any) -> Sites:
        return sandwich_sites("kv_head")

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        joint = self.joined(points, current_pass)
        return [
            Lumina2BlockForward(block, joint),
            NormForward(block.norm1, joint),
            AttentionForward(block.attn, joint, current_pass, layer),
            MLPForward(block.feed_forward, joint),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return [FinalForward(transformer.norm_out, self.joined(points, current_pass))]

    def check_model(self, transformer: Any) -> None:
        refuse_processors(transformer.layers, attn=Lumina2AttnProcessor2_0)
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        c, p = transformer.config, transformer.config.patch_size
        x, mask = inputs.get("hidden_states"), inputs.get("encoder_attention_mask")
        if (
            not isinstance(x, Tensor)
            or x.ndim != 4
            or x.shape[1] != c.in_channels
            or x.shape[2] % p
            or x.shape[3] % p
        ):
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InvalidValue(
                f"The latents have {got}; expected [batch, {c.in_channels}, height, width], height "
                f"and width multiples of {p}."
            )
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(x):
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise InvalidValue(
                f"encoder_attention_mask has {got}; expected [{len(x)}, token], 1 where the "
                "caption is and 0 after it."
            )
        if mask.device.type != "meta" and bool((mask[:, 1:].int() > mask[:, :-1].int()).any()):
            raise InvalidValue(
                "encoder_attention_mask has captions that do not start at the first token, and the "
                "model would read the padding in their place; expected padding on the right: "
                "pipe.tokenizer.padding_side = 'right'."
            )

    def joint(self, inputs: dict[str, Any], length: int, transformer: Any = None) -> Joint:
        """`[caption | image | padding]`: the image comes right after each item's own caption, and
        all that is left is the text's.

        Args:
            inputs: the transformer's arguments.
            length: how many tokens the sequence has.
            transformer: the transformer; without it this makes a GPU wait.
        """
        captions = inputs["encoder_attention_mask"].sum(1, keepdim=True)
        if transformer is None:
            tokens = length - int(captions.max())
        else:
            tokens = prod(self.grid(transformer, inputs))
        image = captions + torch.arange(tokens, device=captions.device)
        place = torch.arange(length - tokens, device=captions.device)
        return Joint(image, place + tokens * (place >= captions))

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": (1 - t / 1000).float(), **condition}

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        return backwards(inputs["timestep"])

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        return -answer

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        options = (
            {"mu": shift_of(scheduler, tokens)}
            if scheduler.config.get("use_dynamic_shifting")
            else {}
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return self.joint(inputs, keys, transformer).text

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        # what goes before all prompts but the empty one
        whole = f"{pipe.system_prompt} <Prompt Start> {prompt}" if prompt else prompt
        return [Text(pipe.tokenizer, whole)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        """The empty prompt is encoded as the pipeline's negative one: without the system prompt
        that goes before all others.
        """
        *cond, null, null_mask = pipe.encode_prompt(prompt, do_classifier_free_guidance=not prompt)
        embeds, mask = cond if prompt else (null, null_mask)
        return Condition(encoder_hidden_states=embeds, encoder_attention_mask=mask)

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        longest = max(c["encoder_attention_mask"].shape[1] for c in conditions)

        def padded(name: str, c: Condition) -> Tensor:
            missing = longest - c[name].shape[1]
            return F.pad(c[name], (0, 0) * (c[name].ndim - 2) + (0, missing))

        names = ("encoder_hidden_states", "encoder_attention_mask")
        return Condition(
            conditions[0]
            | {name: torch.cat([padded(name, c) for c in conditions]) for name in names}
        )

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import Lumina2Transformer2DModel

        model = Lumina2Transformer2DModel(
            sample_size=(8, 4, 8)[variant],
            patch_size=(2, 1, 2)[variant],
            in_channels=(4, 3, 4)[variant],
            hidden_size=(32, 16, 32)[variant],
            num_layers=(3, 2, 4)[variant],
            num_refiner_layers=(1, 2, 0)[variant],
            num_attention_heads=(4, 2, 4)[variant],
            num_kv_heads=(2, 2, 1)[variant],
            multiple_of=8,
            ffn_dim_multiplier=(None, 1.5, 0.5)[variant],
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=24,
        )
        lengths = torch.tensor(((7, 4), (5, 5), (2, 6))[variant])
        mask = (torch.arange(7) < lengths[:, None]).long()
        return alive(model), Condition(
            encoder_hidden_states=torch.randn(2, 7, 24), encoder_attention_mask=mask
        )

    def small_pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

        text_encoder, tokenizer = small_text("gemma2", 24)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
        return Lumina2Pipeline(
            self.small(0)[0], scheduler, small_vae(shift_factor=0.1), text_encoder, tokenizer
        )

    def small_call(self, guided: bool) -> dict[str, Any]:
        # the pipeline divides by 8, whatever the VAE
        return super().small_call(guided) | {"height": 64, "width": 64}


register(Lumina2Family())
