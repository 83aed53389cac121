"""Hunyuan-DiT (Li et al. 2024, arXiv 2405.08748) as diffusers' `HunyuanDiT2DModel`.

One stream, the image's, with skip connections as in a U-Net: of n blocks, those after the middle
one, n/2, receive besides the stream what left the block as far from the other end (block i the
`hook_resid_post` of block n - 1 - i): `hook_skip_in`. Stream and skip, side by side, go through a
norm and a linear layer, and what comes out is that block's `hook_resid_pre`. There, and only there,
`hook_resid_pre` is not the `hook_resid_post` of the block before.

The time, with the pooled text, gives each block a shift before its attention and nothing else: no
scales, no gates. Between attention and MLP each block reads the text by a cross-attention
(`cross_attn.`), after a norm of its own (`ln_cross`). The text is BERT's tokens followed by T5's,
with learned vectors in place of the padding, and no mask. Queries and keys are normalised, then
rotated by the place in the image (`hook_rot_q`, `hook_rot_k`); the text's keys are only normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed
from torch import Tensor, nn

from ..hooks.passes import Pass
from .base import Family
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points, TransformerForward
from .parts.attention import Attend, HeadsOut
from .parts.layers import check_processor, final_norm, gated, neurons, refuse_processors
from .parts.sites import COND, RESID, Sites, attention_sites, cross_sites, mlp_sites
from .parts.words import Text
from .registry import register
from .small import alive, small_text

PIXELS = 8  # the side of a latent in the image, in which sizes are given


class HunyuanForward(TransformerForward):
    """The whole model.

    diffusers empties the list of a ControlNet's residuals; the caller's, by which a call is
    recomputed, stays full.
    """

    def own(self, *args: Any, controlnet_block_samples: Any = None, **kwargs: Any) -> Any:
        samples = None if controlnet_block_samples is None else list(controlnet_block_samples)
        return super().own(*args, controlnet_block_samples=samples, **kwargs)


class HunyuanBlockForward(BlockForward):
    """One block: attention, cross-attention and MLP added to the stream."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Any = None,
        image_rotary_emb: Any = None,
        skip: Any = None,
    ) -> Tensor:
        block, hook = self.module, self.points

        # the stream, in the second half together with a skipped one
        embed = hook.get("hook_embed")
        x = hidden_states if embed is None else embed(hidden_states)
        if block.skip_linear is not None:
            x = merged(block, x, hook["hook_skip_in"](skip))
        x = hook["hook_resid_pre"](x)

        # attention
        h = block.norm1(x, hook["hook_cond"](temb))
        out = block.attn1(h, image_rotary_emb=image_rotary_emb)
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](out))

        # cross-attention
        h = hook["cross_attn.hook_in"](hook["ln_cross.hook_normalized"](block.norm2(x)))
        out = block.attn2(
            h, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=image_rotary_emb
        )
        x = hook["hook_resid_mid_cross"](x + hook["hook_cross_attn_out"](out))

        # MLP
        h = hook["mlp.hook_in"](hook["ln2.hook_normalized"](block.norm3(x)))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](hook["mlp.hook_out"](block.ff(h))))


def merged(block: Any, x: Tensor, skip: Tensor) -> Tensor:
    """The stream of a block that receives a skipped one.

    Args:
        block: the block.
        x: its stream.
        skip: the skipped one.
    """
    stream: Tensor = block.skip_linear(block.skip_norm(torch.cat([x, skip], dim=-1)))
    return stream


class ShiftNormForward(Forward):
    """The first normalisation, shifted by what the conditioning vector says."""

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.shift, self.attn_in = points["adaln.hook_shift_attn"], points["attn.hook_in"]
        self.normalized = points["ln1.hook_normalized"]

    def __call__(self, x: Tensor, emb: Tensor) -> Tensor:
        norm = self.module
        shift = self.shift(norm.linear(norm.silu(emb.to(torch.float32)).to(emb.dtype)))
        return self.attn_in(self.normalized(norm.norm(x)) + shift.unsqueeze(dim=1))


