"""The original DiT (Peebles & Xie 2023, arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`.

Each `Forward` below computes what diffusers' own does, operation for operation, with hook points in
between; the tests hold the two equal bit for bit. Attention runs through PyTorch's fused kernel
whether or not somebody reads the scores and pattern: those are computed beside it, and only a hook
that changes them switches to the explicit softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
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
from .parts.layers import AdaNormForward, check_processor, neurons, refuse_chunks, refuse_processors
from .parts.sites import FINAL_SITES, adaln_sites, attention_sites, mlp_sites
from .small import alive, small_vae

BLOCK_SITES: dict[str, Axes] = {
    "hook_resid_pre": RESID,
    "hook_cond": COND,
    **adaln_sites(),
    "ln1.hook_normalized": RESID,
    **attention_sites(rotary=False),
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
    "ln2.hook_normalized": RESID,
    **mlp_sites(),
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}


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


class BlockForward(Forward):
    """One block: two gated sublayers, added to the stream.

    The first one is also given `hook_embed`.
    """

    def __init__(self, module: Any, points: Points, embed: HookPoint | None) -> None:
        super().__init__(module)
        self.embed = embed
        self.resid_pre, self.resid_mid = points["hook_resid_pre"], points["hook_resid_mid"]
        self.resid_post = points["hook_resid_post"]
        self.attn_out, self.mlp_out = points["hook_attn_out"], points["hook_mlp_out"]
        self.normalized, self.mlp_in, self.mlp_raw = (
            points["ln2.hook_normalized"],
            points["mlp.hook_in"],
            points["mlp.hook_out"],
        )

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
                f"cross_attention_kwargs={cross_attention_kwargs!r} is not honoured by a hooked "
                "DiT, which has no "
                "cross-attention; pass None."
            )
        block = self.module
        x = self.resid_pre(hidden_states if self.embed is None else self.embed(hidden_states))
        h, gate_attn, shift_mlp, scale_mlp, gate_mlp = block.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype
        )
        x = self.resid_mid(self.attn_out(gate_attn.unsqueeze(1) * block.attn1(h)) + x)
        h = self.mlp_in(
            self.normalized(block.norm3(x)) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        )
        return self.resid_post(self.mlp_out(gate_mlp.unsqueeze(1) * self.mlp_raw(block.ff(h))) + x)


class AttentionForward(Forward):
    """Multi-head self-attention."""

    def __init__(self, module: Any, points: Points, instrumentation: Any, layer: int) -> None:
        super().__init__(module)
        self.q, self.k, self.v = (points[f"attn.hook_{name}"] for name in "qkv")
        self.attend, self.heads_out = Attend(points, instrumentation, layer), HeadsOut(points)

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

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        c = transformer.config
        height, width = size or (c.sample_size, c.sample_size)
        return Config(
            n_layers=c.num_layers,
            d_model=c.num_attention_heads * c.attention_head_dim,
            n_heads=c.num_attention_heads,
            d_head=c.attention_head_dim,
            d_mlp=4 * c.num_attention_heads * c.attention_head_dim,
            patch_size=c.patch_size,
            in_channels=c.in_channels,
            out_channels=transformer.out_channels,
            latent_shape=(c.in_channels, height, width),
            grid=(height // c.patch_size, width // c.patch_size),
            n_classes=c.num_embeds_ada_norm,
        )

    def sites(self, transformer: Any) -> dict[str, Axes]:
        sites: dict[str, Axes] = {"hook_embed": RESID}
        for i in range(len(transformer.transformer_blocks)):
            sites |= {f"blocks.{i}.{site}": axes for site, axes in BLOCK_SITES.items()}
        return sites | FINAL_SITES | {"hook_sample": SAMPLE}

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
                "images that are not "
                f"square, so expected {c.sample_size}x{c.sample_size}."
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
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise InvalidValue(
                    f"The {name} are {got}; expected a tensor of shape [{x.shape[0]}], one for "
                    "each item."
                )
        assert y is not None
        if (
            y.device.type == "cpu"
            and len(y)
            and not (0 <= int(y.min()) and int(y.max()) <= c.num_embeds_ada_norm)
        ):
            bad = int(y.min()) if y.min() < 0 else int(y.max())
            raise InvalidValue(
                f"Class label {bad} is out of range; expected 0 to {c.num_embeds_ada_norm - 1}, "
                f"or {c.num_embeds_ada_norm} for no class."
            )
        weight = transformer.proj_out_2.weight
        if x.device != weight.device and weight.device.type != "meta":
            raise InvalidValue(
                f"The latents are on {x.device}, the model is on {weight.device}; use "
                f"x.to({str(weight.device)!r})."
            )

    def forwards(self, transformer: Any, points: Points, instrumentation: Any) -> Sequence[Forward]:
        forwards: list[Forward] = [TransformerForward(transformer, points, instrumentation)]
        for i, block in enumerate(transformer.transformer_blocks):
            mine = {site: points[f"blocks.{i}.{site}"] for site in BLOCK_SITES}
            forwards += [
                BlockForward(block, mine, None if i else points["hook_embed"]),
                AdaNormForward(block.norm1, mine),
                AttentionForward(block.attn1, mine, instrumentation, i),
                neurons(block.ff.net[0], mine),
            ]
        return [
            *forwards,
            ShiftScaleForward(transformer.proj_out_1, points),
            Tap(transformer.norm_out, after=points["ln_final.hook_normalized"]),
            Tap(transformer.proj_out_2, points["final.hook_in"], points["final.hook_out"]),
        ]

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
