"""What a family provides: sizes, names, and forwards with hook points in them.

dit_lens changes a model by putting a callable of its own into the `forward` of some module *instances*. A `Forward` is such a
callable: an object and no closure, so that a deep copy of the model gets forwards that compute with the copy's weights, and
pickling works. It calls the module's children by `child(...)`, so the user's own module hooks, adapters and offloading stay in force.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..hook_points import HookPoint

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """Sizes of a hooked model, under TransformerLens's names where it has one."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    patch_size: int
    sample_size: int
    in_channels: int
    out_channels: int
    n_classes: int

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid at the model's own sample size."""
        return (self.sample_size // self.patch_size,) * 2

    @property
    def null_class(self) -> int:
        """The label that stands for 'no class' in classifier-free guidance: the one after the last class."""
        return self.n_classes

    @property
    def learned_sigma(self) -> bool:
        """Whether the model also predicts a variance, in the second half of its output channels."""
        return self.out_channels == 2 * self.in_channels


class Forward:
    """A replacement for `module.forward`. Subclasses define `__call__` with the original's signature."""

    def __init__(self, module: Any) -> None:
        self.module = module

    __call__: Callable[..., Any]
    last_layer: Callable[[Tensor, Tensor, Tensor], Tensor]


class Family(Protocol):
    """The registry's unit: one per model class."""

    model_class: str

    def config(self, transformer: Any) -> Config:
        """The model's sizes."""

    def sites(self, transformer: Any) -> dict[str, Axes]:
        """Every hook name with the names of its axes, in forward order."""

    def check_model(self, transformer: Any) -> None:
        """Raise one clear sentence if the model has something switched on that the forwards do not honour."""

    def check_input(self, transformer: Any, x: Tensor, t: Tensor | None, y: Tensor | None) -> None:
        """Raise one clear sentence for inputs that the model would fail on or, worse, silently get wrong."""

    def forwards(self, transformer: Any, points: dict[str, HookPoint], wiring: Any) -> Sequence[Forward]:
        """The replacements, the transformer's own first; that one also has `last_layer(stream, t, y)`, the lens."""
