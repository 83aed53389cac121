"""FLUX.1 (Black Forest Labs 2024; no paper) as diffusers' `FluxTransformer2DModel`.

Two kinds of blocks follow one another and are counted as one row, `blocks.{i}`. In the double
blocks image and text are two streams with weights of their own that attend together. In the single
blocks the same weights act on both, and attention and MLP work side by side on one normalised input
and share one output projection, so that what they add comes in one piece, `hook_attn_mlp_out`, with
one shift, scale and gate (`adaln.hook_gate_attn_mlp`). Everywhere the text's tokens come first in
the joint sequence, then the image's; the text's hook points have the prefix `text.`. Queries and
keys are normalised and rotated before they meet (`hook_rot_q`, `hook_rot_k`). Latents enter as
packed 2x2 patches. What FLUX.1 shares with Qwen-Image is in `dit_lens.families.parts.two_streams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
)
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .config import Condition, Size
from .forwards import Forward, Points
from .parts.joint import AnyPoints, joint_points, text_first
from .parts.layers import AdaNormForward, final_norm, neurons, refuse_processors
from .parts.sites import (
    COND,
    RESID,
    Sites,
    adaln_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
)
from .parts.two_streams import (
    Angles,
    AttentionForward,
    DoubleAttentionForward,
    PackedFamily,
    TwoStreamsForward,
    clipped,
    double_sites,
    refuse_fused,
)
from .parts.words import Text
from .registry import register
from .small import alive, small_text, small_vae


def single_sites() -> Sites:
    """The names of a block in which attention and MLP work side by side on the joint sequence."""
    mlp = {s: axes for s, axes in mlp_sites().items() if s != "mlp.hook_out"}
    attend = qkv_sites() | scores_sites("attn.") | {"attn.hook_z": out_sites()["attn.hook_z"]}
    sites = both({"hook_resid_pre": RESID}) | {"hook_cond": COND}
    sites |= adaln_sites(sublayers=("attn_mlp",))
    added = {"hook_attn_mlp_out": RESID, "hook_resid_post": RESID}
    return sites | both({"ln1.hook_normalized": RESID} | mlp | attend | added)


class DoubleForward(TwoStreamsForward):
    """A double block: attention of both streams, then an MLP for each."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block = self.module
        x, text, temb = self.entered(hidden_states, encoder_hidden_states, temb)
        h, *modulation = block.norm1(x, emb=temb)
        text_h, *text_modulation = block.norm1_context(text, emb=temb)
        further = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        out, text_out = block.attn(hidden_states=h, encoder_hidden_states=text_h, **further)
        x = self.points["hook_resid_post"](
            self.second_half("", x, out, modulation, block.norm2, block.ff)
        )
        text = self.second_half(
            "text.", text, text_out, text_modulation, block.norm2_context, block.ff_context
        )
        return self.points["text.hook_resid_post"](clipped(text)), x


class SingleForward(TwoStreamsForward):
    """A single block: attention and MLP side by side, on the text's tokens and the image's after
    them.

    Args:
        module: the block.
        points: its hook points.
        joint: the same, on the joint sequence.
    """

    def __init__(self, module: Any, points: Points, joint: AnyPoints) -> None:
        super().__init__(module, points)
        self.joint = joint

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, hook, further = self.module, self.points, joint_attention_kwargs or {}
        x, text, temb = self.entered(hidden_states, encoder_hidden_states, temb)
        n, stream, joint = text.shape[1], torch.cat([text, x], dim=1), self.joint
        h, gate = block.norm(stream, emb=temb)

        # the MLP's neurons and what the heads read, side by side
        pre = joint["mlp.hook_pre"](block.proj_mlp(joint["mlp.hook_in"](h)))
        post = joint["mlp.hook_post"](block.act_mlp(pre))
        z = block.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **further)

        # one output projection for both
        out = gate.unsqueeze(1) * block.proj_out(torch.cat([z, post], dim=2))
        stream = clipped(stream + joint["hook_attn_mlp_out"](out))
        x = hook["hook_resid_post"](stream[:, n:])
        return hook["text.hook_resid_post"](stream[:, :n]), x


