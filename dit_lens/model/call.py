"""One call of the transformer, as watchers see it, and how it is kept: all that its forward
depends on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..families.config import Condition
from ..hooks.passes import PassContext
from ..hooks.points import Editor
from .kernels import Kernels
from .witness import Witness


@dataclass
class Call:
    """One call of the transformer: all that its forward depends on, and the edits in force.

    Attributes:
        inputs: the transformer's arguments by name.
        x: the latents among them, [batch, *latent_shape], or the stream that was put in.
        t: the time among them, [batch] or [1], in the scheduler's units.
        condition: all arguments but x_t and the time, as `HookedDiT` takes them for y.
        labels: [batch], classes or prompts by number, where they are known.
        prompts: the prompt of each item [batch] as its pipeline was given it, where one runs that
            says so; empty where its text encoders were given different ones; not kept in files.
        negatives: in its place, what an "uncond" item was given.
        context: what the pass was run under.
        kernels: the settings that chose its kernels.
        witness: checksums of the streams that left each layer, by hook name.
        edits: the edits in force, by hook name, as they act in this call.
        branch: which branch of guidance each item is, where the pipeline tells.
        place: which run of a pipeline this is, and which step of its loop, where that is told;
            calls with one place are branches of one step.
        grid: the token grid.
        left_out: hook names at which nothing was computed, as a reuse plan held it.
        memo: what probes look up, cached per call: each lookup would synchronise the GPU.
    """

    inputs: dict[str, Any] = field(repr=False)
    x: Tensor = field(repr=False)
    t: Tensor
    condition: Condition = field(repr=False)
    labels: Tensor | None = None
    prompts: tuple[str, ...] | None = field(default=None, repr=False)
    negatives: tuple[str, ...] | None = field(default=None, repr=False)
    context: PassContext = field(default_factory=PassContext)
    kernels: Kernels = field(default_factory=Kernels)
    witness: Witness = field(default_factory=Witness, repr=False)
    edits: list[tuple[str, Editor]] = field(default_factory=list)
    branch: tuple[str, ...] | None = None
    place: tuple[int, int] | None = None
    grid: tuple[int, ...] = ()
    left_out: frozenset[str] = frozenset()
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def told(self) -> str:
        """The branches of guidance among its items, as the pipeline tells: "cond", "uncond",
        "skip", "cond | uncond", or "".
        """
        return " | ".join(dict.fromkeys(self.branch or ()))

    def branch_words(self, null_class: int) -> tuple[str, ...]:
        """For each batch item "cond" or "uncond" (of guidance), "skip" (of the extra pass of
        skip-layer guidance), or "" where neither the pipeline nor the labels tell. Twins without
        guidance are all "cond", whatever their labels.

        Args:
            null_class: the label that stands for no condition.
        """
        if self.branch is not None:
            return self.branch
        items = len(self.x)
        if self.context.twin is not None:  # their loop tells where it runs a null half
            return ("cond",) * items
        if self.labels is None:
            return ("",) * items
        labels = self.labels.expand(items).tolist()
        return tuple("uncond" if y == null_class else "cond" for y in labels)

    def kept(self, copies: Copies) -> Call:
        """A copy that outlives the call, whatever the caller does to its tensors."""

        def copy(value: Any) -> Any:
            if isinstance(value, Tensor):
                return copies.of(value)
            if isinstance(value, Condition):
                items = {k: copy(v) for k, v in value.items()}
                return Condition.numbered(items, copy(value.labels))
            if isinstance(value, np.ndarray):
                return value.copy()
            if isinstance(value, dict):
                return {k: copy(v) for k, v in value.items()}
            return type(value)(map(copy, value)) if type(value) in (list, tuple) else value

        copies.next()
        tensors = {n: copy(getattr(self, n)) for n in ("inputs", "x", "t", "labels", "condition")}
        context = replace(
            self.context, stream=copy(self.context.stream), labels=copy(self.context.labels)
        )
        return replace(self, memo={}, context=context, **tensors)


class Copies:
    """Copies of tensors. A large one that comes again unchanged, as a prompt's embedding does in
    every step, is copied once.

    To know it again the original is held, until it has not come for a few calls. That it is
    unchanged is seen by comparing: version counters miss what happens in inference mode, through
    `.data` or through numpy.
    """

    RECENT = 4  # calls: more than a step of guidance has
    SMALL = 1 << 18  # bytes: latents and times are copied each time

    def __init__(self) -> None:
        self.call = 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.latest: dict[int, int] = {}

    def next(self) -> None:
        """Another call begins."""
        self.call += 1
        for key in [key for key, call in self.latest.items() if call < self.call - self.RECENT]:
            del self.held[key], self.latest[key]

    def of(self, x: Tensor) -> Tensor:
        """A copy of x, or an earlier one of the same tensor if it is still equal."""
        known = self.held.get(id(x))
        self.latest[id(x)] = self.call
        if known is not None and known[0] is x and _equal(x, known[1]):
            return known[1]
        self.held[id(x)] = x, x.detach().clone()
        return self.held[id(x)][1]


def _equal(x: Tensor, copy: Tensor) -> bool:
    """Whether x still is what was copied. On an accelerator a small tensor is not looked at, which
    would wait for the device, but copied again.
    """
    large = x.numel() * x.element_size() > Copies.SMALL
    return (large or x.device.type == "cpu") and torch.equal(x.detach(), copy)


class Watcher(Protocol):
    """Is shown every call; traces are.

    Attributes:
        proves: whether it needs the call's edits and witness.
    """

    proves: bool

    def begin(self, call: Call) -> None: ...
    def end(self, call: Call, finished: bool) -> None: ...
