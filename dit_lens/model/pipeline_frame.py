"""Which branch of classifier-free guidance a call of the transformer is, and which step of the
loop: read off the pipeline that runs.

Pipelines guide in three ways: one call on a doubled batch ([uncond | cond], in ZImage [cond |
uncond]), two calls a step, or a strength given to a distilled model as one more input. Nothing in
the tensors says which, so dit_lens looks at the pipeline itself: the frame of its `__call__`, whose
local variables every diffusers pipeline names alike (`latents` before doubling; the loop's `i`).
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from types import FrameType
from typing import Any

DEEPEST = 24
"""How many frames up a pipeline is looked for: the transformer's wrappers, offload hooks and
contexts lie between.
"""


CALLS = ("cond", "uncond", "")
"""What a step's calls are, where each branch is a call of its own; a third one is something that we
do not know.
"""


class PipelineFrame:
    """Follows the pipelines that run through one transformer; of one such run it remembers the step
    and its calls.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.forget()

    def forget(self) -> None:
        """Let go of the pipeline's frame, and of the tensors in it."""
        self.frame: FrameType | None = None
        self.step: Any = None
        self.calls = 0

    def now(
        self, transformer: Any, order: tuple[str, str] | None, inputs: dict[str, Any], items: int
    ) -> tuple[tuple[str, ...] | None, Hashable]:
        """("cond" | "uncond" | "skip" | "" for each item, the step's place in the loop); (None,
        None) outside of a pipeline.

        "skip" is the extra pass of skip-layer guidance, which is conditional with some layers left
        out. "" is an item of a batch that is neither the latents' nor twice that. `order` is the
        family's `batch_order`.
        """
        frame = _pipeline(transformer)
        if frame is None:
            return None, None
        local = frame.f_locals
        own, step = local.get("latents"), local.get("i")
        # held, so that another run's frame can't come to lie at its address
        if frame is not self.frame:
            self.frame, self.step, self.calls = frame, None, 0
            self.runs += 1
        self.calls = self.calls + 1 if step == self.step else 1
        self.step = step
        # DiTPipeline's loop does not count: there a call is a step
        place = None if step is None else (self.runs, step)
        n = len(own) if own is not None else items
        if inputs.get("skip_layers") is not None:
            return ("skip",) * items, place
        if items == n:
            word = "cond" if order is not None else CALLS[min(self.calls, len(CALLS)) - 1]
            return (word,) * items, place
        if items == 2 * n and order is not None:
            return (order[0],) * n + (order[1],) * n, place
        return ("",) * items, place


def _pipeline(transformer: Any) -> FrameType | None:
    """The innermost frame up from here that is the `__call__` of a pipeline with this transformer."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEEPEST):
        if frame is None:
            return None
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            if hasattr(type(pipe), "register_modules") and any(
                part is transformer for part in vars(pipe).values()
            ):
                # vars and not `components`, which inspects the constructor anew, and raises if it
                # disagrees
                return frame
        frame = frame.f_back
    return None
