"""Regions: which part of an activation an edit touches - items, heads, tokens, one frequency band.

An edit computes a whole new activation; `Region.merge(old, new)` lets it through inside the region
and keeps the old one outside, bit for bit. Which axis is which comes from the hook point's axis
names, so `heads=` works wherever there is a head axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidValue

if TYPE_CHECKING:
    from ..measures.bands import Bands

Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True)
class Region:
    """Part of an activation; what is None is not restricted.

    Attributes:
        items: batch items.
        heads: attention heads.
        tokens: token indices, or a boolean mask over the grid, [token] or [height, width] (queries,
            for scores and patterns).
        band: `(bands, b)`: only band b, a number or a name, of a `Bands` partition of the token
            grid.
    """

    items: Index | None = None
    heads: Index | None = None
    tokens: Index | None = None
    band: tuple[Bands, int | str] | None = None

    def __post_init__(self) -> None:
        for part in ("items", "heads", "tokens"):
            index = getattr(self, part)
            if isinstance(index, Tensor):  # what happens to the caller's tensor later is not meant
                object.__setattr__(self, part, index.detach().clone())

    @property
    def everything(self) -> bool:
        return all(v is None for v in (self.items, self.heads, self.tokens, self.band))

    def check(self, name: str, axes: tuple[str, ...]) -> None:
        """Raise ValueError if the hook point has no such axis."""
        wanted = {"head": self.heads, "token": self.tokens, "frequency band": self.band}
        for axis, value in wanted.items():
            has = axis in axes or (
                axis != "head" and ("token" in axes or (axis == "token" and "query" in axes))
            )
            if value is not None and not has:
                raise InvalidValue(f"{name!r} has no {axis} axis; its axes are {', '.join(axes)}.")

    def merge(self, old: Tensor, new: Tensor, axes: tuple[str, ...]) -> Tensor:
        """`new` inside the region, `old` outside; both of the hook point's shape."""
        if self.everything:
            return new
        if self.band is not None:
            bands, b = self.band
            # heads between tokens and channels: [b, token, head, d_head]
            if axes.index("token") != old.ndim - 2:
                shape = old.shape
                flat = bands.project_tokens((new - old).flatten(2), b)
                new = old + flat.view(shape)
            else:
                new = old + bands.project_tokens(new - old, b)
        inside = torch.ones((), dtype=torch.bool, device=old.device)
        token_axis = "token" if "token" in axes else "query"
        for axis, index in (("batch", self.items), ("head", self.heads), (token_axis, self.tokens)):
            if index is not None:
                inside = inside & _mask(old, axes.index(axis), index, axis)
        return torch.where(inside, new, old)


def _mask(x: Tensor, dim: int, index: Any, axis: str) -> Tensor:
    size = x.shape[dim]
    mask = torch.zeros(size, dtype=torch.bool, device=x.device)
    where = (
        torch.as_tensor(index).flatten().to(x.device)
        if not isinstance(index, (int, slice))
        else index
    )
    if isinstance(where, Tensor) and where.dtype == torch.bool and len(where) != size:
        raise InvalidValue(f"The {axis} mask has {len(where)} entries; expected {size}.")
    try:
        mask[where] = True
    except IndexError:
        raise InvalidValue(
            f"{axis} index {index!r} is out of range; expected 0 to {size - 1}."
        ) from None
    return mask.view([-1 if d == dim else 1 for d in range(x.ndim)])
