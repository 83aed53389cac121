"""Stable Diffusion 3 and 3.5 (Esser et al.

2024, arXiv 2403.03206) as diffusers' `SD3Transformer2DModel`.

Image and text are two streams with weights of their own that attend together: queries, keys and
values of the image come first in the joint sequence, the text's after them. The text's hook points
have the prefix `text.`. In the last block the text only serves as keys and values, and its stream
ends. In 3.5 medium the first blocks have a second attention, of the image on itself (`attn2`),
between the joint one and the MLP, and queries and keys are normalised before they meet
(`hook_rot_q`, `hook_rot_k`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from ..hooks.points import HookPoint
from . import register
from .base import (
    COND,
    RESID,
    SAMPLE,
    TEXT,
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
from .parts.layers import (
    AdaNormForward,
    FinalNormForward,
    check_processor,
    neurons,
    refuse_chunks,
    refuse_processors,
)
from .parts.sites import (
    FINAL_SITES,
    adaln_sites,
    attention_sites,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
)
from .small import alive, small_text, small_vae


def block_sites(block: Any) -> dict[str, Axes]:
    """The names of one block: the text's end early in the last one, and some have a second
    attention.
    """
    rotary, ends, dual = (
        block.attn.norm_q is not None,
        block.context_pre_only,
        block.use_dual_attention,
    )
    sites: dict[str, Axes] = {
        "hook_resid_pre": RESID,
        "text.hook_resid_pre": TEXT,
        "hook_cond": COND,
    }
    sites |= adaln_sites() | {"ln1.hook_normalized": RESID, "attn.hook_in": RESID}
    sites |= adaln_sites(branches=("attn2",)) | {"attn2.hook_in": RESID} if dual else {}
    sites |= adaln_sites("text.", ("shift", "scale"), ("attn",)) if ends else adaln_sites("text.")
    sites |= {"text.ln1.hook_normalized": TEXT, "text.attn.hook_in": TEXT}
    sites |= qkv_sites(rotary=rotary) | qkv_sites("text.attn.", TEXT, rotary)
    sites |= scores_sites("attn.") if ends else scores_sites("attn.", "text.attn.")
    sites |= (
        out_sites()
        | ({} if ends else out_sites("text.attn.", TEXT))
        | {"hook_attn_out": RESID, "hook_resid_mid": RESID}
    )
    if dual:
        sites |= attention_sites("attn2.", rotary=rotary) | {
            "hook_attn2_out": RESID,
            "hook_resid_mid_attn2": RESID,
        }
    sites |= (
        {"ln2.hook_normalized": RESID}
        | mlp_sites()
        | {"hook_mlp_out": RESID, "hook_resid_post": RESID}
    )
    if not ends:
        sites |= {
            "text.hook_attn_out": TEXT,
            "text.hook_resid_mid": TEXT,
            "text.ln2.hook_normalized": TEXT,
        }
        sites |= mlp_sites("text.mlp.", TEXT) | {
            "text.hook_mlp_out": TEXT,
            "text.hook_resid_post": TEXT,
        }
    return sites


class BlockForward(Forward):
    """One block: the joint attention, perhaps a second one of the image alone, and an MLP for each
    stream.
    """

    def __init__(
        self, module: Any, points: Points, embeds: tuple[HookPoint, HookPoint] | None
    ) -> None:
        super().__init__(module)
        self.points, self.embeds = points, embeds

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        block, hook, further = self.module, self.points, joint_attention_kwargs or {}
        x, text = hidden_states, encoder_hidden_states
        if self.embeds is not None:
            x, text = self.embeds[0](x), self.embeds[1](text)
        x, text, temb = (
            hook["hook_resid_pre"](x),
            hook["text.hook_resid_pre"](text),
            hook["hook_cond"](temb),
        )
        h, gate_attn, shift_mlp, scale_mlp, gate_mlp, *second = block.norm1(x, emb=temb)
        if block.context_pre_only:
            text_h = block.norm1_context(text, temb)
        else:
            text_h, text_gate_attn, text_shift_mlp, text_scale_mlp, text_gate_mlp = (
                block.norm1_context(text, emb=temb)
            )
        out, text_out = block.attn(hidden_states=h, encoder_hidden_states=text_h, **further)
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](gate_attn.unsqueeze(1) * out))
        if second:
            out = block.attn2(hidden_states=second[0], **further)
            x = hook["hook_resid_mid_attn2"](
                x + hook["hook_attn2_out"](second[1].unsqueeze(1) * out)
            )
        h = (
            hook["ln2.hook_normalized"](block.norm2(x)) * (1 + scale_mlp[:, None])
            + shift_mlp[:, None]
        )
        out = hook["mlp.hook_out"](block.ff(hook["mlp.hook_in"](h)))
        x = hook["hook_resid_post"](x + hook["hook_mlp_out"](gate_mlp.unsqueeze(1) * out))
        if block.context_pre_only:
            return None, x
        text = hook["text.hook_resid_mid"](
            text + hook["text.hook_attn_out"](text_gate_attn.unsqueeze(1) * text_out)
        )
        h = (
            hook["text.ln2.hook_normalized"](block.norm2_context(text))
            * (1 + text_scale_mlp[:, None])
            + text_shift_mlp[:, None]
        )
        out = hook["text.mlp.hook_out"](block.ff_context(hook["text.mlp.hook_in"](h)))
        return hook["text.hook_resid_post"](
            text + hook["text.hook_mlp_out"](text_gate_mlp.unsqueeze(1) * out)
        ), x


class DualNormForward(Forward):
    """SD 3.5's first normalisation of the image stream, modulated once for each of its two
    attentions.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.modulations = [points[name] for name in adaln_sites(branches=("attn", "mlp", "attn2"))]
        self.normalized, self.attn_in = points["ln1.hook_normalized"], points["attn.hook_in"]
        self.attn2_in = points["attn2.hook_in"]

    def __call__(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        norm = self.module
        chunks = norm.linear(norm.silu(emb)).chunk(9, dim=1)
        first = [hook(m) for hook, m in zip(self.modulations[:6], chunks[:6], strict=True)]
        shift, scale, gate, *mlp = first
        h = self.normalized(norm.norm(hidden_states))
        attn_in = self.attn_in(h * (1 + scale[:, None]) + shift[:, None])
        shift2, scale2, gate2 = [
            hook(m) for hook, m in zip(self.modulations[6:], chunks[6:], strict=True)
        ]
        return (
            attn_in,
            gate,
            *mlp,
            self.attn2_in(h * (1 + scale2[:, None]) + shift2[:, None]),
            gate2,
        )


class LastTextNormForward(Forward):
    """The last block's normalisation of the text, which is only shifted and scaled."""

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.shift, self.scale = (
            points["text.adaln.hook_shift_attn"],
            points["text.adaln.hook_scale_attn"],
        )
        self.normalized, self.attn_in = (
            points["text.ln1.hook_normalized"],
            points["text.attn.hook_in"],
        )

    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        norm = self.module
        scale, shift = norm.linear(norm.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        shift, scale = self.shift(shift), self.scale(scale)
        return self.attn_in(
            self.normalized(norm.norm(x)) * (1 + scale)[:, None, :] + shift[:, None, :]
        )


class AttentionForward(Forward):
    """Attention of the image with the text, or (`attn2`) of the image alone."""

    def __init__(
        self, module: Any, points: Points, instrumentation: Any, layer: int, prefix: str = "attn."
    ) -> None:
        super().__init__(module)
        self.points, self.prefix = points, prefix
        self.text_goes_on = prefix == "attn." and "text.attn.hook_z" in points
        prefixes = (prefix, f"text.{prefix}") if self.text_goes_on else (prefix,)
        self.attend = Attend(points, instrumentation, layer, prefixes)
        self.heads_out = HeadsOut(points, prefix)
        self.text_out = HeadsOut(points, f"text.{prefix}") if self.text_goes_on else None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        attn, lengths = self.module, None
        check_processor(attn, JointAttnProcessor2_0)
        q, k, v = self.qkv(
            self.prefix,
            hidden_states,
            (attn.to_q, attn.to_k, attn.to_v),
            (attn.norm_q, attn.norm_k),
        )
        if encoder_hidden_states is not None:
            projections, norms = (
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                (attn.norm_added_q, attn.norm_added_k),
            )
            text = self.qkv(f"text.{self.prefix}", encoder_hidden_states, projections, norms)
            lengths = (q.shape[2], text[0].shape[2])
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), text, strict=True))
        z = self.attend(q, k, v, lengths=lengths).transpose(1, 2)
        if lengths is None:
            return self.heads_out(z, *attn.to_out)
        z, text_z = (
            z.flatten(2).unflatten(2, z.shape[2:]).split(lengths, dim=1)
        )  # in diffusers' layout: half precision tells
        out = self.heads_out(z, *attn.to_out)
        return out, text_z if self.text_out is None else self.text_out(text_z, attn.to_add_out)

    def qkv(
        self, prefix: str, h: Tensor, projections: Sequence[Any], norms: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values [batch, head, token, d_head] of one stream, as they enter the
        scores.
        """
        shape = (*h.shape[:2], self.module.heads, -1)
        q, k, v = (
            self.points[f"{prefix}hook_{n}"](p(h).view(shape))
            for n, p in zip("qkv", projections, strict=True)
        )
        if norms[0] is not None:
            q, k = (
                self.points[f"{prefix}hook_rot_{n}"](norm(x))
                for n, norm, x in zip("qk", norms, (q, k), strict=True)
            )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class SD3Family(Family):
    """How dit_lens opens an `SD3Transformer2DModel`."""

    model_class = "SD3Transformer2DModel"
    differs = "two streams, image and text, with weights of their own, that attend jointly; in 3.5 a second attention in some blocks"
    written_for = {
        "AdaLayerNormContinuous.forward": "cbc6feb8",
        "AdaLayerNormZero.forward": "0451374e",
        "Attention.forward": "f4dadb54",
        "GELU.forward": "4a4013c4",
        "JointAttnProcessor2_0.__call__": "b51b1636",
        "JointTransformerBlock.forward": "172189ca",
        "SD35AdaLayerNormZeroX.forward": "cbb7f0eb",
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
            restartable=False,
        )

    def sites(self, transformer: Any) -> dict[str, Axes]:
        sites: dict[str, Axes] = {"hook_embed": RESID, "text.hook_embed": TEXT}
        for i, block in enumerate(transformer.transformer_blocks):
            sites |= {f"blocks.{i}.{site}": axes for site, axes in block_sites(block).items()}
        return sites | FINAL_SITES | {"hook_sample": SAMPLE}

    def check_model(self, transformer: Any) -> None:
        refuse_chunks(transformer.transformer_blocks)
        refuse_processors(
            transformer.transformer_blocks, attn=JointAttnProcessor2_0, attn2=JointAttnProcessor2_0
        )

    def forwards(self, transformer: Any, points: Points, instrumentation: Any) -> Sequence[Forward]:
        forwards: list[Forward] = [TransformerForward(transformer, points, instrumentation)]
        for i, block in enumerate(transformer.transformer_blocks):
            mine = {site: points[f"blocks.{i}.{site}"] for site in block_sites(block)}
            forwards.append(
                BlockForward(
                    block, mine, None if i else (points["hook_embed"], points["text.hook_embed"])
                )
            )
            forwards.append(
                (DualNormForward if block.use_dual_attention else AdaNormForward)(block.norm1, mine)
            )
            forwards.append(AttentionForward(block.attn, mine, instrumentation, i))
            forwards.append(neurons(block.ff.net[0], mine))
            if block.use_dual_attention:
                forwards.append(AttentionForward(block.attn2, mine, instrumentation, i, "attn2."))
            if block.context_pre_only:
                forwards.append(LastTextNormForward(block.norm1_context, mine))
            else:
                forwards.append(AdaNormForward(block.norm1_context, mine, "text."))
                forwards.append(neurons(block.ff_context.net[0], mine, "text.mlp."))
        return [
            *forwards,
            FinalNormForward(transformer.norm_out, points),
            Tap(transformer.proj_out, points["final.hook_in"], points["final.hook_out"]),
        ]

    def passed(
        self, inputs: dict[str, Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        text = kwargs["encoder_hidden_states"]
        return kwargs["hidden_states"], lambda stream: (text, stream)

    def leaving(self, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream: Tensor = returned[1]
        return stream

    def encode(self, pipe: Any, prompt: str) -> Condition:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False
        )
        return Condition(encoder_hidden_states=embeds, pooled_projections=pooled)

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=(3, 2, 4)[variant],
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=((), (), (0, 1))[variant],
            qk_norm=(None, "rms_norm", "rms_norm")[variant],
        )
        return alive(model), Condition(
            encoder_hidden_states=torch.randn(2, 7, 32), pooled_projections=torch.randn(2, 24)
        )

    def small_pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        first, second, third = small_text("clip", 8), small_text("clip", 16), small_text("t5", 32)
        return StableDiffusion3Pipeline(
            self.small(0)[0],
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            small_vae(shift_factor=0.1),
            *first,
            *second,
            *third,
        )


register(SD3Family())
