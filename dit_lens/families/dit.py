"""The original DiT (Peebles & Xie 2023, arXiv 2212.09748) as diffusers' `DiTTransformer2DModel`.

Each `Forward` below computes what diffusers' own does, operation for operation, with hook points in between; the tests hold
the two equal bit for bit. Attention runs through PyTorch's fused kernel whether or not somebody reads the scores and
pattern: those are computed beside it, and only a hook that changes them switches to the explicit softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..hook_points import BackwardEditor, HookPoint
from . import register
from .base import Axes, Config, Forward

RESID, COND = ("batch", "token", "d_model"), ("batch", "d_model")
HEADS, SCORES = ("batch", "token", "head", "d_head"), ("batch", "head", "query", "key")
NEURONS = ("batch", "token", "d_mlp")

BLOCK_SITES: dict[str, Axes] = {
    "hook_resid_pre": RESID,
    "hook_cond": COND,
    "adaln.hook_shift_attn": COND,
    "adaln.hook_scale_attn": COND,
    "adaln.hook_gate_attn": COND,
    "adaln.hook_shift_mlp": COND,
    "adaln.hook_scale_mlp": COND,
    "adaln.hook_gate_mlp": COND,
    "ln1.hook_normalized": RESID,
    "attn.hook_in": RESID,
    "attn.hook_q": HEADS,
    "attn.hook_k": HEADS,
    "attn.hook_v": HEADS,
    "attn.hook_attn_scores": SCORES,
    "attn.hook_pattern": SCORES,
    "attn.hook_z": HEADS,
    "attn.hook_result": ("batch", "token", "head", "d_model"),
    "attn.hook_out": RESID,
    "hook_attn_out": RESID,
    "hook_resid_mid": RESID,
    "ln2.hook_normalized": RESID,
    "mlp.hook_in": RESID,
    "mlp.hook_pre": NEURONS,
    "mlp.hook_post": NEURONS,
    "mlp.hook_out": RESID,
    "hook_mlp_out": RESID,
    "hook_resid_post": RESID,
}
FINAL_SITES: dict[str, Axes] = {
    "final.hook_shift": COND,
    "final.hook_scale": COND,
    "ln_final.hook_normalized": RESID,
    "final.hook_in": RESID,
    "final.hook_out": ("batch", "token", "patch"),
    "hook_sample": ("batch", "channel", "height", "width"),
}


class TransformerForward(Forward):
    """The whole model: patches, blocks, last layer. `wiring.span` may ask for a part of the blocks only."""

    def __init__(self, module: Any, points: dict[str, HookPoint], wiring: Any) -> None:
        super().__init__(module)
        self.wiring = wiring
        self.embed, self.sample = points["hook_embed"], points["hook_sample"]
        self.shift, self.scale = points["final.hook_shift"], points["final.hook_scale"]
        self.normalized = points["ln_final.hook_normalized"]
        self.final_in, self.final_out = points["final.hook_in"], points["final.hook_out"]

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        if cross_attention_kwargs:
            raise ValueError(
                f"cross_attention_kwargs={cross_attention_kwargs!r} is not honoured by a hooked DiT, which has no "
                "cross-attention; pass None."
            )
        with self.wiring.forward(hidden_states, timestep, class_labels):
            start, end = self.wiring.span
            x = self.embed(self.module.pos_embed(hidden_states)) if start is None else hidden_states
            for block in self.module.transformer_blocks[start:end]:
                if torch.is_grad_enabled() and self.module.gradient_checkpointing:
                    x = self.module._gradient_checkpointing_func(
                        block, x, None, None, None, timestep, None, class_labels
                    )
                else:
                    x = block(x, timestep=timestep, class_labels=class_labels)
            output = x if end is not None else self.last_layer(x, timestep, class_labels)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def last_layer(self, x: Tensor, timestep: Tensor | None, class_labels: Tensor | None) -> Tensor:
        model = self.module
        cond = model.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(cond)).chunk(2, dim=1)
        shift, scale = self.shift(shift), self.scale(scale)
        x = self.final_in(self.normalized(model.norm_out(x)) * (1 + scale[:, None]) + shift[:, None])
        x = self.final_out(model.proj_out_2(x))
        side, p, c = int(x.shape[1] ** 0.5), model.patch_size, model.out_channels
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, side, side, p, p, c))
        return self.sample(x.reshape(-1, c, side * p, side * p))


class BlockForward(Forward):
    """One block: two gated branches added to the stream."""

    def __init__(self, module: Any, points: dict[str, HookPoint]) -> None:
        super().__init__(module)
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
        block = self.module
        x = self.resid_pre(hidden_states)
        h, gate_attn, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        x = self.resid_mid(self.attn_out(gate_attn.unsqueeze(1) * block.attn1(h)) + x)
        h = self.mlp_in(self.normalized(block.norm3(x)) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        return self.resid_post(self.mlp_out(gate_mlp.unsqueeze(1) * self.mlp_raw(block.ff(h))) + x)


class AdaNormForward(Forward):
    """adaLN-Zero: the conditioning vector, the six modulations it gives, and the first normalisation."""

    def __init__(self, module: Any, points: dict[str, HookPoint]) -> None:
        super().__init__(module)
        self.cond, self.normalized, self.attn_in = (
            points["hook_cond"],
            points["ln1.hook_normalized"],
            points["attn.hook_in"],
        )
        self.modulations = [
            points[f"adaln.hook_{part}_{branch}"] for branch in ("attn", "mlp") for part in ("shift", "scale", "gate")
        ]

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        norm = self.module
        cond = self.cond(norm.emb(timestep, class_labels, hidden_dtype=hidden_dtype))
        chunks = norm.linear(norm.silu(cond)).chunk(6, dim=1)
        shift, scale, gate, *mlp = [hook(m) for hook, m in zip(self.modulations, chunks, strict=True)]
        return self.attn_in(self.normalized(norm.norm(x)) * (1 + scale[:, None]) + shift[:, None]), gate, *mlp


class AttentionForward(Forward):
    """Multi-head self-attention."""

    def __init__(self, module: Any, points: dict[str, HookPoint]) -> None:
        super().__init__(module)
        self.q, self.k, self.v, self.z = (points[f"attn.hook_{name}"] for name in "qkvz")
        self.scores, self.pattern = points["attn.hook_attn_scores"], points["attn.hook_pattern"]
        self.result, self.out = points["attn.hook_result"], points["attn.hook_out"]

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        attn = self.module
        if type(attn.processor) is not AttnProcessor2_0:
            raise RuntimeError(
                f"The attention processor was changed to {type(attn.processor).__name__}; a hooked DiT computes "
                "attention itself, as AttnProcessor2_0 does. Put that back, or call model.remove()."
            )
        shape = (*hidden_states.shape[:2], attn.heads, -1)
        q = self.q(attn.to_q(hidden_states).view(shape)).transpose(1, 2)
        k = self.k(attn.to_k(hidden_states).view(shape)).transpose(1, 2)
        v = self.v(attn.to_v(hidden_states).view(shape)).transpose(1, 2)
        z = self.mix(q, k, v).transpose(1, 2)
        z = self.z(z)
        linear, dropout = attn.to_out
        out = linear(z.flatten(2))
        if self.result.listeners:
            weight = linear.weight.view(-1, attn.heads, z.shape[-1])  # [d_model, head, d_head]
            result = self.result(torch.einsum("bthe,dhe->bthd", z, weight))
            if self.result.changed or self.result.wants(BackwardEditor):
                out = result.sum(2) + linear.bias if linear.bias is not None else result.sum(2)
        return self.out(dropout(out))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.scores.listeners or self.pattern.listeners:
            scores = self.scores(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
            pattern = self.pattern(scores.softmax(-1))
            points = (self.scores, self.pattern)
            if any(p.listeners and p.changed or p.wants(BackwardEditor) for p in points):
                return pattern @ v
        return F.scaled_dot_product_attention(q, k, v)


class NeuronsForward(Forward):
    """The MLP's first half: `pre`, the nonlinearity, `post`."""

    def __init__(self, module: Any, points: dict[str, HookPoint]) -> None:
        super().__init__(module)
        self.pre, self.post = points["mlp.hook_pre"], points["mlp.hook_post"]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.post(self.module.gelu(self.pre(self.module.proj(hidden_states))))


