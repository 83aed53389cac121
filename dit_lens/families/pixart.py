"""PixArt-alpha and PixArt-sigma (Chen et al. 2023, arXiv 2310.00426; 2024, arXiv 2403.04692) as
diffusers' `PixArtTransformer2DModel`.

One stream, the image's. Between attention and MLP each block reads the text by a cross-attention
(`cross_attn.`), which has neither norm nor gate: its input is the stream itself. The text is
projected once and no block changes it; its padding is masked by a bias of -10000.

The modulation is adaLN-single: one vector of the time, and in some models of resolution and aspect
ratio, serves the whole model (`hook_cond`, before the first block); to its projection, which all
blocks share, each block adds a table of its own. So the blocks have no `hook_cond`: what is theirs
are the six sums, `adaln.hook_*`. The last layer adds its table to the vector itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ..arguments import shown
from ..errors import InvalidValue
from ..hooks.passes import Pass
from .base import Family
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points, Tap
from .parts.attention import Attend, HeadsOut
from .parts.layers import (
    LastTableForward,
    check_processor,
    gated,
    neurons,
    refuse_chunks,
    refuse_processors,
)
from .parts.sites import (
    COND,
    RESID,
    Sites,
    adaln_sites,
    attention_sites,
    cross_sites,
    mlp_sites,
)
from .registry import register
from .small import alive, small_text, small_vae

PIXELS = 8  # the side of a latent in the image, in which sizes are given


class PixArtBlockForward(BlockForward):
    """One block: attention, cross-attention and MLP added to the stream."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs:
            raise InvalidValue(
                f"cross_attention_kwargs={shown(cross_attention_kwargs)} is not honoured by a "
                "hooked PixArt, whose attention takes no further arguments; pass None."
            )
        block, hook = self.module, self.points
        x = self.enter(hidden_states)

        # the model's one modulation and the block's own table
        sums = (block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            hook[name](m.squeeze(1)).unsqueeze(1)
            for name, m in zip(adaln_sites(), sums, strict=True)
        )

        # attention
        h = hook["ln1.hook_normalized"](block.norm1(x))
        h = hook["attn.hook_in"](h * (1 + scale_attn) + shift_attn)
        out = block.attn1(h, attention_mask=attention_mask)
        x = hook["hook_resid_mid"](hook["hook_attn_out"](gate_attn * out) + x)

        # cross-attention
        h = hook["cross_attn.hook_in"](x)
        out = block.attn2(
            h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x = hook["hook_resid_mid_cross"](hook["hook_cross_attn_out"](out) + x)

        # MLP
        h = hook["ln2.hook_normalized"](block.norm2(x))
        h = hook["mlp.hook_in"](h * (1 + scale_mlp) + shift_mlp)
        out = hook["mlp.hook_out"](block.ff(h))
        return hook["hook_resid_post"](hook["hook_mlp_out"](gate_mlp * out) + x)


class AttentionForward(Forward):
    """Attention of the image with itself (`attn.`), or with the text (`cross_attn.`, where twins
    are never coupled).
    """

    def __init__(
        self, module: Any, points: Points, current_pass: Pass, layer: int | None, prefix: str
    ) -> None:
        super().__init__(module)
        self.qkv = [points[f"{prefix}hook_{name}"] for name in "qkv"]
        self.attend = Attend(points, current_pass, layer, prefix)
        self.heads_out = HeadsOut(points, prefix)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attn, mask = self.module, attention_mask
        check_processor(attn, AttnProcessor2_0)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)
        q, k, v = (
            hook(x.unflatten(-1, (attn.heads, -1))).transpose(1, 2)
            for hook, x in zip(self.qkv, projected, strict=True)
        )
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, read.shape[1], len(read))
            mask = mask.view(len(read), attn.heads, -1, mask.shape[-1])
        return self.heads_out(self.attend(q, k, v, mask).transpose(1, 2), *attn.to_out)


