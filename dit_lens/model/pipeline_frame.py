"""Which branch of classifier-free guidance a call of the transformer is, and which step of the
loop.

Pipelines guide in three ways: one call on a doubled batch ([uncond | cond], in ZImage [cond |
uncond]), two calls a step, or a strength given to a distilled model as one more input. Nothing in
the tensors says which. Where diffusers says it, through `transformer.cache_context("cond",
step_index=i)`, that is taken. Elsewhere, and for the step, dit_lens looks at the pipeline itself:
the frame of its `__call__`, whose local variables every diffusers pipeline names alike (`latents`
before doubling; the loop's `i`), or, of a modular pipeline, of the block that calls. A call that
the pipeline's own code does not make, such as its callback's, is none of its loop's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from ..errors import InvalidState

DEEPEST = 48
"""How many frames up a pipeline is looked for: the transformer's wrappers, offload hooks and
contexts lie between.
"""

HANDING = ("torch", "accelerate", "peft", "dit_lens", "contextlib", "functools")
"""Packages whose frames lie between a call of a module and its forward."""

GUIDED = "__guidance_identifier__"
"""Where diffusers' guiders note which branch a batch is, such as "pred_cond"."""

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


class Loop(NamedTuple):
    """A pipeline's loop that calls the transformer.

    Attributes:
        frame: of the pipeline's `__call__`.
        step: its `i`.
        latents: before doubling.
        prompt: what it was asked for.
        negative: its negative prompt.
        said: of a modular pipeline, which branch of guidance is under way.
    """

    frame: FrameType | None = None
    step: Any = None
    latents: Any = None
    prompt: Any = None
    negative: Any = None
    said: Announced | None = None


class Told(NamedTuple):
    """What is known of a call.

    Attributes:
        branch: "cond", "uncond", "skip" or "" for each item, or None where nothing tells. "skip" is
            the extra pass of skip-layer guidance, which is conditional with some layers left out;
            "" is an item of a batch that is neither the latents' nor twice that.
        place: the number of the pipeline's run with the step in it, or None where steps can't be
            told.
        prompts: the prompt of each item, where they are words; empty where its text encoders were
            given different ones.
        negatives: in its place, what an "uncond" item was given.
    """

    branch: tuple[str, ...] | None = None
    place: tuple[int, int] | None = None
    prompts: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None


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

    def now(
        self,
        transformer: Any,
        order: tuple[str, str] | None,
        asked: Sequence[str],
        inputs: dict[str, Any],
        items: int,
    ) -> Told:
        """What the running pipeline tells of the call under way.

        Args:
            transformer: that is called.
            order: the family's `batch_order`.
            asked: the family's `prompt_names`.
            inputs: the transformer's arguments.
            items: the batch.

        Raises:
            InvalidState: in a block of a modular pipeline that does not say which step it is.
        """
        said, loop = _announced.get(), _loop(transformer, asked)
        if loop is None and said is None:
            return Told()
        frame, step, own, prompt, negative, of_block = loop or Loop()
        said = said or of_block
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
        branch = self._branch(said, order, inputs, items, items if own is None else len(own))
        negatives = _prompts("" if negative is None else negative, items)
        return Told(branch, place, _prompts(prompt, items), negatives)

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
        word = "" if said is None else said.name.removeprefix("pred_")
        if word in ("cond", "uncond"):
            return (word,) * items
        if said is not None and word != said.name:  # a guider's, of which it has several
            return ("skip" if word == "cond_skip" else "",) * items
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
    if given == ():
        return ()
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        return None
    return tuple(prompts) if prompts and items % len(prompts) == 0 else None


def _asked(local: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> Any:
    """What the text encoders are given, by the arguments that hold it; () if not all the same."""
    own = local.get(f"{prefix}prompt")
    given = [local.get(prefix + name) or own for name in names]  # as diffusers fills them in
    listed = [[each] if isinstance(each, str) else each for each in given]
    return given[0] if all(each == listed[0] for each in listed) else ()


def _loop(transformer: Any, asked: Sequence[str]) -> Loop | None:
    """The loop whose own code makes the call under way. None where no pipeline is there, or one
    only calls somebody who calls the transformer, such as its callback.
    """
    caller = frame = _caller()
    for _ in range(DEEPEST):
        if frame is None or caller is None:
            return None
        if frame.f_code.co_name == "__call__":
            pipe = frame.f_locals.get("self")
            modular = hasattr(type(pipe), "register_components")
            # vars and not `components`, which inspects the constructor anew, and raises if it
            # disagrees
            if (modular or hasattr(type(pipe), "register_modules")) and any(
                part is transformer for part in vars(pipe).values()
            ):
                if modular:
                    return _of_block(frame, caller.f_locals)
                # a function beside `__call__`, or a method, of a class derived from it too
                beside = caller.f_globals is frame.f_globals
                if not beside and caller.f_locals.get("self") is not pipe:
                    return None
                local = frame.f_locals
                words = (_asked(local, asked, prefix) for prefix in ("", "negative_"))
                return Loop(frame, local.get("i"), local.get("latents"), *words)
        frame = frame.f_back
    return None


def _caller() -> FrameType | None:
    """The innermost frame up from here that is not of those who hand a call of a module on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package, _, rest = str(frame.f_globals.get("__name__")).partition(".")
        handing = package == "diffusers" and not rest.startswith(("pipelines", "modular_pipelines"))
        if not (handing or package in HANDING):
            return frame
        frame = frame.f_back
    return None


def _of_block(frame: FrameType, local: Mapping[str, Any]) -> Loop:
    """The loop of a modular pipeline, by the variables of its block that calls the transformer:
    diffusers' own name the step `i`, and the branch of guidance under way `guider_state_batch`.
    """
    if not isinstance(local.get("i"), int):
        raise InvalidState(
            f"{type(local.get('self')).__name__} calls the transformer in a modular pipeline "
            "without a step i among its variables, so that a trace can't tell which step it is; "
            "expected a block like diffusers' own, __call__(self, components, block_state, i, t)."
        )
    branch = getattr(local.get("guider_state_batch"), GUIDED, None)
    latents = getattr(local.get("block_state"), "latents", None)
    return Loop(frame, local["i"], latents, said=branch and Announced(branch))
