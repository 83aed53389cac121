"""The forwards of DiT's, SiT's and U-ViT's blocks, attention and last layer, with hook points
inside; the papers stand in `dit_lens.families.layouts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks.passes import Pass
from .forwards import BlockForward, Forward, Points
from .parts.attention import Attend, HeadsOut, Kernel, sdpa
from .parts.joint import AnyPoints


def scaled_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out, its queries scaled before they meet the keys."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def scaled_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention written out, its scores scaled."""
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


KERNELS: tuple[Kernel, ...] = (sdpa, scaled_queries, scaled_scores)
"""The ways in which such models compute attention; which one a module takes is tried."""


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: a normalised stream [batch, token, d_model], scaled and shifted [batch, d_model]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaBlockForward(BlockForward):
    """DiT's block: the conditioning vector gives shift, scale and gate of attention and MLP."""

    def __call__(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        block, hook = self.module, self.points
        x = entered(self, x, skip)

        chunks = block.adaLN_modulation(hook["hook_cond"](c)).chunk(6, dim=1)
        shift, scale, gate, *mlp = (
            hook[f"adaln.hook_{name}"](chunk)
            for name, chunk in zip(MODULATIONS, chunks, strict=True)
        )
        h = hook["ln1.hook_normalized"](block.norm1(x))
        out = block.attn(hook["attn.hook_in"](modulated(h, shift, scale)))
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](gate.unsqueeze(1) * out))

        shift, scale, gate = mlp
        h = hook["ln2.hook_normalized"](block.norm2(x))
        out = hook["mlp.hook_out"](block.mlp(hook["mlp.hook_in"](modulated(h, shift, scale))))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](gate.unsqueeze(1) * out))


MODULATIONS = [f"{what}_{sub}" for sub in ("attn", "mlp") for what in ("shift", "scale", "gate")]


class PlainBlockForward(BlockForward):
    """U-ViT's block: a transformer's, with nothing but the stream."""

    points: Any

    def __call__(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        block, hook = self.module, self.points
        x = entered(self, x, skip)
        out = block.attn(hook["attn.hook_in"](hook["ln1.hook_normalized"](block.norm1(x))))
        x = hook["hook_resid_mid"](x + hook["hook_attn_out"](out))
        h = hook["mlp.hook_in"](hook["ln2.hook_normalized"](block.norm2(x)))
        out = hook["mlp.hook_out"](block.mlp(h))
        return hook["hook_resid_post"](x + hook["hook_mlp_out"](out))


def entered(forward: BlockForward, x: Tensor, skip: Tensor | None) -> Tensor:
    """The stream as it enters a block, merged with a skipped one where the block is given one."""
    hook, merge = forward.points, skip_of(forward.module)
    embed = hook.get("hook_embed")
    x = x if embed is None else embed(x)
    if merge is not None:
        assert skip is not None
        x = merged(merge, x, hook["hook_skip_in"](skip))
    return hook["hook_resid_pre"](x)


def merged(merge: Any, x: Tensor, skip: Tensor) -> Tensor:
    """The stream of a block that is given a skipped one."""
    stream: Tensor = merge(torch.cat([x, skip], dim=-1))
    return stream


def skip_of(block: Any) -> Any:
    """What merges a block's stream with a skipped one; None where it is given none."""
    return getattr(block, "skip_linear", None)


class AttentionForward(Forward):
    """Multi-head self-attention, its queries, keys and values in one projection.

    Args:
        module: the attention.
        points: its block's hook points.
        current_pass: the pass.
        layer: the block's number.
        kernel: how it computes.
    """

    def __init__(
        self, module: Any, points: AnyPoints, current_pass: Pass, layer: int, kernel: Kernel
    ) -> None:
        super().__init__(module)
        self.qkv = [points[f"attn.hook_{name}"] for name in "qkv"]
        self.attend, self.heads_out = Attend(points, current_pass, layer), HeadsOut(points)
        self.kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        attn = self.module
        batch, tokens, _ = x.shape
        parts = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        q, k, v = (
            hook(part.transpose(1, 2)).transpose(1, 2)
            for hook, part in zip(self.qkv, (q, k, v), strict=True)
        )
        z = self.attend(q, k, v, kernel=self.kernel).transpose(1, 2)
        return self.heads_out(z, attn.proj, getattr(attn, "proj_drop", None))


class LastLayerForward(Forward):
    """DiT's last layer."""

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.points = points

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        last, hook = self.module, self.points
        shift, scale = last.adaLN_modulation(c).chunk(2, dim=1)
        shift, scale = hook["final.hook_shift"](shift), hook["final.hook_scale"](scale)
        h = modulated(hook["ln_final.hook_normalized"](last.norm_final(x)), shift, scale)
        return hook["final.hook_out"](last.linear(hook["final.hook_in"](h)))