class PixArtFamily(Family):
    """How dit_lens opens a `PixArtTransformer2DModel`."""

    model_class = "PixArtTransformer2DModel"
    differs = (
        "a cross-attention to the text between attention and MLP; one modulation for all "
        "blocks, to which each adds a table"
    )
    written_for = {
        "Attention.forward": "f4dadb54",
        "AttnProcessor2_0.__call__": "dc692b9a",
        "BasicTransformerBlock.forward": "c7e58a0f",
        "GEGLU.forward": "94d28bbf",
        "GELU.forward": "4a4013c4",
    }

    first_sites = {"hook_cond": COND, "hook_embed": RESID}
    known_options = frozenset(
        "num_attention_heads attention_head_dim in_channels out_channels num_layers dropout "
        "norm_num_groups cross_attention_dim attention_bias sample_size patch_size "
        "activation_fn num_embeds_ada_norm upcast_attention norm_elementwise_affine norm_eps "
        "interpolation_scale use_additional_conditions caption_channels".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        return image_config(transformer, size)

    def block_sites(self, block: Any) -> Sites:
        sites = {"hook_resid_pre": RESID} | adaln_sites() | {"ln1.hook_normalized": RESID}
        sites |= attention_sites(rotary=False) | {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        sites |= cross_sites(rotary=False)
        sites |= {"hook_cross_attn_out": RESID, "hook_resid_mid_cross": RESID}
        sites |= {"ln2.hook_normalized": RESID} | mlp_sites(gated=gated(block.ff))
        return sites | {"hook_mlp_out": RESID, "hook_resid_post": RESID}

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            PixArtBlockForward(block, points),
            AttentionForward(block.attn1, points, current_pass, layer, "attn."),
            AttentionForward(block.attn2, points, current_pass, None, "cross_attn."),
            neurons(block.ff.net[0], points),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return [
            LastTableForward(transformer.adaln_single, points, 1),
            Tap(transformer.adaln_single.emb, after=points["hook_cond"]),
            Tap(transformer.norm_out, after=points["ln_final.hook_normalized"]),
            *super().outer_forwards(transformer, points, current_pass),
        ]

    def check_model(self, transformer: Any) -> None:
        refuse_chunks(transformer.transformer_blocks)
        refuse_processors(
            transformer.transformer_blocks, attn1=AttnProcessor2_0, attn2=AttnProcessor2_0
        )
        if any(block.attn2 is None for block in transformer.transformer_blocks):
            raise InvalidValue(
                "The blocks have no cross-attention (cross_attention_dim=None); expected a PixArt "
                "that is given text."
            )
        super().check_model(transformer)

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        inputs = super().inputs(transformer, x, t, condition)
        if transformer.use_additional_conditions and inputs.get("added_cond_kwargs") is None:
            height, width = (PIXELS * side for side in x.shape[-2:])
            sizes = {"resolution": [height, width], "aspect_ratio": [height / width]}
            text = inputs["encoder_hidden_states"]
            inputs["added_cond_kwargs"] = {
                k: text.new_tensor(v).repeat(len(x), 1) for k, v in sizes.items()
            }
        return inputs

    def encode(self, pipe: Any, prompt: str) -> Condition:
        embeds, mask, _, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, clean_caption=True
        )
        return Condition(encoder_hidden_states=embeds, encoder_attention_mask=mask)

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        def joined(values: Sequence[Any]) -> Any:
            # the pipelines' added_cond_kwargs, whose values may be None
            if isinstance(values[0], dict):
                return {name: joined([value[name] for value in values]) for name in values[0]}
            return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]

        return Condition(joined(conditions))

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import PixArtTransformer2DModel

        model = PixArtTransformer2DModel(
            num_attention_heads=(2, 3, 2)[variant],
            attention_head_dim=(12, 8, 12)[variant],
            num_layers=(3, 2, 4)[variant],
            in_channels=4,
            out_channels=(8, 4, 8)[variant],
            sample_size=8,
            cross_attention_dim=24,
            activation_fn=("gelu-approximate", "gelu-approximate", "geglu")[variant],
            use_additional_conditions=bool(variant),
            caption_channels=(32, 32, None)[variant],
        )
        mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
        gen = torch.Generator().manual_seed(variant)
        text = torch.randn(2, 7, (32, 32, 24)[variant], generator=gen)
        return alive(model), Condition(encoder_hidden_states=text, encoder_attention_mask=mask)

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {"use_resolution_binning": False}

    def small_pipeline(self) -> Any:
        from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

        text_encoder, tokenizer = small_text("t5", 32)
        return PixArtAlphaPipeline(
            tokenizer, text_encoder, small_vae(), self.small(0)[0], DPMSolverMultistepScheduler()
        )


register(PixArtFamily())
