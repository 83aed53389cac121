"""PixArt-alpha and PixArt-sigma (Chen et al.

2023, arXiv 2310.00426; 2024, arXiv 2403.04692) as diffusers' `PixArtTransformer2DModel`.

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
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.points import HookPoint
from . import register
from .base import (
    COND,
    RESID,
    SAMPLE,
    Axes,
    Condition,
    Config,
    Family,
    Forward,
    Points,
    Size,
    Tap,
    TransformerForward,
)
from .parts.attention import Attend, HeadsOut
from .parts.layers import LastTable, check_processor, neurons, refuse_chunks, refuse_processors
from .parts.sites import FINAL_SITES, adaln_sites, attention_sites, mlp_sites, out_sites
from .small import alive, small_text, small_vae

TEXT_HEADS, TEXT_SCORES = (
    ("batch", "text_token", "head", "d_head"),
    ("batch", "head", "query", "text_key"),
)
CROSS_SITES: dict[str, Axes] = {
    "cross_attn.hook_in": RESID,
    "cross_attn.hook_q": ("batch", "token", "head", "d_head"),
    "cross_attn.hook_k": TEXT_HEADS,
    "cross_attn.hook_v": TEXT_HEADS,
    "cross_attn.hook_attn_scores": TEXT_SCORES,
    "cross_attn.hook_pattern": TEXT_SCORES,
    **out_sites("cross_attn."),
}
PIXELS = 8  # what the models' autoencoder makes of a latent, by which sizes are told


def block_sites(block: Any) -> dict[str, Axes]:
    """The names of one block."""
    sites: dict[str, Axes] = (
        {"hook_resid_pre": RESID} | adaln_sites() | {"ln1.hook_normalized": RESID}
    )
    sites |= attention_sites(rotary=False) | {"hook_attn_out": RESID, "hook_resid_mid": RESID}
    sites |= CROSS_SITES | {
        "hook_cross_attn_out": RESID,
        "hook_resid_mid_cross": RESID,
        "ln2.hook_normalized": RESID,
    }
    gated = isinstance(block.ff.net[0], (GEGLU, SwiGLU))
    return sites | mlp_sites(gated=gated) | {"hook_mlp_out": RESID, "hook_resid_post": RESID}


class BlockForward(Forward):
    """One block: attention, cross-attention and MLP added to the stream.

    The first one is also given `hook_embed`.
    """

    def __init__(self, module: Any, points: Points, embed: HookPoint | None) -> None:
        super().__init__(module)
        self.points, self.embed = points, embed

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
                f"cross_attention_kwargs={cross_attention_kwargs!r} is not honoured by a hooked "
                "PixArt, whose attention takes no "
                "further arguments; pass None."
            )
        block, hook = self.module, self.points
        x = hook["hook_resid_pre"](
            hidden_states if self.embed is None else self.embed(hidden_states)
        )
        sums = (block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (
            hook[name](m.squeeze(1)).unsqueeze(1)
            for name, m in zip(adaln_sites(), sums, strict=True)
        )
        h = hook["attn.hook_in"](
            hook["ln1.hook_normalized"](block.norm1(x)) * (1 + scale_attn) + shift_attn
        )
        out = block.attn1(h, attention_mask=attention_mask)
        x = hook["hook_resid_mid"](hook["hook_attn_out"](gate_attn * out) + x)
        h = hook["cross_attn.hook_in"](x)
        out = block.attn2(
            h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x = hook["hook_resid_mid_cross"](hook["hook_cross_attn_out"](out) + x)
        h = hook["mlp.hook_in"](
            hook["ln2.hook_normalized"](block.norm2(x)) * (1 + scale_mlp) + shift_mlp
        )
        return hook["hook_resid_post"](
            hook["hook_mlp_out"](gate_mlp * hook["mlp.hook_out"](block.ff(h))) + x
        )


class AttentionForward(Forward):
    """Attention of the image with itself (`attn.`), or with the text (`cross_attn.`, where twins
    are never coupled).
    """

    def __init__(
        self, module: Any, points: Points, instrumentation: Any, layer: int | None, prefix: str
    ) -> None:
        super().__init__(module)
        self.qkv = [points[f"{prefix}hook_{name}"] for name in "qkv"]
        self.attend, self.heads_out = (
            Attend(points, instrumentation, layer, (prefix,)),
            HeadsOut(points, prefix),
        )

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


class ConditioningForward(Forward):
    """adaLN-single: the blocks' common modulation, and the conditioning vector for the last layer."""

    repeats = False

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.last = points["final.hook_shift"], points["final.hook_scale"]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        modulation, vector = self.own(*args, **kwargs)
        return modulation, LastTable.where_heard(vector, self.last)


class PixArtFamily(Family):
    """How dit_lens opens a `PixArtTransformer2DModel`."""

    model_class = "PixArtTransformer2DModel"
    differs = "a cross-attention to the text between attention and MLP; one modulation for all blocks, to which each adds a table"
    written_for = {
        "Attention.forward": "f4dadb54",
        "AttnProcessor2_0.__call__": "dc692b9a",
        "BasicTransformerBlock.forward": "c7e58a0f",
        "GEGLU.forward": "94d28bbf",
        "GELU.forward": "4a4013c4",
    }

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c = transformer.config
        height, width = size or (c.sample_size, c.sample_size)
        d_model = c.num_attention_heads * c.attention_head_dim
        return Config(
            n_layers=c.num_layers,
            d_model=d_model,
            n_heads=c.num_attention_heads,
            d_head=c.attention_head_dim,
            d_mlp=4 * d_model,
            patch_size=c.patch_size,
            in_channels=c.in_channels,
            out_channels=transformer.out_channels,
            latent_shape=(c.in_channels, height, width),
            grid=(height // c.patch_size, width // c.patch_size),
        )

    def sites(self, transformer: Any) -> dict[str, Axes]:
        sites: dict[str, Axes] = {"hook_cond": COND, "hook_embed": RESID}
        for i, block in enumerate(transformer.transformer_blocks):
            sites |= {f"blocks.{i}.{site}": axes for site, axes in block_sites(block).items()}
        return sites | FINAL_SITES | {"hook_sample": SAMPLE}

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

    def forwards(self, transformer: Any, points: Points, instrumentation: Any) -> Sequence[Forward]:
        forwards: list[Forward] = [TransformerForward(transformer, points, instrumentation)]
        forwards += [
            ConditioningForward(transformer.adaln_single, points),
            Tap(transformer.adaln_single.emb, after=points["hook_cond"]),
        ]
        for i, block in enumerate(transformer.transformer_blocks):
            mine = {site: points[f"blocks.{i}.{site}"] for site in block_sites(block)}
            forwards += [
                BlockForward(block, mine, None if i else points["hook_embed"]),
                AttentionForward(block.attn1, mine, instrumentation, i, "attn."),
                AttentionForward(block.attn2, mine, instrumentation, None, "cross_attn."),
                neurons(block.ff.net[0], mine),
            ]
        return [
            *forwards,
            Tap(transformer.norm_out, after=points["ln_final.hook_normalized"]),
            Tap(transformer.proj_out, points["final.hook_in"], points["final.hook_out"]),
        ]

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
