"""Wan 2.1 and 2.2 text-to-video (Wan team 2025, arXiv 2503.20314) as diffusers'
`WanTransformer3DModel`.

Video: latents are [batch, channel, frame, height, width], the tokens' grid (frame, height, width).
A block attends to itself (rotary positions; queries and keys normalised across all heads at once),
then to the text, which the blocks leave as it is, then comes the MLP. One vector of the time serves
the whole model (`hook_cond`, before the first block): its six projections and a table of each
block's own add up to the modulations `adaln.hook_*`; the cross-attention has none. With a timestep
for each token (`expand_timesteps` of Wan 2.2 TI2V) the vector and the modulations are [batch,
token, d_model].

Sums of the stream are taken in float32: `hook_attn_out` and `hook_mlp_out` are float32 whatever the
stream is, and `(resid_pre.float() + attn_out).type_as(resid_pre) == resid_mid`. Of Wan 2.2's two
transformers dit_lens opens the first, `pipe.transformer`; for the steps below the boundary open
`pipe.transformer_2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .base import Family
from .config import Condition, Config, Size
from .forwards import BlockForward, Forward, Points, Tap
from .parts.attention import Attend, HeadsOut, dispatched
from .parts.layers import LastTableForward, check_processor, neurons, refuse_processors
from .parts.sites import (
    COND,
    FINAL_SITES,
    RESID,
    Sites,
    adaln_sites,
    attention_sites,
    cross_sites,
    mlp_sites,
)
from .registry import register
from .small import alive, small_text

VIDEO = ("batch", "channel", "frame", "height", "width")
DEFAULT_SIZE = (21, 60, 104)
"""The pipeline's 81 frames of 480 x 832 pixels, as latents."""


def hooked(points: Sequence[HookPoint], sums: Tensor) -> list[Tensor]:
    """Modulations one by one, each after its hook point.

    Args:
        points: their hook points.
        sums: all of them [batch, n, d_model], or [batch, token, n, d_model].
    """
    return [point(part) for point, part in zip(points, sums.unbind(-2), strict=True)]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys with neighbouring channels turned as pairs; the tables hold each angle twice.

    Args:
        x: [batch, token, head, d_head].
        cos: cosines of the positions.
        sin: sines of the positions.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2).type_as(x)


