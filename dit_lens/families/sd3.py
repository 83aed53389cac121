"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206) as diffusers'
`SD3Transformer2DModel`.

Image and text are two streams with weights of their own that attend together: queries, keys and
values of the image come first in the joint sequence, the text's after them. The text's hook points
have the prefix `text.`. In the last block the text only serves as keys and values, and its stream
ends. In 3.5 medium the first blocks have a second attention, of the image on itself (`attn2`),
between the joint one and the MLP, and queries and keys are normalised before they meet
(`hook_rot_q`, `hook_rot_k`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from ..hooks.passes import Pass
from .base import Family, Skipped
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points
from .parts.attention import Attend, HeadsOut
from .parts.joint import image_first, joint_points
from .parts.layers import (
    AdaNormForward,
    ContinuousNormForward,
    check_processor,
    final_norm,
    neurons,
    refuse_chunks,
    refuse_processors,
)
from .parts.sites import (
    COND,
    RESID,
    TEXT,
    Sites,
    adaln_sites,
    attention_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
    texts,
)
from .parts.words import Text
from .registry import register
from .small import alive, small_text, small_vae


class SD3BlockForward(BlockForward):
    """One block: the joint attention, perhaps a second one of the image alone, and an MLP for each
    stream.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        block, hook, further = self.module, self.points, joint_attention_kwargs or {}
        x, text = self.enter_both(hidden_states, encoder_hidden_states)
        temb = hook["hook_cond"](temb)

        # the joint attention, whose norms make all modulations
        h, gate, shift_mlp, scale_mlp, gate_mlp, *second = block.norm1(x, emb=temb)
        if block.context_pre_only:
            text_h, text_modulation = block.norm1_context(text, temb), []
        else:
            text_h, *text_modulation = block.norm1_context(text, emb=temb)
        out, text_out = block.attn(hidden_states=h, encoder_hidden_states=text_h, **further)
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](gate.unsqueeze(1) * out))

        # the second attention, of the image alone
        if second:
            h, gate = second
            out = block.attn2(hidden_states=h, **further)
            added = hook["hook_attn2_out"](gate.unsqueeze(1) * out)
            x = hook["hook_resid_mid_attn2"](x + added)

        # the image's MLP
        h = hook["ln2.hook_normalized"](block.norm2(x))
        h = hook["mlp.hook_in"](h * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        out = hook["mlp.hook_out"](block.ff(h))
        x = hook["hook_resid_post"](x + hook["hook_mlp_out"](gate_mlp.unsqueeze(1) * out))
        if block.context_pre_only:
            return None, x

        # the text's attention output and MLP
        gate, shift_mlp, scale_mlp, gate_mlp = text_modulation
        added = hook["text.hook_attn_out"](gate.unsqueeze(1) * text_out)
        text = hook["text.hook_resid_mid"](text + added)
        h = hook["text.ln2.hook_normalized"](block.norm2_context(text))
        h = hook["text.mlp.hook_in"](h * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        out = hook["text.mlp.hook_out"](block.ff_context(h))
        added = hook["text.hook_mlp_out"](gate_mlp.unsqueeze(1) * out)
        return hook["text.hook_resid_post"](text + added), x


class DualNormForward(Forward):
    """SD 3.5's first normalisation of the image stream, modulated once for each of its two
    attentions.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.modulations = [
            points[name] for name in adaln_sites(sublayers=("attn", "mlp", "attn2"))
        ]
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


class LastTextNormForward(ContinuousNormForward):
    """The last block's normalisation of the text, which is only shifted and scaled.

    Args:
        module: the norm.
        points: the block's hook points.
    """

    def __init__(self, module: Any, points: Points) -> None:
        names = ("adaln.hook_shift_attn", "adaln.hook_scale_attn", "ln1.hook_normalized")
        super().__init__(module, *(points[f"text.{name}"] for name in names))
        self.attn_in = points["text.attn.hook_in"]

    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        return self.attn_in(super().__call__(x, conditioning_embedding))


class AttentionForward(Forward):
    """Attention of the image with the text, or (`attn2`) of the image alone.

    Args:
        module: the attention.
        points: the block's hook points.
        current_pass: the pass that it will run in.
        layer: the block's number.
        prefix: the attention's prefix.
    """

    def __init__(
        self, module: Any, points: Points, current_pass: Pass, layer: int, prefix: str = "attn."
    ) -> None:
        super().__init__(module)
        self.points, self.prefix = points, prefix
        joint = prefix == "attn."
        # in the last block the text has queries, but no names for what becomes of them
        scores = list(scores_sites(prefix)) if joint else []
        joined = joint_points(points, current_pass, image_first, scores)
        self.attend = Attend(joined, current_pass, layer, prefix)
        self.heads_out = HeadsOut(points, prefix)
        text_goes_on = joint and "text.attn.hook_z" in points
        self.text_out = HeadsOut(points, "text.attn.") if text_goes_on else None

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        attn = self.module
        check_processor(attn, JointAttnProcessor2_0)
        projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        image = self.qkv(self.prefix, hidden_states, projections, norms)
        if encoder_hidden_states is None:
            q, k, v = image
            return self.heads_out(self.attend(q, k, v).transpose(1, 2), *attn.to_out)

        # the image's tokens first, then the text's
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k)
        text = self.qkv(f"text.{self.prefix}", encoder_hidden_states, projections, norms)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        z = self.attend(q, k, v).transpose(1, 2)

        # apart again, in diffusers' memory layout: in half precision another one gives other bits
        lengths = (hidden_states.shape[1], encoder_hidden_states.shape[1])
        z, text_z = z.flatten(2).unflatten(2, z.shape[2:]).split(lengths, dim=1)
        out = self.heads_out(z, *attn.to_out)
        return out, text_z if self.text_out is None else self.text_out(text_z, attn.to_add_out)

    def qkv(
        self, prefix: str, h: Tensor, projections: Sequence[Any], norms: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values [batch, head, token, d_head] of one stream, as they enter the
        scores.

        Args:
            prefix: the attention's prefix.
            h: what it is given of the stream [batch, token, d_model].
            projections: of queries, keys and values.
            norms: of queries and keys, or None.
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
    prompt_names = ("prompt", "prompt_2", "prompt_3")
    differs = (
        "two streams, image and text, with weights of their own, that attend jointly; in 3.5 a "
        "second attention in some blocks"
    )
    written_for = {
        "AdaLayerNormContinuous.forward": "cbc6feb8",
        "AdaLayerNormZero.forward": "0451374e",
        "Attention.forward": "f4dadb54",
        "GELU.forward": "4a4013c4",
        "JointAttnProcessor2_0.__call__": "b51b1636",
        "JointTransformerBlock.forward": "172189ca",
        "SD35AdaLayerNormZeroX.forward": "cbb7f0eb",
    }

    computes = {"attn": ("attn",), "attn2": ("attn2",), "mlp": ("ff", "ff_context")}
    first_sites = both({"hook_embed": RESID})
    known_options = frozenset(
        "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads "
        "joint_attention_dim caption_projection_dim pooled_projection_dim out_channels "
        "pos_embed_max_size dual_attention_layers qk_norm".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        return image_config(transformer, size, restartable=False, joint=True)

    def block_sites(self, block: Any) -> Sites:
        """The names of one block: the text's end early in the last one, and some have a second
        attention.

        Args:
            block: the block.
        """
        rotary, ends = block.attn.norm_q is not None, block.context_pre_only

        # what enters the attentions
        sites = both({"hook_resid_pre": RESID}) | {"hook_cond": COND} | adaln_sites()
        sites |= {"ln1.hook_normalized": RESID, "attn.hook_in": RESID}
        if block.use_dual_attention:
            sites |= adaln_sites(sublayers=("attn2",)) | {"attn2.hook_in": RESID}
        if ends:
            sites |= adaln_sites("text.", ("shift", "scale"), ("attn",))
        else:
            sites |= adaln_sites("text.")
        sites |= {"text.ln1.hook_normalized": TEXT, "text.attn.hook_in": TEXT}

        # the attentions
        sites |= qkv_sites(rotary=rotary) | qkv_sites("text.attn.", TEXT, rotary)
        sites |= scores_sites("attn.") if ends else scores_sites("attn.", "text.attn.")
        sites |= out_sites() | ({} if ends else out_sites("text.attn.", TEXT))
        sites |= {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        if block.use_dual_attention:
            own = attention_sites("attn2.", rotary=rotary)
            keys = {"key": "image_key"}  # the text is not among them
            sites |= {name: tuple(keys.get(a, a) for a in axes) for name, axes in own.items()}
            sites |= {"hook_attn2_out": RESID, "hook_resid_mid_attn2": RESID}

        # the MLPs
        later = {"ln2.hook_normalized": RESID} | mlp_sites()
        later |= {"hook_mlp_out": RESID, "hook_resid_post": RESID}
        own_text = texts({"hook_attn_out": RESID, "hook_resid_mid": RESID} | later)
        return sites | later | ({} if ends else own_text)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        norm = DualNormForward if block.use_dual_attention else AdaNormForward
        forwards: list[Forward] = [
            SD3BlockForward(block, points),
            norm(block.norm1, points),
            AttentionForward(block.attn, points, current_pass, layer),
            neurons(block.ff.net[0], points),
        ]
        if block.use_dual_attention:
            forwards.append(AttentionForward(block.attn2, points, current_pass, layer, "attn2."))
        if block.context_pre_only:
            return [*forwards, LastTextNormForward(block.norm1_context, points)]
        return [
            *forwards,
            AdaNormForward(block.norm1_context, points, "text."),
            neurons(block.ff_context.net[0], points, "text.mlp."),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        norm = final_norm(transformer.norm_out, points)
        return [norm, *super().outer_forwards(transformer, points, current_pass)]

    def check_model(self, transformer: Any) -> None:
        refuse_chunks(transformer.transformer_blocks)
        refuse_processors(
            transformer.transformer_blocks, attn=JointAttnProcessor2_0, attn2=JointAttnProcessor2_0
        )
        super().check_model(transformer)

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        streams = {"": kwargs["hidden_states"], "text.": kwargs["encoder_hidden_states"]}
        return streams, lambda found: (found["text."], found[""])

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        stream: Tensor = returned[1]
        return stream

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return image_first(inputs, keys, transformer).text

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        clip = Text(pipe.tokenizer, prompt, pipe.tokenizer_max_length)
        return [clip] if pipe.tokenizer_3 is None else [clip, Text(pipe.tokenizer_3, prompt)]

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
