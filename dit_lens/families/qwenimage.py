"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324) as diffusers' `QwenImageTransformer2DModel`.

Image and text are two streams with weights of their own that attend together, as in SD 3, here with
the text's tokens first in the joint sequence, and with queries and keys normalised and rotated
before they meet (`hook_rot_q`, `hook_rot_k`). The text's hook points have the prefix `text.`.
Prompts differ in length, so in a batch the shorter ones are padded and the padding is masked.
Latents enter as packed 2x2 patches; those of dit_lens are [batch, channel, height, width], without
the frame axis that the VAE wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn

from ..errors import InvalidValue
from ..hooks.passes import Pass
from .config import Condition, Size
from .forwards import Forward, Points
from .parts.joint import text_first
from .parts.layers import final_norm, neurons, refuse_processors
from .parts.sites import Sites, adaln_sites
from .parts.two_streams import (
    Angles,
    DoubleAttentionForward,
    PackedFamily,
    TwoStreamsForward,
    clipped,
    double_sites,
    pack,
    unpack,
)
from .parts.words import Text
from .registry import register
from .small import alive, small_text


class QwenBlockForward(TwoStreamsForward):
    """A block of Qwen-Image: it modulates and normalises both streams itself."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Angles | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: None = None,
    ) -> tuple[Tensor, Tensor]:
        block = self.module
        x, text, temb = self.entered(hidden_states, encoder_hidden_states, temb)
        h, *rest = self.first_half("", x, block.img_mod(temb), block.img_norm1)
        text_h, *text_rest = self.first_half("text.", text, block.txt_mod(temb), block.txt_norm1)
        out, text_out = block.attn(
            hidden_states=h,
            encoder_hidden_states=text_h,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = self.second_half("", x, out, rest, block.img_norm2, block.img_mlp)
        x = self.points["hook_resid_post"](clipped(x))
        text = self.second_half("text.", text, text_out, text_rest, block.txt_norm2, block.txt_mlp)
        return self.points["text.hook_resid_post"](clipped(text)), x

    def first_half(
        self, stream: str, x: Tensor, modulation: Tensor, norm: Any
    ) -> tuple[Tensor, ...]:
        """What enters the attention, and the four modulations that are still to come.

        Args:
            stream: the stream's prefix.
            x: the stream.
            modulation: all six modulations, one behind the other.
            norm: the norm before the attention.
        """
        hook = self.points
        chunks = zip(adaln_sites(stream), modulation.chunk(6, dim=-1), strict=True)
        shift, scale, *rest = [hook[name](m) for name, m in chunks]
        h = hook[f"{stream}ln1.hook_normalized"](norm(x)) * (1 + scale[:, None]) + shift[:, None]
        return hook[f"{stream}attn.hook_in"](h), *rest


class QwenAttentionForward(DoubleAttentionForward):
    """Joint attention in which text tokens that are only padding serve as no keys."""

    processor = QwenDoubleStreamAttnProcessor2_0

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        image_rotary_emb: Angles | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.check()
        image, text = self.streams(hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            image, text = (
                (*(apply_rotary_emb_qwen(x, angles, use_real=False) for x in (q, k)), v)
                for (q, k, v), angles in zip((image, text), image_rotary_emb, strict=True)
            )
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = torch.cat(
                [mask, mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)], dim=1
            )[:, None, None]
        return self.answers(q, k, v, mask, encoder_hidden_states.shape[1])


class QwenImageFamily(PackedFamily):
    """How dit_lens opens a `QwenImageTransformer2DModel`."""

    model_class = "QwenImageTransformer2DModel"
    differs = (
        "two streams, image and text, with weights of their own, that attend jointly; prompts "
        "of any length, padded and masked"
    )
    computes = {"attn": ("attn",), "mlp": ("img_mlp", "txt_mlp")}
    written_for = {
        "AdaLayerNormContinuous.forward": "cbc6feb8",
        "Attention.forward": "f4dadb54",
        "GELU.forward": "4a4013c4",
        "QwenDoubleStreamAttnProcessor2_0.__call__": "85a4aad5",
        "QwenImageTransformerBlock.forward": "1e729f99",
    }

    known_options = frozenset(
        "patch_size in_channels out_channels num_layers attention_head_dim "
        "num_attention_heads joint_attention_dim guidance_embeds axes_dims_rope".split()
    )

    def block_sites(self, block: Any) -> Sites:
        return double_sites()

    def check_model(self, transformer: Any) -> None:
        for option in ("zero_cond_t", "use_layer3d_rope"):
            if transformer.config.get(option):
                raise InvalidValue(
                    f"The model has {option}=True, as the newer editing and layering versions of "
                    "Qwen-Image do: its images differ in their modulation or make up x_t together; "
                    "expected a transformer without it, such as that of Qwen/Qwen-Image."
                )
        refuse_processors(transformer.transformer_blocks, attn=QwenDoubleStreamAttnProcessor2_0)
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        shapes = inputs.get("img_shapes") or []
        if other := [shape for shape in shapes if shape != shapes[0]]:
            raise InvalidValue(
                f"The batch has images of shapes {shapes[0]} and {other[0]}, and diffusers places "
                "all as if they were like the first; expected images of one shape."
            )

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            QwenBlockForward(block, points),
            QwenAttentionForward(block.attn, points, current_pass, layer),
            neurons(block.img_mlp.net[0], points),
            neurons(block.txt_mlp.net[0], points, "text.mlp."),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        norm = final_norm(transformer.norm_out, points)
        return [norm, *super().outer_forwards(transformer, points, current_pass)]

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
        return {"img_shapes": shapes} | super().inputs(transformer, x, t, condition)

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        first = inputs["img_shapes"][0]
        # the others are given for editing
        _, height, width = first if isinstance(first, tuple) else first[0]
        return height, width

    def text_keys(self, transformer: Any, inputs: dict[str, Any], keys: int) -> slice | Tensor:
        return text_first(inputs, keys, transformer).text

    def texts(self, pipe: Any, prompt: str) -> list[Text]:
        template = pipe.prompt_template_encode
        dropped, behind = pipe.prompt_template_encode_start_idx, template.rpartition("{}")[2]
        return [Text(pipe.tokenizer, template.format(prompt), dropped=dropped, behind=behind)]

    def encode(self, pipe: Any, prompt: str) -> Condition:
        embeds, mask = pipe.encode_prompt(prompt, max_sequence_length=512)
        return Condition(encoder_hidden_states=embeds, encoder_hidden_states_mask=mask)

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        """Shorter texts are padded as the pipeline does; without padding there is no mask."""
        longest, padded, masks = (
            max(c["encoder_hidden_states"].shape[1] for c in conditions),
            [],
            [],
        )
        for c in conditions:
            text, mask = c["encoder_hidden_states"], c.get("encoder_hidden_states_mask")
            mask = text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask.long()
            padded.append(F.pad(text, (0, 0, 0, longest - text.shape[1])))
            masks.append(F.pad(mask, (0, longest - text.shape[1])))
        mask = torch.cat(masks)
        own = {
            "encoder_hidden_states": torch.cat(padded),
            "encoder_hidden_states_mask": None if mask.all() else mask,
        }
        return Condition({**conditions[0], **own})

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        c, frames = vae.config, latents[:, :, None].to(vae.dtype)
        mean, std = (
            torch.tensor(s).view(1, -1, 1, 1, 1).to(frames) for s in (c.latents_mean, c.latents_std)
        )
        image: Tensor = vae.decode(frames / (1.0 / std) + mean).sample[:, :, 0]
        return image

    def guided(self, cond: Tensor, null: Tensor, strength: float) -> Tensor:
        """Each token is scaled back to the length that it has without guidance, as the pipeline
        does.
        """
        mixed = super().guided(cond, null, strength)
        own, longer = (pack(x).norm(dim=-1, keepdim=True) for x in (cond, mixed))
        return unpack(pack(mixed) * (own / longer), (cond.shape[-2] // 2, cond.shape[-1] // 2))

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import QwenImageTransformer2DModel

        model = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=(2, 3, 4)[variant],
            attention_head_dim=8,
            num_attention_heads=(2, 3, 2)[variant],
            joint_attention_dim=16,
            axes_dims_rope=(2, 4, 2) if variant == 2 else (2, 2, 4),
        )
        model.register_to_config(sample_size=((8, 8), (8, 8), (6, 10))[variant])
        mask = None if variant == 0 else torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        return alive(model), Condition(
            encoder_hidden_states=torch.randn(2, 6, 16), encoder_hidden_states_mask=mask
        )

    def small_pipeline(self) -> Any:
        from diffusers import (
            AutoencoderKLQwenImage,
            FlowMatchEulerDiscreteScheduler,
            QwenImagePipeline,
        )

        with torch.random.fork_rng():
            torch.manual_seed(1)
            vae = AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.7, 0.1, 0.0, 0.4],
                latents_std=[2.8, 1.5, 1.0, 0.6],
            ).eval()
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192
        )
        return QwenImagePipeline(scheduler, vae, *small_text("qwen2_vl", 16), self.small(0)[0])


register(QwenImageFamily())
