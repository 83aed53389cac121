"""Attention with hook points in it.

Attention runs through the model's own fused kernel whether or not somebody reads the scores and
pattern: those are computed in addition, and only a hook that changes them switches to the explicit
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...hooks.passes import Pass
from .joint import AnyPoints

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention.

    Args:
        q: queries [batch, head, query, d_head].
        k: keys [batch, head, key, d_head].
        v: values [batch, head, key, d_head].
        mask: boolean (True: attend) or added to the scores.

    >>> q = torch.ones(1, 2, 4, 8)
    >>> sdpa(q, q, q).shape
    torch.Size([1, 2, 4, 8])
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dispatched(processor: Any) -> Kernel:
    """The kernel of diffusers' newer processors, which lets a backend be chosen; called as `sdpa`.

    Args:
        processor: the attention's processor.

        z = self.attend(q, k, v, mask, dispatched(attn.processor))
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        z = dispatch_attention_fn(
            *(part.transpose(1, 2) for part in (q, k, v)),
            attn_mask=mask,
            # where diffusers' processors themselves keep the user's choice
            backend=processor._attention_backend,  # noqa: SLF001
            parallel_config=processor._parallel_config,  # noqa: SLF001
        )
        return z.transpose(1, 2)

    return kernel


class Attend:
    """From queries, keys and values to what each head reads, with hook points on the scores and the
    pattern.

    Where text and image attend together, the points are `JointPoint`s on the joint queries; keys
    are those of both, in the model's order. Attention without scores (linear attention) has no such
    points. Twins coupled through attention act here (see `dit_lens.twinning.coupling`).

    Args:
        points: the block's hook points.
        current_pass: the pass, which says how twins are coupled.
        layer: the block's number; None where twins are never coupled.
        prefix: the attention's prefix.

        self.attend = Attend(points, current_pass, layer)
        z = self.attend(q, k, v).transpose(1, 2)
    """

    def __init__(
        self, points: AnyPoints, current_pass: Pass, layer: int | None, prefix: str = "attn."
    ) -> None:
        names = (f"{prefix}hook_attn_scores", f"{prefix}hook_pattern")
        self.points = [points[name] for name in names if name in points]
        self.current_pass, self.layer = current_pass, layer

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        kernel: Kernel = sdpa,
    ) -> Tensor:
        """What each head reads, z [batch, head, query, d_head].

        Args:
            q: queries [batch, head, query, d_head].
            k: keys [batch, head, key, d_head].
            v: values [batch, head, key, d_head].
            mask: boolean (True: attend) or added to the scores, as in PyTorch.
            kernel: the model's own way to compute attention.
        """
        heard = any(point.listeners for point in self.points)
        z = self._explicit(q, k, v, mask) if heard else None
        z = kernel(q, k, v, mask) if z is None else z
        if self.layer is None or self.layer not in self.current_pass.couplings:
            return z
        return self.current_pass.couplings[self.layer](z, q, k, v, mask, kernel)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """Scores and pattern for those who listen; and z by the explicit softmax, if one of them
        changed something.
        """
        on_scores, on_pattern = self.points
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        pattern = on_pattern(on_scores(scores).softmax(-1))
        return pattern @ v if on_scores.edited or on_pattern.edited else None


class HeadsOut:
    """From what each head reads to the attention's output, with TransformerLens's per-head results
    for those who listen.

    Args:
        points: the block's hook points.
        prefix: the attention's prefix.

        self.heads_out = HeadsOut(points)
        out = self.heads_out(z, *attn.to_out)
    """

    def __init__(self, points: AnyPoints, prefix: str = "attn.") -> None:
        self.z, self.result = points[f"{prefix}hook_z"], points[f"{prefix}hook_result"]
        self.out = points[f"{prefix}hook_out"]

    def __call__(self, z: Tensor, linear: Any, dropout: Any = None) -> Tensor:
        """The attention's output [batch, token, d_model].

        Args:
            z: what each head reads [batch, token, head, d_head].
            linear: the output projection.
            dropout: what follows it, if anything.
        """
        z = self.z(z)
        out = linear(z.flatten(2))
        if self.result.listeners:
            result = self.result(per_head(z, linear))
            if self.result.edited:
                out = result.sum(2) + linear.bias if linear.bias is not None else result.sum(2)
        return self.out(out if dropout is None else dropout(out))


def per_head(z: Tensor, linear: Any) -> Tensor:
    """Each head's own part of the output projection, without the bias: [batch, token, head,
    d_model].

    Args:
        z: what each head reads [batch, token, head, d_head].
        linear: the output projection, perhaps with an adapter on it.
    """
    heads, d_head = z.shape[2:]
    if type(linear) is torch.nn.Linear:
        return torch.einsum("bthe,dhe->bthd", z, linear.weight.view(-1, heads, d_head))
    # an adapter adds to the weight: project each head alone, the others zero
    eye = torch.eye(heads, dtype=z.dtype, device=z.device)
    alone = torch.einsum("bthe,hg->bthge", z, eye)
    nothing = linear(torch.zeros_like(z[:1, :1].flatten(2)))
    return linear(alone.flatten(3)) - nothing[:, :, None]
