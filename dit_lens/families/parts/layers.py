"""Parts that many families share beside attention: the halves of an MLP, first and last
normalisations, and what all refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from torch import Tensor

from ...errors import InvalidState, InvalidValue
from ...hooks.points import HookPoint
from ..base import Forward, Points
from .sites import adaln_sites


class NeuronsForward(Forward):
    """The first half of diffusers' FeedForward (`ff.net[0]`): `pre`, the nonlinearity, `post`."""

    def __init__(self, module: Any, points: Points, prefix: str = "mlp.") -> None:
        super().__init__(module)
        self.pre, self.post = points[f"{prefix}hook_pre"], points[f"{prefix}hook_post"]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.post(self.module.gelu(self.pre(self.module.proj(hidden_states))))


class GatedNeuronsForward(Forward):
    """The same for GEGLU and SwiGLU: `post = pre_linear * act(pre)`."""

    def __init__(self, module: Any, points: Points, prefix: str = "mlp.") -> None:
        super().__init__(module)
        self.pre, self.post = points[f"{prefix}hook_pre"], points[f"{prefix}hook_post"]
        self.linear = points[f"{prefix}hook_pre_linear"]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        linear, pre = self.module.proj(hidden_states).chunk(2, dim=-1)
        act = self.module.gelu if isinstance(self.module, GEGLU) else self.module.activation
        pre, linear = self.pre(pre), self.linear(linear)
        return self.post(linear * act(pre))


class SimpleNeuronsForward(Forward):
    """The same for diffusers' LinearActivation: `post = act(pre)`."""

    def __init__(self, module: Any, points: Points, prefix: str = "mlp.") -> None:
        super().__init__(module)
        self.pre, self.post = points[f"{prefix}hook_pre"], points[f"{prefix}hook_post"]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.post(self.module.activation(self.pre(self.module.proj(hidden_states))))


def neurons(module: Any, points: Points, prefix: str = "mlp.") -> Forward:
    """The forward for the first half of a diffusers FeedForward, by its kind.

    Raises ValueError for one without such halves.
    """
    for kinds, forward in (
        ((GEGLU, SwiGLU), GatedNeuronsForward),
        ((GELU,), NeuronsForward),
        ((LinearActivation,), SimpleNeuronsForward),
    ):
        if isinstance(module, kinds) and not isinstance(module, ApproximateGELU):
            return forward(module, points, prefix)
    raise InvalidValue(
        f"The MLP's activation is {type(module).__name__}, which has no neurons before and after "
        "it that could be hooked; "
        "expected GELU, GEGLU, SwiGLU or LinearActivation."
    )


class AdaNormForward(Forward):
    """diffusers' AdaLayerNormZero: the six modulations that the conditioning vector gives, and the
    first normalisation.

    Where the norm embeds time and class for itself, as in DiT, it also is where the conditioning
    vector appears.
    """

    def __init__(self, module: Any, points: Points, prefix: str = "") -> None:
        super().__init__(module)
        self.cond = points["hook_cond"] if module.emb is not None else None
        self.normalized, self.attn_in = (
            points[f"{prefix}ln1.hook_normalized"],
            points[f"{prefix}attn.hook_in"],
        )
        self.modulations = [points[name] for name in adaln_sites(prefix)]

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        norm = self.module
        if self.cond is not None:
            emb = self.cond(norm.emb(timestep, class_labels, hidden_dtype=hidden_dtype))
        chunks = norm.linear(norm.silu(emb)).chunk(6, dim=1)
        shift, scale, gate, *mlp = [
            hook(m) for hook, m in zip(self.modulations, chunks, strict=True)
        ]
        return (
            self.attn_in(self.normalized(norm.norm(x)) * (1 + scale[:, None]) + shift[:, None]),
            gate,
            *mlp,
        )


class FinalNormForward(Forward):
    """diffusers' AdaLayerNormContinuous before the last projection: shift, scale, and the
    normalised stream.
    """

    def __init__(self, module: Any, points: Points) -> None:
        super().__init__(module)
        self.shift, self.scale = points["final.hook_shift"], points["final.hook_scale"]
        self.normalized = points["ln_final.hook_normalized"]

    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        norm = self.module
        scale, shift = norm.linear(norm.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        shift, scale = self.shift(shift), self.scale(scale)
        return self.normalized(norm.norm(x)) * (1 + scale)[:, None, :] + shift[:, None, :]


def refuse_chunks(blocks: Any) -> None:
    """Raise ValueError where chunked feed-forward is on, which would run each MLP hook once a
    chunk.
    """
    for i, block in enumerate(blocks):
        if getattr(block, "_chunk_size", None) is not None:
            raise InvalidValue(
                f"Block {i} has chunked feed-forward switched on (chunk size {block._chunk_size}), "
                "which would run each "
                "MLP hook once a chunk; switch it off with block.set_chunk_feed_forward(None)."
            )


def refuse_processors(blocks: Any, **expected: type) -> None:
    """Raise ValueError where an attention (`attn=Processor`) has another processor than the one
    whose arithmetic is repeated here.
    """
    for i, block in enumerate(blocks):
        for name, wanted in expected.items():
            attn = getattr(block, name, None)
            if attn is not None and type(attn.processor) is not wanted:
                raise InvalidValue(
                    f"Block {i} has the attention processor {type(attn.processor).__name__}; "
                    "dit_lens computes attention as "
                    f"{wanted.__name__} does: block.{name}.set_processor({wanted.__name__}())."
                )


def check_processor(attn: Any, wanted: type) -> None:
    """Raise RuntimeError if the processor was changed after the model was opened."""
    if type(attn.processor) is not wanted:
        raise InvalidState(
            f"The attention processor was changed to {type(attn.processor).__name__}; a hooked DiT "
            "computes "
            f"attention itself, as {wanted.__name__} does. Put that back, or call model.remove()."
        )


class LastTable:
    """A conditioning vector on its way to the last layer's table of shift and scale, in place of
    the tensor where somebody listens.

    diffusers adds the two in the midst of the transformer's own forward, where no module is called.
    PyTorch asks the summand (`__torch_function__`), and so the sums, [..., 2, d_model], pass
    through their hook points there.
    """

    def __init__(self, vector: Tensor, points: tuple[HookPoint, HookPoint]) -> None:
        self.vector, self.points = vector, points
        self.ndim, self.device = vector.ndim, vector.device

    @staticmethod
    def where_heard(vector: Tensor, points: tuple[HookPoint, HookPoint]) -> Any:
        """This in place of the vector, if somebody listens; otherwise the vector."""
        return LastTable(vector, points) if any(point.listeners for point in points) else vector

    def __getitem__(self, index: Any) -> LastTable:
        return LastTable(self.vector[index], self.points)

    def to(self, *args: Any, **kwargs: Any) -> LastTable:
        return LastTable(self.vector.to(*args, **kwargs), self.points)

    def unsqueeze(self, dim: int) -> LastTable:
        return LastTable(self.vector.unsqueeze(dim), self.points)

    @classmethod
    def __torch_function__(cls, add: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        table, own = args
        sums = add(table, own.vector).unbind(-2)
        return torch.stack([point(x) for point, x in zip(own.points, sums, strict=True)], dim=-2)
