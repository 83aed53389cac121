"""CogVideoX 1.0 and 1.5 (Yang et al. 2024, arXiv 2408.06072) as diffusers'
`CogVideoXTransformer3DModel`.

Video: latents are [batch, frame, channel, height, width], the tokens' grid (frame, height, width);
in 1.5 a token spans two latent frames. Video and text are two streams that share all weights but
the modulations: each block's "expert" adaLN has vectors for the video and others for the text,
`text.adaln.*`. Attention and MLP run once, on one sequence in which the text comes first; hook
points are given its two parts, the text's under names with `text.`. Queries and keys are
normalised, then, in the larger models, the video's are turned by its positions: `hook_rot_q` and
`hook_rot_k`. Smaller models have their positions in `hook_embed` instead. After the blocks the
video goes through a plain normalisation, which has no name, before the modulated one (`ln_final`).

Image-to-video models can be opened and traced, but not sampled by dit_lens: their latents are the
video's and the image's channels one behind the other, of which the scheduler steps the first half
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .base import Family, Skipped
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points
from .parts.attention import Attend, HeadsOut
from .parts.joint import AnyPoints, joint_points, text_first
from .parts.layers import check_processor, gated, neurons, refuse_processors
from .parts.sites import (
    FINAL_SITES,
    RESID,
    Sites,
    adaln_sites,
    both,
    mlp_sites,
    out_sites,
    qkv_sites,
    scores_sites,
    texts,
)
from .registry import register
from .small import alive, small_text

VIDEO = ("batch", "frame", "channel", "height", "width")
Angles = tuple[Tensor, Tensor]


def norm_sites(sublayer: str, norm: str) -> Sites:
    """The names of what one expert adaLN makes: the modulations of both streams, then each stream
    normalised, and modulated.

    Args:
        sublayer: what it modulates, attn or mlp.
        norm: its prefix.
    """
    vectors = adaln_sites(sublayers=(sublayer,))
    entered = {f"{norm}.hook_normalized": RESID, f"{sublayer}.hook_in": RESID}
    return vectors | texts(vectors) | entered | texts(entered)


def angles(c: Any, grid: Size, device: Any) -> Angles:
    """Cosines and sines of the video's positions [token, d_head], as the pipeline prepares them.

    Args:
        c: the transformer's configuration.
        grid: (frame, height, width) of the tokens.
        device: where the tables go.
    """
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, *size = grid
    height, width = c.sample_height // c.patch_size, c.sample_width // c.patch_size
    if c.patch_size_t is None:
        options: Any = {"crops_coords": get_resize_crop_region_for_grid(tuple(size), width, height)}
    else:
        options = {"crops_coords": None, "grid_type": "slice", "max_size": (height, width)}
    return get_3d_rotary_pos_embed(
        c.attention_head_dim, grid_size=size, temporal_size=frames, device=device, **options
    )


class CogVideoXBlockForward(BlockForward):
    """One block: joint attention and a joint MLP, each modulated and gated for each stream by
    itself.

    Args:
        module: the block.
        points: its hook points.
        joint: the same, on the joint sequence.
    """

    def __init__(self, module: Any, points: Points, joint: AnyPoints) -> None:
        super().__init__(module, points)
        self.mlp_out = joint["mlp.hook_out"]

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, hook, n = self.module, self.points, encoder_hidden_states.shape[1]
        x, text = self.enter_both(hidden_states, encoder_hidden_states)
        temb = hook["hook_cond"](temb)

        # attention
        h, text_h, gate, text_gate = block.norm1(x, text, temb)
        out, text_out = block.attn1(
            hidden_states=h,
            encoder_hidden_states=text_h,
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](gate * out))
        text = hook["text.hook_resid_mid"](text + hook["text.hook_attn_out"](text_gate * text_out))

        # MLP
        h, text_h, gate, text_gate = block.norm2(x, text, temb)
        out = self.mlp_out(block.ff(torch.cat([text_h, h], dim=1)))
        x = hook["hook_resid_post"](x + hook["hook_mlp_out"](gate * out[:, n:]))
        added = hook["text.hook_mlp_out"](text_gate * out[:, :n])
        return x, hook["text.hook_resid_post"](text + added)


class ExpertNormForward(Forward):
    """One expert adaLN: both streams normalised by the same weights, each modulated by its own
    vectors; and their gates.
    """

    def __init__(self, module: Any, points: Points, sublayer: str, norm: str) -> None:
        super().__init__(module)
        hooks = [points[name] for name in norm_sites(sublayer, norm)]
        self.modulations, self.entered = hooks[:6], hooks[6:]

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor, ...]:
        norm, (normalized, h, text_normalized, text_h) = self.module, self.entered
        chunks = zip(self.modulations, norm.linear(norm.silu(temb)).chunk(6, dim=1), strict=True)
        shift, scale, gate, text_shift, text_scale, text_gate = (
            point(part)[:, None] for point, part in chunks
        )
        x = h(normalized(norm.norm(hidden_states)) * (1 + scale) + shift)
        text = text_h(
            text_normalized(norm.norm(encoder_hidden_states)) * (1 + text_scale) + text_shift
        )
        return x, text, gate, text_gate


class AttentionForward(Forward):
    """Attention of text and video, which are one sequence.

    Args:
        module: the attention.
        points: the block's hook points, on the joint sequence.
        current_pass: the pass that it will run in.
        layer: the block's number.
    """

    def __init__(self, module: Any, points: AnyPoints, current_pass: Pass, layer: int) -> None:
        super().__init__(module)
        self.points, self.heads_out = points, HeadsOut(points)
        self.attend = Attend(points, current_pass, layer)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> tuple[Tensor, Tensor]:
        attn, hook, n = self.module, self.points, encoder_hidden_states.shape[1]
        check_processor(attn, CogVideoXAttnProcessor2_0)
        h = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, h.shape[1], len(h))
            attention_mask = mask.view(len(h), attn.heads, -1, mask.shape[-1])
        parts = (
            part.unflatten(2, (attn.heads, -1))
            for part in (attn.to_q(h), attn.to_k(h), attn.to_v(h))
        )
        q, k, v = (
            hook[f"attn.hook_{name}"](part).transpose(1, 2)
            for name, part in zip("qkv", parts, strict=True)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            for part in (q, k):  # in place, as nobody has seen what the norms return
                part[:, :, n:] = apply_rotary_emb(part[:, :, n:], image_rotary_emb)
        q, k = (
            hook[f"attn.hook_rot_{name}"](p.transpose(1, 2)).transpose(1, 2)
            for name, p in (("q", q), ("k", k))
        )
        out = self.heads_out(self.attend(q, k, v, attention_mask).transpose(1, 2), *attn.to_out)
        return out[:, n:], out[:, :n]


class LastNormForward(Forward):
    """The last normalisation: shift, scale, and the normalised stream."""

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.modulations = points["final.hook_shift"], points["final.hook_scale"]
        self.normalized = points["ln_final.hook_normalized"]

    def __call__(
        self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
    ) -> Tensor:
        norm = self.module
        chunks = zip(self.modulations, norm.linear(norm.silu(temb)).chunk(2, dim=1), strict=True)
        shift, scale = (point(part)[:, None] for point, part in chunks)
        return self.normalized(norm.norm(x)) * (1 + scale) + shift


class CogVideoXFamily(Family):
    """How dit_lens opens a `CogVideoXTransformer3DModel`."""

    model_class = "CogVideoXTransformer3DModel"
    differs = (
        "video; text and video share all weights but the modulations, and are one sequence in "
        "attention and MLP"
    )
    written_for = {
        "AdaLayerNorm.forward": "802d5b6c",
        "Attention.forward": "f4dadb54",
        "CogVideoXAttnProcessor2_0.__call__": "1d1d9d63",
        "CogVideoXBlock.forward": "706f5b8f",
        "CogVideoXLayerNormZero.forward": "389659b3",
        "GEGLU.forward": "94d28bbf",
        "GELU.forward": "4a4013c4",
    }

    first_sites = both({"hook_embed": RESID})
    last_sites = {**FINAL_SITES, "hook_sample": VIDEO}
    known_options = frozenset(
        "num_attention_heads attention_head_dim in_channels out_channels flip_sin_to_cos "
        "freq_shift time_embed_dim ofs_embed_dim text_embed_dim num_layers dropout "
        "attention_bias sample_width sample_height sample_frames patch_size patch_size_t "
        "temporal_compression_ratio max_text_seq_length activation_fn timestep_activation_fn "
        "norm_elementwise_affine norm_eps spatial_interpolation_scale "
        "temporal_interpolation_scale use_rotary_positional_embeddings "
        "use_learned_positional_embeddings patch_bias".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c, p, p_t = transformer.config, transformer.config.patch_size, self._span(transformer)
        frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
        # 1.5 pads frames to whole tokens
        own = (-(-frames // p_t) * p_t, c.sample_height, c.sample_width)
        frames, height, width = own if size is None else (*own[: 3 - len(size)], *size)
        return image_config(
            transformer,
            (height, width),
            latent_shape=(frames, c.in_channels, height, width),
            grid=(frames // p_t, height // p, width // p),
            restartable=False,
            joint=True,
            own_axes={"d_cond": c.time_embed_dim},
        )

    def _span(self, transformer: Any) -> int:
        """How many latent frames a token spans."""
        return transformer.config.patch_size_t or 1

    def block_sites(self, block: Any) -> Sites:
        mid = {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        post = {"hook_mlp_out": RESID, "hook_resid_post": RESID}
        sites = both({"hook_resid_pre": RESID}) | {"hook_cond": ("batch", "d_cond")}
        sites |= norm_sites("attn", "ln1")
        inside = qkv_sites() | scores_sites("attn.") | out_sites()
        sites |= both(inside) | mid | texts(mid) | norm_sites("mlp", "ln2")
        return sites | both(mlp_sites(gated=gated(block.ff))) | post | texts(post)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        joint = joint_points(points, current_pass, text_first)
        return [
            CogVideoXBlockForward(block, points, joint),
            ExpertNormForward(block.norm1, points, "attn", "ln1"),
            AttentionForward(block.attn1, joint, current_pass, layer),
            ExpertNormForward(block.norm2, points, "mlp", "ln2"),
            neurons(block.ff.net[0], joint),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        norm = LastNormForward(transformer.norm_out, points)
        return [norm, *super().outer_forwards(transformer, points, current_pass)]

    def check_model(self, transformer: Any) -> None:
        refuse_processors(transformer.transformer_blocks, attn1=CogVideoXAttnProcessor2_0)
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        c, x = transformer.config, inputs["hidden_states"]
        text = inputs["encoder_hidden_states"].shape[1]
        units = self._span(transformer), c.patch_size, c.patch_size
        if any(size % unit for size, unit in zip((x.shape[1], *x.shape[3:]), units, strict=True)):
            raise InvalidValue(
                f"The latents have shape {list(x.shape)}; expected [batch, frame, channel, height, "
                "width] with frames, height and width in multiples of "
                f"{', '.join(map(str, units))}."
            )
        if c.use_rotary_positional_embeddings and inputs.get("image_rotary_emb") is None:
            raise InvalidValue(
                "image_rotary_emb is missing, the positions of the tokens; expected the pipeline's "
                "two tables."
            )
        if hasattr(transformer.patch_embed, "pos_embedding") and text != c.max_text_seq_length:
            raise InvalidValue(
                f"The text has {text} tokens; expected {c.max_text_seq_length}, padding included."
            )

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        inputs = {"hidden_states": x, "timestep": t, **condition}
        if (
            transformer.config.use_rotary_positional_embeddings
            and inputs.get("image_rotary_emb") is None
        ):
            inputs["image_rotary_emb"] = angles(
                transformer.config, self.grid(transformer, inputs), x.device
            )
        return inputs

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        c, (frames, _, height, width) = transformer.config, inputs["hidden_states"].shape[1:]
        return frames // self._span(transformer), height // c.patch_size, width // c.patch_size

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        x, text = args[:2] if args else (kwargs["hidden_states"], kwargs["encoder_hidden_states"])
        return {"": x, "text.": text}, lambda found: (found[""], found["text."])

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        return returned[0]

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return text_first(inputs, keys, transformer).text

    def encode(self, pipe: Any, prompt: str) -> Condition:
        # for so many tokens and no others
        placed = hasattr(pipe.transformer.patch_embed, "pos_embedding")
        options = (
            {"max_sequence_length": pipe.transformer.config.max_text_seq_length} if placed else {}
        )
        return Condition(
            encoder_hidden_states=pipe.encode_prompt(prompt, None, False, **options)[0]
        )

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """As the pipeline does, and the frames that 1.5 pads with are decoded too."""
        return vae.decode(
            (1 / vae.config.scaling_factor * latents.transpose(1, 2)).to(vae.dtype)
        ).sample

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        return self._small(variant, 7), Condition(encoder_hidden_states=torch.randn(2, 7, 24))

    def _small(self, variant: int, text_tokens: int) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return alive(
            CogVideoXTransformer3DModel(
                num_attention_heads=(2, 2, 3)[variant],
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=20,
                text_embed_dim=24,
                num_layers=(3, 2, 4)[variant],
                sample_width=8,
                sample_height=(8, 4, 8)[variant],
                sample_frames=(5, 5, 9)[variant],
                patch_size_t=(None, None, 2)[variant],
                max_text_seq_length=text_tokens,
                use_rotary_positional_embeddings=variant > 0,
                use_learned_positional_embeddings=variant == 1,
                attention_bias=variant != 1,
                norm_elementwise_affine=variant != 2,
                patch_bias=variant != 2,
                activation_fn=("gelu-approximate", "geglu", "gelu-approximate")[variant],
            )
        )

    def small_pipeline(self) -> Any:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

        # three levels in place of four: a quarter of the pixels to decode
        blocks = {
            f"{way.lower()}_block_types": (f"CogVideoX{way}Block3D",) * 3 for way in ("Down", "Up")
        }
        sizes = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
        vae = AutoencoderKLCogVideoX(block_out_channels=(4,) * 3, **blocks, **sizes)
        encoder, tokenizer = small_text("t5", 24)
        scheduler = CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )
        return CogVideoXPipeline(tokenizer, encoder, alive(vae), self._small(0, 226), scheduler)

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {"height": 32, "width": 32}


register(CogVideoXFamily())
