"""Which branch of classifier-free guidance a call of the transformer is, and which step of the
loop.

Pipelines guide in three ways: one call on a doubled batch ([uncond | cond], in ZImage [cond |
uncond]), two calls a step, or a strength given to a distilled model as one more input. Nothing in
the tensors says which. Where diffusers says it, through `transformer.cache_context("cond",
step_index=i)`, that is taken. Elsewhere, and for the step, dit_lens looks at the pipeline itself:
the frame of its `__call__`, whose local variables every diffusers pipeline names alike (`latents`
before doubling; the loop's `i`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

DEEPEST = 24
"""How many frames up a pipeline is looked for: the transformer's wrappers, offload hooks and
contexts lie between.
"""

CALLS = ("cond", "uncond", "")
"""What a step's calls are, where each branch is a call of its own; of a third one nothing is known.
"""


@dataclass(frozen=True)
class Announced:
    """What a pipeline said of the call under way, through diffusers' `cache_context`.

    Attributes:
        name: "cond", "uncond", "cond_uncond" (a doubled batch), or a pipeline's own word.
        step: the loop's step, where the pipeline gives it.
    """

    name: str
    step: int | None = None


_announced: ContextVar[Announced | None] = ContextVar("announced", default=None)


class CacheContextTap:
    """In place of `transformer.cache_context`: notes what is said, and hands it on to diffusers."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @contextmanager
    def __call__(self, name: str, **fields: Any) -> Iterator[None]:
        token = _announced.set(Announced(name, fields.get("step_index")))
        try:
            with type(self.module).cache_context(self.module, name, **fields):
                yield
        finally:
            _announced.reset(token)


def listen_to(transformer: nn.Module) -> None:
    """Note what pipelines say through `cache_context`, where the model has it."""
    if hasattr(type(transformer), "cache_context"):
        transformer.__dict__["cache_context"] = CacheContextTap(transformer)


def listen_no_more(transformer: nn.Module) -> None:
    """Give the model its own `cache_context` back."""
    if isinstance(transformer.__dict__.get("cache_context"), CacheContextTap):
        del transformer.__dict__["cache_context"]


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
        self.calls = self.counted = 0
        self.prompts: tuple[str, ...] | None = None

    def now(
        self, transformer: Any, order: tuple[str, str] | None, inputs: dict[str, Any], items: int
    ) -> tuple[tuple[str, ...] | None, tuple[int, int] | None]:
        """Which branch each item of the call under way is, and its step's place in the loop.

        Args:
            transformer: that is called.
            order: the family's `batch_order`.
            inputs: the transformer's arguments.
            items: the batch.

        Returns:
            "cond", "uncond", "skip" or "" for each item, or None where nothing tells. "skip" is the
            extra pass of skip-layer guidance, which is conditional with some layers left out; "" is
            an item of a batch that is neither the latents' nor twice that. And the number of the
            pipeline's run with the step in it, or None where steps can't be told.
        """
        said, frame = _announced.get(), _pipeline(transformer)
        if frame is None and said is None:
            return None, None
        local = {} if frame is None else frame.f_locals
        own, step = local.get("latents"), local.get("i")
        self.prompts = _prompts(local.get("prompt"), items)
        if said is not None and said.step is not None:
            step = said.step
        if frame is not self.frame:  # held, so that another run's frame can't lie at its address
            self.frame, self.step, self.calls, self.counted = frame, None, 0, 0
            self.runs += 1
        if step is None and said is None and order is not None:
            step = self.counted  # DiTPipeline's loop does not count, and calls once a step
        self.counted += 1
        self.calls = self.calls + 1 if step == self.step else 1
        self.step = step
        place = (self.runs, step) if isinstance(step, int) else None
        return self._branch(said, order, inputs, items, items if own is None else len(own)), place

    def _branch(
        self,
        said: Announced | None,
        order: tuple[str, str] | None,
        inputs: dict[str, Any],
        items: int,
        latents: int,
    ) -> tuple[str, ...]:
        if inputs.get("skip_layers") is not None:
            return ("skip",) * items
        if said is not None and said.name in ("cond", "uncond"):
            return (said.name,) * items
        if items == latents:
            word = "cond" if order is not None else CALLS[min(self.calls, len(CALLS)) - 1]
            return (word,) * items
        if items == 2 * latents and order is not None:
            return (order[0],) * latents + (order[1],) * latents
        return ("",) * items


def _prompts(given: Any, items: int) -> tuple[str, ...] | None:
    """The prompt of each item, where they are words: each as often in a row as images were asked
    for, all of them once more where the batch is doubled.
    """
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        return None
    return tuple(prompts) if prompts and items % len(prompts) == 0 else None


def _pipeline(transformer: Any) -> FrameType | None:
    """The innermost frame up from here that is the `__call__` of a pipeline with this
    transformer.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEEPEST):
        if frame is None:
            return None
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            # vars and not `components`, which inspects the constructor anew, and raises if it
            # disagrees
            if hasattr(type(pipe), "register_modules") and any(
                part is transformer for part in vars(pipe).values()
            ):
                return frame
        frame = frame.f_back
    return None
