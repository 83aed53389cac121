"""Regions: which part of an activation an edit touches - items, heads, tokens, one frequency band,
one branch of guidance.

An edit computes a whole new activation; `Region.merge(old, new)` lets it through inside the region
and keeps the old one outside, bit for bit. Which axis is which comes from the hook point's axis
names, so `heads=` works wherever there is a head axis.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import Index
from ..errors import InvalidType, InvalidValue

if TYPE_CHECKING:
    from ..measures.bands import Bands


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
        branch: "cond", "uncond" or "skip": only this branch of guidance, of whose items `items` are
            counted.
    """

    items: Index | None = None
    heads: Index | None = None
    tokens: Index | None = None
    band: tuple[Bands, int | str] | None = None
    branch: str | None = None

    def __post_init__(self) -> None:
        for name in ("items", "heads", "tokens"):
            chosen = arguments.optional(arguments.index, name, getattr(self, name))
            if isinstance(chosen, Tensor):  # what happens to the caller's tensor later is not meant
                chosen = chosen.detach().clone()
            object.__setattr__(self, name, chosen)
        if self.band is not None:
            is_pair = isinstance(self.band, tuple) and len(self.band) == 2
            if not is_pair or not hasattr(self.band[0], "project_tokens"):
                raise arguments.refusal(
                    "band", self.band, "(bands, a number or a name)", wrong_type=True
                )
            self.band[0].number(self.band[1])
        if self.branch is not None:
            arguments.choice("branch", self.branch, ["cond", "uncond", "skip"])

    @classmethod
    def of(cls, **parts: Any) -> Region:
        """A region by keyword.

        One head may be said as `head=`. Raises TypeError for a keyword that is none, with the
        nearest.
        """
        if "head" in parts:
            if "heads" in parts:
                raise InvalidType("head= and heads= are both given; expected one of them.")
            parts["heads"] = parts.pop("head")
        for name in parts:
            if name not in cls.__dataclass_fields__:
                near = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1, cutoff=0)[0]
                raise InvalidType(
                    f"{name!r} is no part of an activation; expected 'items', 'heads', 'tokens', "
                    f"'band' or 'branch' (nearest: {near!r})."
                )
        return cls(**parts)

    @property
    def everything(self) -> bool:
        return all(v is None for v in vars(self).values())

    def check(self, name: str, axes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
        """Raise ValueError if the hook point has no such axis, or no such place on it where
        `sizes` says how long it is.
        """
        wanted = {"head": self.heads, "token": self.tokens, "frequency band": self.band}
        for axis, value in wanted.items():
            has = axis in axes or (
                axis != "head" and ("token" in axes or (axis == "token" and "query" in axes))
            )
            if value is not None and not has:
                raise InvalidValue(f"{name!r} has no {axis} axis; its axes are {', '.join(axes)}.")
        token = "token" if "token" in axes else "query"
        for field, axis in (("items", "batch"), ("heads", "head"), ("tokens", token)):
            value = getattr(self, field)
            if value is None or axis not in sizes:
                continue
            try:
                arguments.positions(field, value, sizes[axis], axis=axis)
            except InvalidValue as error:
                if field != "tokens":
                    raise
                raise InvalidValue(
                    f"{str(error).removesuffix('.')}, the tokens of latents of the model's own "
                    "size; for another one HookedDiT(..., size=...)."
                ) from None

    def of_branch(self, name: str, branch: str, items: int) -> tuple[Region, slice]:
        """The region among the items of its branch, and which of a call's items these are.

        Args:
            name: of the hook point, for the error.
            branch: of the call, as `HookPoint.branch` has it.
            items: of the call.

        Raises:
            InvalidValue: where it is not known of which branch the items are.
        """
        if self.branch is None:
            return self, slice(None)
        if not branch:
            raise InvalidValue(
                f"branch={self.branch!r} of {name!r}: it is not known of which branch of guidance "
                "the items of this call are; expected a run with guidance, by a pipeline of "
                "diffusers' or dit_lens.sample, or items=."
            )
        words, inner = branch.split(" | "), replace(self, branch=None)
        if self.branch not in words:
            return inner, slice(0)
        size = items // len(words)
        first = words.index(self.branch) * size
        return inner, slice(first, first + size)

    def merge(self, old: Tensor, new: Tensor, axes: tuple[str, ...]) -> Tensor:
        """`new` inside the region, `old` outside; both of the hook point's shape, and of the
        region's branch alone.
        """
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
        chosen = {
            "items": ("batch", self.items),
            "heads": ("head", self.heads),
            "tokens": (token_axis, self.tokens),
        }
        for field, (axis, value) in chosen.items():
            if value is not None:
                dim = axes.index(axis)
                places = arguments.positions(field, value, old.shape[dim], axis=axis)
                mask = torch.zeros(old.shape[dim], dtype=torch.bool, device=old.device)
                mask[places.to(old.device)] = True
                inside = inside & mask.view([-1 if d == dim else 1 for d in range(old.ndim)])
        return torch.where(inside, new, old)
