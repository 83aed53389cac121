"""Parts that many families share besides attention: the halves of an MLP, first and last
normalisations, and what all refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from ...arguments import shown
from ...errors import InvalidState, InvalidValue
from ...hooks.points import HookPoint
from ..forwards import Forward, Points
from .joint import AnyPoints
from .sites import adaln_sites


class NeuronsForward(Forward):
    """The first half of diffusers' FeedForward (`ff.net[0]`): `pre`, the nonlinearity, `post`."""

    def __init__(self, module: Any, points: AnyPoints, prefix: str = "mlp.") -> None:
        super().__init__(module)
        self.pre, self.post = points[f"{prefix}hook_pre"], points[f"{prefix}hook_post"]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.post(self.module.gelu(self.pre(self.module.proj(hidden_states))))


class GatedNeuronsForward(Forward):
    """The same for GEGLU and SwiGLU: `post = pre_linear * act(pre)`."""

    def __init__(self, module: Any, points: AnyPoints, prefix: str = "mlp.") -> None:
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

    def __init__(self, module: Any, points: AnyPoints, prefix: str = "mlp.") -> None:
        super().__init__(module)
        self.pre, self.post = points[f"{prefix}hook_pre"], points[f"{prefix}hook_post"]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.post(self.module.activation(self.pre(self.module.proj(hidden_states))))


def neurons(module: Any, points: AnyPoints, prefix: str = "mlp.") -> Forward:
    """The forward for the first half of a diffusers FeedForward, by its kind.

    Args:
        module: the half, `ff.net[0]`.
        points: the block's hook points.
        prefix: the MLP's prefix.

    Raises:
        InvalidValue: for one without such halves.

        forwards.append(neurons(block.ff.net[0], points))
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
        "it that could be hooked; expected GELU, GEGLU, SwiGLU or LinearActivation."
    )


def gated(feed_forward: Any) -> bool:
    """Whether the neurons of a diffusers FeedForward are a product of two projections.

    Args:
        feed_forward: the MLP.

        sites |= mlp_sites(gated=gated(block.ff))
    """
    return isinstance(feed_forward.net[0], (GEGLU, SwiGLU))


class AdaNormForward(Forward):
    """diffusers' AdaLayerNormZero: the six modulations that the conditioning vector gives, and the
    first normalisation.

    Where the norm embeds time and class for itself, as in DiT, it also is where the conditioning
    vector appears.

    Args:
        module: the norm.
        points: the block's hook points.
        prefix: the stream's prefix.

        AdaNormForward(block.norm1, points)
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


