"""The state of a pass: what a forward with hook points may ask about the call it runs in.

Families compute and do not know who installs their forwards. All that they use of the pass under
way is written down here, as a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class Pass(Protocol):
    """One transformer's current pass, as its forwards see it."""

    @property
    def transformer(self) -> Any:
        """The opened transformer."""

    @property
    def now(self) -> dict[str, Any] | None:
        """The transformer's arguments in the call under way, by name; None outside of a call."""

    @property
    def couplings(self) -> Mapping[int, Callable[..., Tensor]]:
        """The attention couplings of twins in force, by layer."""

    @property
    def listening(self) -> int:
        """How many listeners are attached to hook points."""

    @property
    def watchers(self) -> Sequence[Any]:
        """Those who are told of every call, such as traces."""

    def forward(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Surround one forward of the transformer with these arguments."""
