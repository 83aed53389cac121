"""The original DiT (Peebles & Xie 2023, arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`.

Each `Forward` below computes what diffusers' own does, operation for operation, with hook points in
between; the tests hold the two equal bit for bit. Attention runs through PyTorch's fused kernel
whether or not somebody reads the scores and pattern: those are computed in addition, and only a
hook that changes them switches to the explicit softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ..arguments import shown
from ..errors import InvalidValue
from ..hooks.passes import Pass
from .base import Family
from .config import Condition, Config, Size, image_config
from .forwards import BlockForward, Forward, Points, Tap
from .parts.attention import Attend, HeadsOut
from .parts.layers import AdaNormForward, check_processor, neurons, refuse_chunks, refuse_processors
from .parts.sites import BLOCK_SITES, Sites
from .registry import register
from .small import alive, small_vae


class ShiftScaleForward(Forward):
    """The projection that gives the last layer's shift and scale, one behind the other."""

    repeats = False

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.points = points["final.hook_shift"], points["final.hook_scale"]

    def __call__(self, x: Tensor) -> Tensor:
        both = self.own(x)
        if not any(point.listeners for point in self.points):
            return both
        return torch.cat(
            [point(part) for point, part in zip(self.points, both.chunk(2, dim=1), strict=True)],
            dim=1,
        )


