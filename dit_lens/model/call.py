"""One call of the transformer, as those who watch are told of it, and how it is kept: all that its
forward depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..families.base import Condition
from ..hooks.points import Editor

Span = tuple[int | None, int | None]
Coupling = Callable[..., Tensor]


@dataclass
class Call:
    """One call of the transformer: all that its forward depends on, and the edits in force.

    Attributes:
        inputs: the transformer's arguments by name.
        x, t: the latents among them, and the time in the scheduler's units.
        condition: all arguments but x_t and the time, as `HookedDiT` takes them for y.
        labels: [batch], classes or prompts by number, where they are known; see
            `dit_lens.model.conditions`.
        span, stream: the part of the blocks that was run, and the stream that was put in.
        couplings: attention couplings in force, by layer.
        twin, branch: which item is which, where known.
        place: the loop's step, where the pipeline tells; calls with one place are branches of one
            step.
    """

    inputs: dict[str, Any] = field(repr=False)
    x: Tensor = field(repr=False)
    t: Tensor
    labels: Tensor | None = None
    span: Span = (None, None)
    stream: Tensor | None = field(default=None, repr=False)
    grad: bool = False
    autocast: torch.dtype | None = None
    edits: list[tuple[str, Editor]] = field(default_factory=list)
    couplings: dict[int, Coupling] = field(default_factory=dict)
    twin: tuple[str, ...] | None = None
    branch: tuple[str, ...] | None = None
    place: Hashable = None
    grid: tuple[int, ...] = ()
    condition: Condition = field(default_factory=Condition, repr=False)
    memo: dict[Any, Any] = field(
        default_factory=dict, repr=False
    )  # what sites look up, once a call: each costs a GPU a wait

    def kept(self, copies: Copies) -> Call:
        """A copy that outlives the call, whatever the caller does to its tensors."""

        def copy(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copies.of(value)
            if isinstance(value, Condition):
                condition = Condition({k: copy(v) for k, v in value.items()})
                condition.labels = copy(value.labels)
                return condition
            if isinstance(value, dict):
                return {k: copy(v) for k, v in value.items()}
            return type(value)(map(copy, value)) if type(value) in (list, tuple) else value

        copies.next()
        tensors = ("inputs", "x", "t", "labels", "stream", "condition")
        return replace(self, memo={}, **{name: copy(getattr(self, name)) for name in tensors})


class Copies:
    """Copies of tensors; one that comes again unchanged, as a prompt's embedding does in every
    step, is copied once.

    To know it again the original is held, until it has not come for a few calls.
    """

    RECENT = 4  # calls: more than a step of guidance has

    def __init__(self) -> None:
        self.call = 0
        self.held: dict[int, tuple[Tensor, int, Tensor]] = {}
        self.latest: dict[int, int] = {}

    def next(self) -> None:
        """Another call begins."""
        self.call += 1
        for key in [key for key, call in self.latest.items() if call < self.call - self.RECENT]:
            del self.held[key], self.latest[key]

    def of(self, x: Tensor) -> Tensor:
        found = self.held.get(id(x))
        if found is None or found[0] is not x or found[1] != _version(x):
            found = self.held[id(x)] = x, _version(x), x.detach().clone()
        self.latest[id(x)] = self.call
        return found[2]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Watcher(Protocol):
    """Told of every call (traces are)."""

    def begin(self, call: Call) -> None: ...
    def end(self, call: Call, finished: bool) -> None: ...