class WanBlockForward(BlockForward):
    """One block: self-attention, cross-attention and MLP, the first and the last modulated and
    gated.

    Args:
        module: the block.
        points: its hook points.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module, points)
        self.modulations = [points[name] for name in adaln_sites()]

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        block, hook = self.module, self.points
        x = self.enter(hidden_states)

        # six modulations of each item, or of each token
        each_token = temb.ndim == 4
        table = block.scale_shift_table.unsqueeze(0) if each_token else block.scale_shift_table
        six = hooked(self.modulations, table + temb.float())
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            six if each_token else [m.unsqueeze(1) for m in six]
        )

        # self-attention
        h = (hook["ln1.hook_normalized"](block.norm1(x.float())) * (1 + scale) + shift).type_as(x)
        out = hook["hook_attn_out"](block.attn1(h, None, None, rotary_emb) * gate)
        x = hook["hook_resid_mid"]((x.float() + out).type_as(x))

        # cross-attention
        h = block.norm2(x.float())
        h = hook["ln_cross.hook_normalized"](h) if "ln_cross.hook_normalized" in hook else h
        out = block.attn2(h.type_as(x), encoder_hidden_states, None, None)
        x = hook["hook_resid_mid_cross"](x + hook["hook_cross_attn_out"](out))

        # MLP
        h = hook["ln2.hook_normalized"](block.norm3(x.float()))
        h = (h * (1 + scale_mlp) + shift_mlp).type_as(x)
        out = hook["mlp.hook_out"](block.ffn(hook["mlp.hook_in"](h)))
        added = hook["hook_mlp_out"](out.float() * gate_mlp)
        return hook["hook_resid_post"]((x.float() + added).type_as(x))


class AttentionForward(Forward):
    """Attention of the video with itself, or with the text; queries and keys are normalised over
    all heads together.
    """

    def __init__(
        self, module: Any, points: Points, current_pass: Pass, layer: int | None, prefix: str
    ) -> None:
        super().__init__(module)
        self.attn_in = points[f"{prefix}hook_in"]
        self.qkv = [points[f"{prefix}hook_{name}"] for name in "qkv"]
        self.rot_q, self.rot_k = points[f"{prefix}hook_rot_q"], points[f"{prefix}hook_rot_k"]
        self.attend = Attend(points, current_pass, layer, prefix)
        self.heads_out = HeadsOut(points, prefix)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        attn = self.module
        check_processor(attn, WanAttnProcessor)
        heads = (attn.heads, -1)
        x = self.attn_in(hidden_states)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(x), attn.to_k(source), attn.to_v(source)
        q, k, v = (
            hook(part.unflatten(2, heads)) for hook, part in zip(self.qkv, projected, strict=True)
        )
        q, k = (
            attn.norm_q(q.flatten(2)).unflatten(2, heads),
            attn.norm_k(k.flatten(2)).unflatten(2, heads),
        )
        if rotary_emb is not None:
            q, k = rotated(q, *rotary_emb), rotated(k, *rotary_emb)
        q, k, v = (part.transpose(1, 2) for part in (self.rot_q(q), self.rot_k(k), v))
        z = self.attend(q, k, v, attention_mask, dispatched(attn.processor))
        return self.heads_out(z.transpose(1, 2).type_as(q), *attn.to_out)


class WanFamily(Family):
    """How dit_lens opens a `WanTransformer3DModel`."""

    model_class = "WanTransformer3DModel"
    differs = (
        "video; cross-attention to the text between self-attention and MLP; modulations from "
        "one shared vector and a table a block"
    )
    batch_order = None
    computes = {"attn": ("attn1",), "cross_attn": ("attn2",), "mlp": ("ffn",)}
    written_for = {
        "GELU.forward": "4a4013c4",
        "WanAttention.forward": "895ea6af",
        "WanAttnProcessor.__call__": "6c5a5095",
        "WanTransformerBlock.forward": "69aa0565",
    }

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.blocks)

    first_sites = {"hook_cond": COND, "hook_embed": RESID}
    last_sites = {**FINAL_SITES, "hook_sample": VIDEO}
    known_options = frozenset(
        "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim "
        "freq_dim ffn_dim num_layers cross_attn_norm eps image_dim added_kv_proj_dim "
        "rope_max_seq_len".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c = transformer.config
        p = c.patch_size
        own = tuple(c.get("sample_size") or DEFAULT_SIZE)
        shape = (*own[:1], *size)[-3:] if size else own
        return Config(
            n_layers=c.num_layers,
            d_model=c.num_attention_heads * c.attention_head_dim,
            n_heads=c.num_attention_heads,
            d_head=c.attention_head_dim,
            d_mlp=c.ffn_dim,
            patch_size=p[-1],
            in_channels=c.in_channels,
            out_channels=c.out_channels or c.in_channels,
            latent_shape=(c.in_channels, *shape),
            grid=tuple(n // each for n, each in zip(shape, p, strict=True)),
        )

    def block_sites(self, block: Any) -> Sites:
        """The names of one block; in some models the stream is normalised before it asks the text.

        Args:
            block: the block.
        """
        sites = {"hook_resid_pre": RESID} | adaln_sites() | {"ln1.hook_normalized": RESID}
        sites |= attention_sites() | {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        sites |= {} if isinstance(block.norm2, nn.Identity) else {"ln_cross.hook_normalized": RESID}
        sites |= cross_sites()
        sites |= {"hook_cross_attn_out": RESID, "hook_resid_mid_cross": RESID}
        sites |= {"ln2.hook_normalized": RESID} | mlp_sites()
        return sites | {"hook_mlp_out": RESID, "hook_resid_post": RESID}

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            WanBlockForward(block, points),
            AttentionForward(block.attn1, points, current_pass, layer, "attn."),
            AttentionForward(block.attn2, points, current_pass, None, "cross_attn."),
            neurons(block.ffn.net[0], points),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        embedder = transformer.condition_embedder
        return [
            LastTableForward(embedder, points, 0),
            Tap(embedder.time_embedder, after=points["hook_cond"]),
            Tap(transformer.norm_out, after=points["ln_final.hook_normalized"]),
            *super().outer_forwards(transformer, points, current_pass),
        ]

    def check_model(self, transformer: Any) -> None:
        c = transformer.config
        if c.added_kv_proj_dim or c.image_dim or c.in_channels != (c.out_channels or c.in_channels):
            raise InvalidValue(
                f"This Wan continues an image ({c.in_channels} channels in, {c.out_channels} out, "
                f"image_dim={c.image_dim}): it is given more than x_t; dit_lens opens "
                "text-to-video Wan, and Wan 2.2 TI2V."
            )
        for i, block in enumerate(transformer.blocks):
            for name in ("attn1", "attn2"):
                if getattr(getattr(block, name), "fused_projections", False):
                    raise InvalidValue(
                        f"The projections of {name} in block {i} are fused; call "
                        "transformer.unfuse_qkv_projections() first."
                    )
        refuse_processors(transformer.blocks, attn1=WanAttnProcessor, attn2=WanAttnProcessor)
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        x, c, p = inputs.get("hidden_states"), transformer.config, transformer.config.patch_size
        if not isinstance(x, Tensor) or x.ndim != 5 or x.shape[1] != c.in_channels:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InvalidValue(
                f"The latents have {got}; expected [batch, {c.in_channels}, frames, height, width]."
            )
        if any(n % each for n, each in zip(x.shape[2:], p, strict=True)):
            raise InvalidValue(
                f"The latents are {'x'.join(map(str, x.shape[2:]))}, and Wan would drop what does "
                f"not fill a patch; expected multiples of {'x'.join(map(str, p))}."
            )
        if inputs.get("encoder_hidden_states_image") is not None:
            raise InvalidValue(
                "This Wan has no image embedder; expected encoder_hidden_states_image=None."
            )

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        t: Tensor = inputs["timestep"]
        return t.amax(1) if t.ndim == 2 else t  # tokens that are given clean have the time 0

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        sizes = zip(inputs["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)
        return tuple(n // p for n, p in sizes)

    def shares_steps(self, transformer: Any, pipe: Any) -> bool:
        # without a ratio the first one does it all
        return super().shares_steps(transformer, pipe) and (
            getattr(pipe.config, "boundary_ratio", 1.0) is not None
        )

    def encode(self, pipe: Any, prompt: str) -> Condition:
        embeds, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )
        return Condition(encoder_hidden_states=embeds.to(pipe.transformer.dtype))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        x = latents.to(vae.dtype)
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1).to(x)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        video: Tensor = vae.decode(x / (1.0 / std) + mean, return_dict=False)[0]
        return video

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(
            patch_size=((1, 2, 2), (1, 2, 2), (2, 1, 1))[variant],
            num_attention_heads=(2, 1, 3)[variant],
            attention_head_dim=(12, 16, 8)[variant],
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=40,
            num_layers=(3, 2, 4)[variant],
            cross_attn_norm=(True, False, True)[variant],
            rope_max_seq_len=64,
        )
        # Wan itself has none
        model.register_to_config(sample_size=((3, 8, 8), (2, 4, 8), (2, 4, 4))[variant])
        return alive(model), Condition(encoder_hidden_states=torch.randn(2, 7, 32))

    def small_pipeline(self) -> Any:
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

        text_encoder, tokenizer = small_text("umt5", 32)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            vae = AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 2.0, 0.7, 1.0],
            ).eval()
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return WanPipeline(tokenizer, text_encoder, vae, scheduler, self.small(0)[0])

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {"height": 32, "width": 32, "num_frames": 9}


register(WanFamily())
