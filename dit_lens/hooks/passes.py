"""The state of one pass: what a forward is run under, besides its inputs and the edits in force,
and what the forwards of a family may ask about it.

The state belongs to whoever runs the pass, and not to the model: a `contextvars` value, so that
another thread or asyncio task that runs the same model sees its own, and a recomputation can put it
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from torch import Tensor

Coupling = Callable[..., Tensor]
"""What replaces a layer's attention output: fn(own, q, k, v, mask, kernel) -> output."""

Span = tuple[int | None, int | None]
"""Which blocks run: from the first to before the second; None is the model's own end."""


@dataclass(frozen=True)
class Part:
    """Which part of a step's batch a pass is, where it goes through the model in several.

    Attributes:
        rows: the positions of the pass's items in the step's whole batch.
        size: how many the whole has.
        later: whether another pass of the step came before.
    """

    rows: tuple[int, ...]
    size: int
    later: bool

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Neighbouring rows, in the pass and in the whole. They need no tensor of indices, for
        which the host would wait.

        >>> list(Part((0, 1, 4), 6, False).spans())
        [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(4, 5, None))]
        """
        for _, run in groupby(enumerate(self.rows), lambda at: at[1] - at[0]):
            (here, there), *more = run
            n = 1 + len(more)
            yield slice(here, here + n), slice(there, there + n)


@dataclass(frozen=True)
class PassContext:
    """What a pass is run under; what a recomputation restores.

    Attributes:
        span: the part of the blocks that is run.
        stream: the residual stream [batch, token, d_model] that is put in at the start of the span.
        couplings: what acts inside the attention of each layer.
        labels: the numbers [batch] of the conditions that the model is called with, if known.
        twin: which twin each item is.
        step: the denoising step of a loop of dit_lens's own; a pipeline's steps are counted.
        run: what stands for the run that the step is of, where that is known.
        branch: which branch of guidance each item is, where a loop of dit_lens's own guides.
        part: which part of the step's batch it is; None is all of it.
        steps: how many steps the run has, if that is known.
        log_snr: the noise level of the step, by the run's own scheduler, if that is known.
        scheduler: the run's own scheduler, if that is known.
    """

    span: Span = (None, None)
    stream: Tensor | None = field(default=None, repr=False)
    couplings: Mapping[int, Coupling] = field(default_factory=dict)
    labels: Tensor | None = None
    twin: tuple[str, ...] | None = None
    step: int | None = None
    run: object | None = None
    branch: tuple[str, ...] | None = None
    part: Part | None = None
    steps: int | None = None
    log_snr: float | None = None
    scheduler: Any = field(default=None, repr=False)


class Pass(Protocol):
    """One transformer's current pass, as its forwards see it.

    Families compute and do not know who installs their forwards. All that they use of the pass
    under way is written down here. `Instrumentation` keeps to it.

        coupling = current_pass.couplings.get(layer)
    """

    @property
    def transformer(self) -> Any:
        """The opened transformer."""

    @property
    def now(self) -> dict[str, Any] | None:
        """The transformer's arguments in the call under way, by name; None outside of a call."""

    @property
    def couplings(self) -> Mapping[int, Coupling]:
        """What acts inside the attention of each layer."""

    @property
    def listening(self) -> int:
        """How many listeners are attached to hook points."""

    @property
    def watchers(self) -> Sequence[Any]:
        """Those who are shown every call, such as traces."""

    def forward(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Surround one forward of the transformer.

        Args:
            inputs: its arguments by name.
        """