class AttentionForward(Forward):
    """Attention of the image with itself (`attn.`), or with the text (`cross_attn.`, where twins
    are never coupled).
    """

    def __init__(
        self, module: Any, points: Points, current_pass: Pass, layer: int | None, prefix: str
    ) -> None:
        super().__init__(module)
        self.qkv = [points[f"{prefix}hook_{name}"] for name in "qkv"]
        self.rotated = [points[f"{prefix}hook_rot_{name}"] for name in "qk"]
        self.attend = Attend(points, current_pass, layer, prefix)
        self.heads_out = HeadsOut(points, prefix)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        attn = self.module
        check_processor(attn, HunyuanAttnProcessor2_0)
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)
        q, k, v = (
            hook(x.unflatten(-1, (attn.heads, -1))).transpose(1, 2)
            for hook, x in zip(self.qkv, projected, strict=True)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb)
            k = k if attn.is_cross_attention else apply_rotary_emb(k, image_rotary_emb)
        q, k = (
            hook(x.transpose(1, 2)).transpose(1, 2)
            for hook, x in zip(self.rotated, (q, k), strict=True)
        )
        return self.heads_out(self.attend(q, k, v).transpose(1, 2), *attn.to_out)


class HunyuanFamily(Family):
    """How dit_lens opens a `HunyuanDiT2DModel`."""

    model_class = "HunyuanDiT2DModel"
    differs = (
        "a cross-attention to the text between attention and MLP; shifts only, no gates; skips "
        "from the first to the second half"
    )
    written_for = {
        "AdaLayerNormContinuous.forward": "cbc6feb8",
        "AdaLayerNormShift.forward": "51debb64",
        "Attention.forward": "f4dadb54",
        "GEGLU.forward": "94d28bbf",
        "GELU.forward": "4a4013c4",
        "HunyuanAttnProcessor2_0.__call__": "6dd20919",
        "HunyuanDiTBlock.forward": "ab287213",
    }

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return list(transformer.blocks)

    known_options = frozenset(
        "num_attention_heads attention_head_dim in_channels patch_size activation_fn "
        "sample_size hidden_size num_layers mlp_ratio learn_sigma cross_attention_dim "
        "cross_attention_dim_t5 pooled_projection_dim text_len text_len_t5 "
        "use_style_cond_and_image_meta_size".split()
    )

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c = transformer.config
        d_mlp = int(c.num_attention_heads * c.attention_head_dim * c.mlp_ratio)
        return image_config(transformer, size, d_mlp=d_mlp, restartable=False)

    def block_sites(self, block: Any) -> Sites:
        """The names of one block: those of the second half receive a skipped stream.

        Args:
            block: the block.
        """
        sites: Sites = {} if block.skip_linear is None else {"hook_skip_in": RESID}
        sites |= {"hook_resid_pre": RESID, "hook_cond": COND, "adaln.hook_shift_attn": COND}
        sites |= {"ln1.hook_normalized": RESID} | attention_sites()
        sites |= {"hook_attn_out": RESID, "hook_resid_mid": RESID}
        sites |= {"ln_cross.hook_normalized": RESID} | cross_sites()
        sites |= {"hook_cross_attn_out": RESID, "hook_resid_mid_cross": RESID}
        sites |= {"ln2.hook_normalized": RESID} | mlp_sites(gated=gated(block.ff))
        return sites | {"hook_mlp_out": RESID, "hook_resid_post": RESID}

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            HunyuanBlockForward(block, points),
            ShiftNormForward(block.norm1, points),
            AttentionForward(block.attn1, points, current_pass, layer, "attn."),
            AttentionForward(block.attn2, points, current_pass, None, "cross_attn."),
            neurons(block.ff.net[0], points),
        ]

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return HunyuanForward(transformer, points, current_pass)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        norm = final_norm(transformer.norm_out, points)
        return [norm, *super().outer_forwards(transformer, points, current_pass)]

    def check_model(self, transformer: Any) -> None:
        refuse_processors(
            transformer.blocks, attn1=HunyuanAttnProcessor2_0, attn2=HunyuanAttnProcessor2_0
        )
        super().check_model(transformer)

    def stream_in(self, block: Any, inputs: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        x = self.skip_block(inputs, args, kwargs)[0][""]
        return x if block.skip_linear is None else merged(block, x, kwargs["skip"])

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        height, width = x.shape[-2:]
        sizes: dict[str, Any] = {
            "style": torch.zeros(len(x), dtype=torch.long, device=x.device),
            "image_meta_size": x.new_tensor(
                [1024, 1024, PIXELS * height, PIXELS * width, 0, 0]
            ).repeat(len(x), 1),
        }
        if "image_rotary_emb" not in condition:
            sizes["image_rotary_emb"] = rotary(transformer, x)
        # the time's type is the embedder's
        return sizes | super().inputs(transformer, x, t.to(x.dtype), condition)

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        bert = Text(pipe.tokenizer, prompt, pipe.transformer.config.text_len)
        return [bert, Text(pipe.tokenizer_2, prompt)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        def encoded(index: int, length: int) -> tuple[Tensor, Tensor]:
            embeds, _, mask, _ = pipe.encode_prompt(
                prompt,
                dtype=pipe.transformer.dtype,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            return embeds, mask

        bert, t5 = encoded(0, 77), encoded(1, 256)
        return Condition(
            encoder_hidden_states=bert[0],
            text_embedding_mask=bert[1],
            encoder_hidden_states_t5=t5[0],
            text_embedding_mask_t5=t5[1],
        )

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        # The rotary table (cosines, sines) has no batch axis.
        shared = {k: v for k, v in conditions[0].items() if not isinstance(v, Tensor)}
        return Condition(
            shared
            | {k: torch.cat([c[k] for c in conditions]) for k in conditions[0] if k not in shared}
        )

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import HunyuanDiT2DModel

        model = HunyuanDiT2DModel(
            num_attention_heads=(2, 3, 2)[variant],
            attention_head_dim=8,
            hidden_size=(16, 24, 16)[variant],
            in_channels=4,
            patch_size=2,
            sample_size=8,
            num_layers=(4, 6, 2)[variant],
            mlp_ratio=(4.0, 4.0, 2.5)[variant],
            activation_fn=("gelu-approximate", "gelu-approximate", "geglu")[variant],
            learn_sigma=variant != 1,
            use_style_cond_and_image_meta_size=variant != 1,
            cross_attention_dim=24,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=77 if variant == 0 else 7,
            text_len_t5=256 if variant == 0 else 9,
        )
        gen = torch.Generator().manual_seed(variant)
        bert, t5 = model.config.text_len, model.config.text_len_t5
        return alive(model), Condition(
            encoder_hidden_states=torch.randn(2, bert, 24, generator=gen),
            text_embedding_mask=torch.arange(bert) < torch.tensor([[bert], [4]]),
            encoder_hidden_states_t5=torch.randn(2, t5, 32, generator=gen),
            text_embedding_mask_t5=torch.arange(t5) < torch.tensor([[6], [3]]),
        )

    def small_call(self, guided: bool) -> dict[str, Any]:
        return super().small_call(guided) | {
            "height": 64,
            "width": 64,
            "use_resolution_binning": False,
        }

    def small_pipeline(self) -> Any:
        from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiTPipeline

        with torch.random.fork_rng():
            torch.manual_seed(1)
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8,) * 4,
                norm_num_groups=4,
            ).eval()
        (bert, bert_tokens), (t5, t5_tokens) = small_text("bert", 24), small_text("t5", 32)
        return HunyuanDiTPipeline(
            vae,
            bert,
            bert_tokens,
            self.small(0)[0],
            DDPMScheduler(prediction_type="v_prediction"),
            None,
            None,
            requires_safety_checker=False,
            text_encoder_2=t5,
            tokenizer_2=t5_tokens,
        )


def rotary(transformer: Any, x: Tensor) -> Any:
    """Cosines and sines [token, d_head] as the pipeline prepares them, which lays every grid into
    one square, by its longer side.

    Args:
        transformer: the transformer.
        x: latents [batch, channel, height, width].
    """
    p = transformer.config.patch_size
    grid, square = [side // p for side in x.shape[-2:]], 512 // PIXELS // p
    sizes = [round(square / max(grid) * side) for side in grid]
    start = [round((square - size) / 2) for size in sizes]
    stop = [begin + size for begin, size in zip(start, sizes, strict=True)]
    return get_2d_rotary_pos_embed(
        transformer.config.attention_head_dim, (start, stop), grid, device=x.device
    )


register(HunyuanFamily())