class DiTFamily:
    """How dit_lens opens a `DiTTransformer2DModel`."""

    model_class = "DiTTransformer2DModel"

    def config(self, transformer: Any) -> Config:
        c = transformer.config
        return Config(
            n_layers=c.num_layers,
            d_model=c.num_attention_heads * c.attention_head_dim,
            n_heads=c.num_attention_heads,
            d_head=c.attention_head_dim,
            d_mlp=4 * c.num_attention_heads * c.attention_head_dim,
            patch_size=c.patch_size,
            sample_size=c.sample_size,
            in_channels=c.in_channels,
            out_channels=transformer.out_channels,
            n_classes=c.num_embeds_ada_norm,
        )

    def sites(self, transformer: Any) -> dict[str, Axes]:
        sites: dict[str, Axes] = {"hook_embed": RESID}
        for i in range(len(transformer.transformer_blocks)):
            sites |= {f"blocks.{i}.{site}": axes for site, axes in BLOCK_SITES.items()}
        return sites | FINAL_SITES

    def check_model(self, transformer: Any) -> None:
        for i, block in enumerate(transformer.transformer_blocks):
            if block._chunk_size is not None:
                raise ValueError(
                    f"Block {i} has chunked feed-forward switched on (chunk size {block._chunk_size}), which would run each "
                    "MLP hook once a chunk; switch it off with block.set_chunk_feed_forward(None)."
                )
            if type(block.attn1.processor) is not AttnProcessor2_0:
                raise ValueError(
                    f"Block {i} has the attention processor {type(block.attn1.processor).__name__}; dit_lens computes "
                    "attention as AttnProcessor2_0 does: block.attn1.set_processor(AttnProcessor2_0())."
                )
            if not isinstance(block.ff.net[0], GELU):
                raise ValueError(
                    f"Block {i} has the activation {type(block.ff.net[0]).__name__} "
                    f"(activation_fn={transformer.config.activation_fn!r}); expected 'gelu' or 'gelu-approximate'."
                )

    def check_input(self, transformer: Any, x: Tensor, t: Tensor | None, y: Tensor | None) -> None:
        c, p = transformer.config, transformer.config.patch_size
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise ValueError(
                f"The latents have shape {list(x.shape)}; expected [batch, {c.in_channels}, {c.sample_size}, {c.sample_size}]."
            )
        if x.shape[2] != x.shape[3]:
            raise ValueError(
                f"The latents are {x.shape[2]}x{x.shape[3]}; diffusers' DiT silently scrambles images that are not "
                f"square, so expected {c.sample_size}x{c.sample_size}."
            )
        if x.shape[2] % p:
            raise ValueError(f"The latents are {x.shape[2]} wide; expected a multiple of the patch size {p}.")
        for name, value in (("timesteps", t), ("class labels", y)):
            if not isinstance(value, Tensor) or value.ndim != 1 or value.shape[0] not in (1, x.shape[0]):
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"The {name} are {got}; expected a tensor of shape [{x.shape[0]}], one for each item.")
        assert y is not None
        if y.device.type == "cpu" and len(y) and not (0 <= int(y.min()) and int(y.max()) <= c.num_embeds_ada_norm):
            bad = int(y.min()) if y.min() < 0 else int(y.max())
            raise ValueError(
                f"Class label {bad} is out of range; expected 0 to {c.num_embeds_ada_norm - 1}, "
                f"or {c.num_embeds_ada_norm} for no class."
            )
        weight = transformer.proj_out_2.weight
        if x.device != weight.device and weight.device.type != "meta":
            raise ValueError(
                f"The latents are on {x.device}, the model is on {weight.device}; use x.to({str(weight.device)!r})."
            )

    def forwards(self, transformer: Any, points: dict[str, HookPoint], wiring: Any) -> Sequence[Forward]:
        forwards: list[Forward] = [TransformerForward(transformer, points, wiring)]
        for i, block in enumerate(transformer.transformer_blocks):
            mine = {site: points[f"blocks.{i}.{site}"] for site in BLOCK_SITES}
            forwards += [
                BlockForward(block, mine),
                AdaNormForward(block.norm1, mine),
                AttentionForward(block.attn1, mine),
                NeuronsForward(block.ff.net[0], mine),
            ]
        return forwards


register(DiTFamily())
