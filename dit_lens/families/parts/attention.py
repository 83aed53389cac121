"""Attention with hook points in it, and streams that are joined to attend.

Attention runs through the model's own fused kernel whether or not somebody reads the scores and
pattern: those are computed beside it, and only a hook that changes them switches to the explicit
softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...hooks.points import BackwardEditor, HookPoint, laid_out
from ..base import Points

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention; q, k, v [batch, head, token, d_head]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dispatched(processor: Any) -> Kernel:
    """The kernel of diffusers' newer processors, which lets a backend be chosen; [batch, head,
    token, d_head] here as everywhere.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        z = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        return z.transpose(1, 2)

    return kernel


class Attend:
    """From queries, keys and values to what each head reads, with hook points on the scores and the
    pattern.

    `parts` are the streams whose tokens lie one after the other along the queries, each with its
    own two hook points: for plain self-attention one, for joint attention the image's and the
    text's. Keys are those of all streams, in the same order. Twins coupled through attention act
    here (see `dit_lens.twinning.coupling`).
    """

    def __init__(
        self,
        points: Points,
        instrumentation: Any,
        layer: int | None,
        prefixes: tuple[str, ...] = ("attn.",),
    ) -> None:
        self.points = [
            (points[f"{p}hook_attn_scores"], points[f"{p}hook_pattern"]) for p in prefixes
        ]
        self.instrumentation, self.layer = instrumentation, layer

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        kernel: Kernel = sdpa,
        lengths: tuple[int, ...] | None = None,
        joint: Joint | None = None,
    ) -> Tensor:
        """z [batch, head, query, d_head] of q [batch, head, query, d_head], k and v [batch, head,
        key, d_head].

        `mask` is boolean (True: attend) or added to the scores, as in PyTorch. `lengths`: the
        parts' numbers of queries; or `joint`, where they lie among them.
        """
        z = (
            self.explicit(q, k, v, mask, lengths, joint)
            if any(p.listeners for both in self.points for p in both)
            else None
        )
        z = kernel(q, k, v, mask) if z is None else z
        coupling = self.instrumentation.couplings.get(self.layer)
        return z if coupling is None else coupling(z, q, k, v, mask, kernel)

    def explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        lengths: tuple[int, ...] | None,
        joint: Joint | None,
    ) -> Tensor | None:
        """Scores and pattern for those who listen; and z by the explicit softmax, if one of them
        changed something.
        """
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, float("-inf"))
                if mask.dtype == torch.bool
                else scores + mask
            )
        scores = self.hooked(scores, 0, lengths, joint)
        pattern = self.hooked(scores.softmax(-1), 1, lengths, joint)
        points = [p for both in self.points for p in both]
        if any((p.listeners and p.changed) or p.wants(BackwardEditor) for p in points):
            return pattern @ v
        return None

    def hooked(
        self, x: Tensor, which: int, lengths: tuple[int, ...] | None, joint: Joint | None
    ) -> Tensor:
        points = [both[which] for both in self.points]
        if joint is not None:
            return joint.hook(points[0], points[1], x, dim=2)
        if len(points) == 1 and lengths is None:
            return points[0](x)
        if not any(p.listeners for p in points):
            return x
        assert lengths is not None
        parts = list(
            x.split(lengths, dim=2)
        )  # queries of a stream without points (whose output is thrown away) come last
        return torch.cat(
            [*(p(part) for p, part in zip(points, parts, strict=False)), *parts[len(points) :]],
            dim=2,
        )


class HeadsOut:
    """From what each head reads to the attention's output, with TransformerLens's per-head results
    for those who listen.
    """

    def __init__(self, points: Points, prefix: str = "attn.") -> None:
        self.z, self.result = points[f"{prefix}hook_z"], points[f"{prefix}hook_result"]
        self.out = points[f"{prefix}hook_out"]

    def __call__(self, z: Tensor, linear: Any, dropout: Any = None) -> Tensor:
        """z [batch, token, head, d_head] through the output projection, [batch, token, d_model]."""
        z = self.z(z)
        out = linear(z.flatten(2))
        if self.result.listeners:
            result = self.result(per_head(z, linear))
            if self.result.changed or self.result.wants(BackwardEditor):
                out = result.sum(2) + linear.bias if linear.bias is not None else result.sum(2)
        return self.out(out if dropout is None else dropout(out))


def per_head(z: Tensor, linear: Any) -> Tensor:
    """Each head's own part of the output projection, without the bias: [batch, token, head,
    d_model].
    """
    heads, d_head = z.shape[2:]
    if type(linear) is torch.nn.Linear:
        return torch.einsum("bthe,dhe->bthd", z, linear.weight.view(-1, heads, d_head))
    alone = torch.einsum(
        "bthe,hg->bthge", z, torch.eye(heads, dtype=z.dtype, device=z.device)
    )  # an adapter adds to the weight
    nothing = linear(torch.zeros_like(z[:1, :1].flatten(2)))
    return linear(alone.flatten(3)) - nothing[:, :, None]


class Joint:
    """Where image and text tokens lie in a joint sequence [batch, token, ...]: to take them apart
    for hook points and put them back.

    `image`, `text` are [batch, n] positions, or slices where all items are alike. What is in
    neither keeps its value.
    """

    def __init__(self, image: slice | Tensor, text: slice | Tensor) -> None:
        self.image, self.text = image, text

    def take(self, x: Tensor, at: slice | Tensor, dim: int = 1) -> Tensor:
        if isinstance(at, slice):
            return x.movedim(dim, 1)[:, at].movedim(1, dim)
        moved = x.movedim(dim, 1)
        return moved[torch.arange(len(x), device=x.device)[:, None], at.to(x.device)].movedim(
            1, dim
        )

    def hook(
        self, image_point: HookPoint, text_point: HookPoint, x: Tensor, dim: int = 1
    ) -> Tensor:
        """The joint tensor after both hook points; itself where nobody listens or changes anything."""
        if not (image_point.listeners or text_point.listeners):
            return x
        image, text = self.take(x, self.image, dim), self.take(x, self.text, dim)
        new_image, new_text = image_point(image), text_point(text)
        if new_image is image and new_text is text:
            return x
        joined = x.clone()
        if new_image is not image:
            self.put(joined, self.image, new_image, dim)
        if new_text is not text:
            self.put(joined, self.text, new_text, dim)
        if (image_point.changed and image_point.listeners) or (
            text_point.changed and text_point.listeners
        ):
            return joined
        return laid_out(joined, x)

    def put(self, x: Tensor, at: slice | Tensor, value: Tensor, dim: int = 1) -> None:
        """Write one stream's tokens into the joint tensor."""
        moved, value = x.movedim(dim, 1), value.movedim(dim, 1)
        if isinstance(at, slice):
            moved[:, at] = value
        else:
            moved[torch.arange(len(x), device=x.device)[:, None], at.to(x.device)] = value