class SingleNormForward(Forward):
    """A single block's normalisation, with the three modulations that attention and MLP share.

    Args:
        module: the norm.
        points: the block's hook points, on the joint sequence.
    """

    def __init__(self, module: Any, points: AnyPoints) -> None:
        super().__init__(module)
        self.modulations = [points[name] for name in adaln_sites(sublayers=("attn_mlp",))]
        self.normalized = points["ln1.hook_normalized"]

    def __call__(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.module
        chunks = norm.linear(norm.silu(emb)).chunk(3, dim=1)
        shift, scale, gate = [hook(m) for hook, m in zip(self.modulations, chunks, strict=True)]
        h = self.normalized(norm.norm(x))
        return h * (1 + scale[:, None]) + shift[:, None], gate


def rotated(x: Tensor, angles: Angles | None) -> Tensor:
    """Queries or keys of the joint sequence, each turned by its place.

    Args:
        x: [batch, token, head, d_head].
        angles: cosines and sines of the places.
    """
    return x if angles is None else apply_rotary_emb(x, angles, sequence_dim=1)


class FluxAttentionForward(DoubleAttentionForward):
    """The attention of a double block, where each stream has projections of its own."""

    processor = FluxAttnProcessor

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.check()
        image, text = self.streams(hidden_states, encoder_hidden_states)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        q, k = rotated(q, image_rotary_emb), rotated(k, image_rotary_emb)
        return self.answers(q, k, v, attention_mask, encoder_hidden_states.shape[1])


class SingleAttentionForward(AttentionForward):
    """The attention of a single block, up to what the heads read: the output projection is shared
    with the MLP.
    """

    processor = FluxAttnProcessor

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> Tensor:
        attn, hook, heads = self.module, self.joint, (self.module.heads, -1)
        self.check()
        h = hook["attn.hook_in"](hidden_states)
        q = hook["attn.hook_q"](attn.to_q(h).unflatten(-1, heads))
        k = hook["attn.hook_k"](attn.to_k(h).unflatten(-1, heads))
        v = hook["attn.hook_v"](attn.to_v(h).unflatten(-1, heads))
        q, k = rotated(attn.norm_q(q), image_rotary_emb), rotated(attn.norm_k(k), image_rotary_emb)
        return hook["attn.hook_z"](self.read(q, k, v, attention_mask)).flatten(2)


class FluxFamily(PackedFamily):
    """How dit_lens opens a `FluxTransformer2DModel`."""

    model_class = "FluxTransformer2DModel"
    prompt_names = ("prompt_2",)  # CLIP, which reads `prompt`, gives no keys
    differs = (
        "two streams that attend jointly, then one joint sequence with attention and MLP side by "
        "side"
    )
    computes = {"attn": ("attn",), "mlp": ("ff", "ff_context")}
    written_for = {
        "AdaLayerNormContinuous.forward": "cbc6feb8",
        "AdaLayerNormZero.forward": "0451374e",
        "AdaLayerNormZeroSingle.forward": "0c25c24b",
        "FluxAttention.forward": "e39d5275",
        "FluxAttnProcessor.__call__": "2bbd9e82",
        "FluxSingleTransformerBlock.forward": "ed016cd9",
        "FluxTransformerBlock.forward": "da25cec9",
        "GELU.forward": "4a4013c4",
    }

    known_options = frozenset(
        "patch_size in_channels out_channels num_layers num_single_layers attention_head_dim "
        "num_attention_heads joint_attention_dim pooled_projection_dim guidance_embeds "
        "axes_dims_rope".split()
    )

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def block_sites(self, block: Any) -> Sites:
        return single_sites() if isinstance(block, FluxSingleTransformerBlock) else double_sites()

    def check_model(self, transformer: Any) -> None:
        if getattr(transformer, "encoder_hid_proj", None) is not None:
            raise InvalidValue(
                "An IP-Adapter is loaded, whose attention dit_lens does not repeat; call "
                "pipe.unload_ip_adapter() first."
            )
        blocks = self.blocks(transformer)
        refuse_processors(blocks, attn=FluxAttnProcessor)
        refuse_fused([block.attn for block in blocks])
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        wanted, given = transformer.config.guidance_embeds, inputs.get("guidance") is not None
        if wanted != given:
            raise InvalidValue(
                f"The model takes {'the' if wanted else 'no'} strength of guidance as an input, "
                "and "
                f"guidance is {'given' if given else 'missing'}; expected "
                f"guidance={'a tensor [batch], 3.5 say' if wanted else None}."
            )

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        if isinstance(block, FluxSingleTransformerBlock):
            joint = joint_points(points, current_pass, text_first)
            return [
                SingleForward(block, points, joint),
                SingleNormForward(block.norm, joint),
                SingleAttentionForward(block.attn, points, current_pass, layer),
            ]
        return [
            DoubleForward(block, points),
            AdaNormForward(block.norm1, points),
            AdaNormForward(block.norm1_context, points, "text."),
            FluxAttentionForward(block.attn, points, current_pass, layer),
            neurons(block.ff.net[0], points),
            neurons(block.ff_context.net[0], points, "text.mlp."),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        norm = final_norm(transformer.norm_out, points)
        return [norm, *super().outer_forwards(transformer, points, current_pass)]

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        given, text = (
            super().inputs(transformer, x, t, condition),
            condition["encoder_hidden_states"],
        )
        places = torch.cartesian_prod(
            *(torch.arange(n // 2, device=text.device) for n in x.shape[-2:])
        )
        own = {
            "img_ids": F.pad(places, (1, 0)).to(text),
            "txt_ids": text.new_zeros(text.shape[1], 3),
        }
        if transformer.config.guidance_embeds:
            own["guidance"] = torch.full((len(x),), 3.5, device=x.device)
        return own | given

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        ids = inputs["img_ids"].cpu().long()  # one wait for the GPU, not several
        ids = ids[0] if ids.ndim == 3 else ids
        # further images, as in Kontext, have another first coordinate
        last = ids[ids[:, 0] == ids[0, 0]][-1]
        return int(last[1]) + 1, int(last[2]) + 1

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return text_first(inputs, keys, transformer).text

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        return [Text(pipe.tokenizer_2, prompt)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        embeds, pooled, ids = pipe.encode_prompt(prompt, prompt)
        return Condition(encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=ids)

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        """Positions have no batch axis and are the same for all items."""
        places = {name: value for name, value in conditions[0].items() if name.endswith("_ids")}
        rest = [Condition({k: v for k, v in c.items() if k not in places}) for c in conditions]
        return Condition(super().stack(rest) | places)

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=(2, 1, 3)[variant],
            num_single_layers=(2, 3, 1)[variant],
            attention_head_dim=8,
            num_attention_heads=(2, 3, 2)[variant],
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=variant == 1,
            axes_dims_rope=(2, 4, 2) if variant == 2 else (2, 2, 4),
        )
        model.register_to_config(sample_size=((8, 8), (8, 8), (6, 10))[variant])
        text = torch.randn(2, (5, 7, 6)[variant], 32)
        return alive(model), Condition(
            encoder_hidden_states=text, pooled_projections=torch.randn(2, 24)
        )

    def small_pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        (first, tokens), (second, second_tokens) = (
            small_text("clip_plain", 24),
            small_text("t5", 32),
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        vae, transformer = small_vae(shift_factor=0.1), self.small(0)[0]
        return FluxPipeline(scheduler, vae, first, tokens, second, second_tokens, transformer)


register(FluxFamily())
