"""Where and when an activation was seen: what a probe is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
import xarray as xr
from torch import Tensor

from ..families.config import Condition
from ..hooks.names import NamesFilter, layer_of
from ..model.call import Call
from ..model.pinned import sent

if TYPE_CHECKING:
    from ..model.hooked import HookedDiT

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """Where and when an activation was seen.

        def observe(self, activation, site):
            a, b = (activation[site.where(twin=which)] for which in "AB")
            x0 = self.model.predict_x0(self.model.unembed(activation, site.t, site.condition),
                                       site.x, site.t, site.scheduler)

    Attributes:
        name: the full hook name.
        step: the denoising step; 0 is the first, noisiest step of the trace.
        grid: height and width of the token grid, for video frames before them.
        call: the call of the transformer under way.
        null_class: the label that stands for no condition.
    """

    name: str
    step: int
    grid: tuple[int, ...]
    call: Call
    null_class: int

    @property
    def layer(self) -> int | None:
        """The block, or None before and after the blocks."""
        return layer_of(self.name)

    @property
    def x(self) -> Tensor:
        """The latents that went into the model, x_t [batch, *latent_shape]."""
        return self.call.x

    @property
    def t(self) -> Tensor:
        """The time that went into the model, [batch] or [1], in the scheduler's units."""
        return self.call.t

    @property
    def condition(self) -> Condition:
        """All else that went into the model, as `HookedDiT` takes it for `y`."""
        return self.call.condition

    @property
    def timestep(self) -> float:
        """The diffusion timestep of this call (of its first item, should they differ)."""
        return self._once("timestep", lambda: float(self.call.t[0]))

    @property
    def labels(self) -> Tensor | None:
        """The class, or the number of the prompt, of each batch item; None where the model was
        called with a condition of its own.
        """
        return self.call.labels

    @property
    def branch(self) -> tuple[str, ...]:
        """For each batch item "cond" or "uncond" (of guidance), as the running loop or the labels
        tell; "" if nothing does.

        "skip" are items of the extra pass of skip-layer guidance.
        """
        return self._once("branch", lambda: self.call.branch_words(self.null_class))

    @property
    def twin(self) -> tuple[str, ...]:
        """For each batch item "A" or "B" in a run of twins, otherwise ""."""
        return self.call.context.twin or ("",) * len(self.call.x)

    @property
    def scheduler(self) -> Any:
        """What the run under way samples with, where dit_lens runs it; None elsewhere, as in a
        pipeline, whose scheduler is the model's.
        """
        return self.call.context.scheduler

    @property
    def rows(self) -> tuple[int, ...]:
        """Where the items of this call stand in the step's whole batch, which may go through the
        model in parts.
        """
        part = self.call.context.part
        return tuple(range(len(self.call.x))) if part is None else part.rows

    @property
    def size(self) -> int:
        """How many items the step's whole batch has."""
        part = self.call.context.part
        return len(self.call.x) if part is None else part.size

    def where(self, *, branch: str | None = None, twin: str | None = None) -> Tensor:
        """The batch positions of one branch and/or twin: `activation[site.where(twin="A")]`.

        Args:
            branch: "cond" or "uncond"; None is both.
            twin: "A" or "B"; None is both.
        """

        def find() -> Tensor:
            items = enumerate(zip(self.branch, self.twin, strict=True))
            keep = [i for i, (b, w) in items if branch in (None, b) and twin in (None, w)]
            found = torch.tensor(keep, dtype=torch.long, device="cpu")
            return sent(found, self.call.x.device)

        return self._once(("where", branch, twin), find)

    def _once(self, key: object, find: Callable[[], T]) -> T:
        """Looked up once a call and not at every layer: each lookup would synchronise the GPU."""
        if key not in self.call.memo:
            self.call.memo[key] = find()
        found: T = self.call.memo[key]
        return found


@runtime_checkable
class Observing(Protocol):
    """What a trace needs of a probe; `dit_lens.Probe` is the class to write one with."""

    @property  # not an attribute: a probe's own type of `names` may be narrower
    def names(self) -> NamesFilter: ...
    def start(self, model: HookedDiT) -> None: ...
    def observe(self, activation: Tensor, site: Site) -> object: ...
    def result(self) -> xr.Dataset: ...