class DiTBlockForward(BlockForward):
    """One block: two gated sublayers, added to the stream."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        if cross_attention_kwargs:
            raise InvalidValue(
                f"cross_attention_kwargs={shown(cross_attention_kwargs)} is not honoured by a "
                "hooked DiT, which has no cross-attention; pass None."
            )
        block, hook = self.module, self.points
        x = self.enter(hidden_states)

        # attention; its norm also makes all modulations
        h, gate_attn, shift_mlp, scale_mlp, gate_mlp = block.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype
        )
        added = hook["hook_attn_out"](gate_attn.unsqueeze(1) * block.attn1(h))
        x = hook["hook_resid_mid"](added + x)

        # MLP
        h = hook["ln2.hook_normalized"](block.norm3(x))
        h = hook["mlp.hook_in"](h * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        out = hook["mlp.hook_out"](block.ff(h))
        return hook["hook_resid_post"](hook["hook_mlp_out"](gate_mlp.unsqueeze(1) * out) + x)


class AttentionForward(Forward):
    """Multi-head self-attention."""

    def __init__(self, module: Any, points: Points, current_pass: Pass, layer: int) -> None:
        super().__init__(module)
        self.q, self.k, self.v = (points[f"attn.hook_{name}"] for name in "qkv")
        self.attend, self.heads_out = Attend(points, current_pass, layer), HeadsOut(points)

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        attn = self.module
        check_processor(attn, AttnProcessor2_0)
        shape = (*hidden_states.shape[:2], attn.heads, -1)
        q = self.q(attn.to_q(hidden_states).view(shape)).transpose(1, 2)
        k = self.k(attn.to_k(hidden_states).view(shape)).transpose(1, 2)
        v = self.v(attn.to_v(hidden_states).view(shape)).transpose(1, 2)
        return self.heads_out(self.attend(q, k, v).transpose(1, 2), *attn.to_out)


class DiTFamily(Family):
    """How dit_lens opens a `DiTTransformer2DModel`."""

    model_class = "DiTTransformer2DModel"
    differs = (
        "the block that the others are compared with; every block embeds time and class for itself"
    )
    batch_order = ("cond", "uncond")
    written_for = {
        "AdaLayerNormZero.forward": "0451374e",
        "Attention.forward": "f4dadb54",
        "AttnProcessor2_0.__call__": "dc692b9a",
        "BasicTransformerBlock.forward": "c7e58a0f",
        "GELU.forward": "4a4013c4",
    }

    known_options = frozenset(
        "num_attention_heads attention_head_dim in_channels out_channels num_layers dropout "
        "norm_num_groups attention_bias sample_size patch_size activation_fn "
        "num_embeds_ada_norm upcast_attention norm_elementwise_affine norm_eps".split()
    )
    last_projection = "proj_out_2"

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        return image_config(transformer, size, n_classes=transformer.config.num_embeds_ada_norm)

    def block_sites(self, block: Any) -> Sites:
        return BLOCK_SITES

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        return [
            DiTBlockForward(block, points),
            AdaNormForward(block.norm1, points),
            AttentionForward(block.attn1, points, current_pass, layer),
            neurons(block.ff.net[0], points),
        ]

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return [
            ShiftScaleForward(transformer.proj_out_1, points),
            Tap(transformer.norm_out, after=points["ln_final.hook_normalized"]),
            *super().outer_forwards(transformer, points, current_pass),
        ]

    def check_model(self, transformer: Any) -> None:
        refuse_chunks(transformer.transformer_blocks)
        refuse_processors(transformer.transformer_blocks, attn1=AttnProcessor2_0)
        for i, block in enumerate(transformer.transformer_blocks):
            if not isinstance(block.ff.net[0], GELU):
                raise InvalidValue(
                    f"Block {i} has the activation {type(block.ff.net[0]).__name__} "
                    f"(activation_fn={transformer.config.activation_fn!r}); expected 'gelu' or "
                    "'gelu-approximate'."
                )
        super().check_model(transformer)

    def check_input(self, transformer: Any, inputs: dict[str, Any]) -> None:
        c, p = transformer.config, transformer.config.patch_size
        x, t, y = (inputs.get(name) for name in ("hidden_states", "timestep", "class_labels"))
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != c.in_channels:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InvalidValue(
                f"The latents have {got}; expected [batch, {c.in_channels}, {c.sample_size}, "
                f"{c.sample_size}]."
            )
        if x.shape[2] != x.shape[3]:
            raise InvalidValue(
                f"The latents are {x.shape[2]}x{x.shape[3]}; diffusers' DiT silently scrambles "
                f"images that are not square, so expected {c.sample_size}x{c.sample_size}."
            )
        if x.shape[2] % p:
            raise InvalidValue(
                f"The latents are {x.shape[2]} wide; expected a multiple of the patch size {p}."
            )
        for name, value in (("timesteps", t), ("class labels", y)):
            if (
                not isinstance(value, Tensor)
                or value.ndim != 1
                or value.shape[0] not in (1, x.shape[0])
            ):
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
                raise InvalidValue(
                    f"The {name} are {got}; expected a tensor of shape [{x.shape[0]}], one for "
                    "each item."
                )
        assert y is not None
        # on an accelerator a look at the labels would wait for it
        known = y.tolist() if y.device.type == "cpu" else []
        bad = [label for label in known if not 0 <= label <= c.num_embeds_ada_norm]
        if bad:
            raise InvalidValue(
                f"Class label {bad[0]} is out of range; expected 0 to {c.num_embeds_ada_norm - 1}, "
                f"or {c.num_embeds_ada_norm} for no class."
            )
        weight = transformer.proj_out_2.weight
        if x.device != weight.device and weight.device.type != "meta":
            raise InvalidValue(
                f"The latents are on {x.device}, the model is on {weight.device}; use "
                f"x.to({str(weight.device)!r})."
            )

    def final(
        self, transformer: Any, stream: Tensor, inputs: dict[str, Any], memo: dict[str, Any]
    ) -> Tensor:
        if "modulation" not in memo:  # of time and class, embedded by the first block
            embedded = transformer.transformer_blocks[0].norm1.emb
            cond = embedded.forward(
                inputs["timestep"], inputs["class_labels"], hidden_dtype=stream.dtype
            )
            memo["modulation"] = transformer.proj_out_1.forward(F.silu(cond)).chunk(2, dim=1)
        shift, scale = memo["modulation"]
        h = transformer.norm_out.forward(stream)
        h = transformer.proj_out_2.forward(h * (1 + scale[:, None]) + shift[:, None])
        p, side = transformer.config.patch_size, int(stream.shape[1] ** 0.5)
        # tokens are patches of the image, row by row
        patches = h.reshape(len(h), side, side, p, p, transformer.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(h), -1, side * p, side * p)

    def small(self, variant: int) -> tuple[nn.Module, Condition]:
        from diffusers import DiTTransformer2DModel

        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=(4, 1, 4)[variant],
            out_channels=(8, 1, 4)[variant],
            num_layers=(3, 2, 4)[variant],
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=(1000, 10, 10)[variant],
            norm_num_groups=1,
            activation_fn=("gelu-approximate", "gelu-approximate", "gelu")[variant],
        ).eval()
        return alive(model), Condition(class_labels=torch.tensor([3, 7]))

    def small_call(self, guided: bool) -> dict[str, Any]:
        return {
            "class_labels": [3, 7],
            "num_inference_steps": 2,
            "guidance_scale": 4.0 if guided else 1.0,
        }

    def small_pipeline(self) -> Any:
        from diffusers import DDIMScheduler, DiTPipeline

        return DiTPipeline(self.small(0)[0], small_vae(), DDIMScheduler(1000))


register(DiTFamily())