class ContinuousNormForward(Forward):
    """diffusers' AdaLayerNormContinuous: shift, scale, and the normalised stream.

    Args:
        module: the norm.
        shift: the hook point of the shift.
        scale: the hook point of the scale.
        normalized: the hook point of the normalised stream.

        ContinuousNormForward(block.norm, points["shift"], points["scale"], points["normalized"])
    """

    def __init__(
        self, module: Any, shift: HookPoint, scale: HookPoint, normalized: HookPoint
    ) -> None:
        super().__init__(module)
        self.shift, self.scale, self.normalized = shift, scale, normalized

    def __call__(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        norm = self.module
        scale, shift = norm.linear(norm.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        shift, scale = self.shift(shift), self.scale(scale)
        return self.normalized(norm.norm(x)) * (1 + scale)[:, None, :] + shift[:, None, :]


def final_norm(module: Any, points: Points) -> Forward:
    """The forward of an AdaLayerNormContinuous before the last projection.

    Args:
        module: the norm.
        points: all hook points, by full name.

        forwards.append(final_norm(transformer.norm_out, points))
    """
    names = ("final.hook_shift", "final.hook_scale", "ln_final.hook_normalized")
    return ContinuousNormForward(module, *(points[name] for name in names))


def refuse_chunks(blocks: Any) -> None:
    """Refuse chunked feed-forward, which would run each MLP hook once a chunk.

    Args:
        blocks: the blocks.

    Raises:
        InvalidValue: for the first block that has it.

        refuse_chunks(transformer.transformer_blocks)
    """
    for i, block in enumerate(blocks):
        chunk = getattr(block, "_chunk_size", None)
        if chunk is not None:
            raise InvalidValue(
                f"Block {i} has chunked feed-forward switched on (chunk size {chunk}), which would "
                "run each MLP hook once a chunk; switch it off with "
                "block.set_chunk_feed_forward(None)."
            )


def refuse_processors(blocks: Any, **expected: type) -> None:
    """Refuse attention processors other than those whose arithmetic is repeated here.

    Args:
        blocks: the blocks.
        expected: the processor's class by the attention's name in the block.

    Raises:
        InvalidValue: for the first attention that has another one.

        refuse_processors(transformer.transformer_blocks, attn1=AttnProcessor2_0)
    """
    for i, block in enumerate(blocks):
        for name, wanted in expected.items():
            attn = getattr(block, name, None)
            if attn is not None and type(attn.processor) is not wanted:
                raise InvalidValue(
                    f"Block {i} has the attention processor {type(attn.processor).__name__}; "
                    f"dit_lens computes attention as {wanted.__name__} does: "
                    f"block.{name}.set_processor({wanted.__name__}())."
                )
            if attn is not None and (setting := _unread(attn, wanted)):
                raise InvalidValue(
                    f"Block {i} has {setting} in {name}, which dit_lens does not compute with; "
                    "expected diffusers' default."
                )


def check_processor(attn: Any, wanted: type) -> None:
    """Refuse a processor, or a setting that it reads, that was changed after the model was opened.

    Args:
        attn: the attention.
        wanted: the class that its processor had.

    Raises:
        InvalidState: if it has another now, or another setting.

        check_processor(self.module, AttnProcessor2_0)
    """
    if type(attn.processor) is not wanted:
        raise InvalidState(
            f"The attention processor was changed to {type(attn.processor).__name__}; a hooked DiT "
            f"computes attention itself, as {wanted.__name__} does. Put that back, or call "
            "model.remove()."
        )
    if setting := _unread(attn, wanted):
        raise InvalidState(
            f"The attention was given {setting}; a hooked DiT computes attention itself, without "
            "it. Put diffusers' default back, or call model.remove()."
        )


def _unread(attn: Any, wanted: type) -> str | None:
    """A setting of diffusers' Attention that its processors read and the forwards here do not, in
    words; None where all are at their defaults.
    """
    names = ["group_norm", "spatial_norm", "norm_cross", "residual_connection"]
    names += ["norm_q", "norm_k"] if wanted is AttnProcessor2_0 else []
    found = {name: getattr(attn, name, None) for name in names}
    scale = getattr(attn, "rescale_output_factor", 1.0)
    changed = [f"{name}={shown(value)}" for name, value in found.items() if value]
    changed += [] if scale == 1.0 else [f"rescale_output_factor={shown(scale)}"]
    return changed[0] if changed else None


class LastTable:
    """The conditioning vector on its way to the last layer's table of shift and scale, with hook
    points on their sum.

    diffusers adds vector and table in the midst of the transformer's own forward, where no module
    is called. PyTorch lets a summand that is no tensor do the adding (`__torch_function__`), and so
    the sums, [..., 2, d_model], pass through their hook points there.

    Args:
        vector: the conditioning vector.
        points: the hook points of shift and scale.
    """

    def __init__(self, vector: Tensor, points: tuple[HookPoint, HookPoint]) -> None:
        self.vector, self.points = vector, points
        self.ndim, self.device = vector.ndim, vector.device

    @staticmethod
    def where_heard(vector: Tensor, points: tuple[HookPoint, HookPoint]) -> Any:
        """A `LastTable` if somebody listens; otherwise the vector itself.

        Args:
            vector: the conditioning vector.
            points: the hook points of shift and scale.
        """
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


class LastTableForward(Forward):
    """A module whose first or second output is the conditioning vector that diffusers adds to the
    last layer's table.

    Args:
        module: the module.
        points: all hook points, by full name.
        index: which of its outputs it is.

        LastTableForward(transformer.adaln_single, points, 1)
    """

    repeats = False

    def __init__(self, module: Any, points: Points, index: int) -> None:
        super().__init__(module)
        self.last, self.index = (points["final.hook_shift"], points["final.hook_scale"]), index

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        outputs = list(self.own(*args, **kwargs))
        outputs[self.index] = LastTable.where_heard(outputs[self.index], self.last)
        return tuple(outputs)
