"""Instrumentation: a model's hook points, put into it and taken out again without a trace.

One `Instrumentation` belongs to one transformer, however many `HookedDiT`s and traces look at it.
It puts the family's `Forward`s into the module instances (into accelerate's `_old_forward` where
accelerate sits on `forward`, so offloading stays in force), keeps the list of who listens, and
guards what would otherwise go silently wrong: a second thread running through the first one's
hooks, a hook that calls its own model, compiled or checkpointed forwards that skip or repeat hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidState
from ..families import family_of
from ..families.base import Condition, Forward
from ..families.upstream import check_sources
from ..hooks.points import Editor, HookPoint, Listener
from .call import Call, Coupling, Span, Watcher
from .partial import InjectStream, SkippedBlock, StopBefore, StoppedAtLayer
from .pipeline_frame import PipelineFrame
from .supported import refuse_cache, refuse_unfit


class Handle:
    """Takes one listener off again; `remove()` twice is harmless."""

    def __init__(self, instrumentation: Instrumentation, name: str, listener: Listener) -> None:
        self.instrumentation, self.name, self.listener = instrumentation, name, listener

    def remove(self) -> None:
        self.instrumentation.detach(self.name, self.listener)


class Instrumentation:
    """The hook points of one transformer; `Instrumentation.of(transformer)` finds or makes them."""

    def __init__(self, transformer: nn.Module, trusted: bool = False) -> None:
        refuse_unfit(transformer)
        self.family = family_of(transformer)
        self.family.check_model(transformer)
        self.transformer = transformer
        self.sites = self.family.sites(transformer)
        self.points = {name: HookPoint(name) for name in self.sites}
        self.watchers: list[Watcher] = []
        self.listening = 0
        self.span: Span = (None, None)
        self.stream: Tensor | None = None
        self.now: dict[str, Any] | None = None  # the arguments of the call under way
        self.labels: Tensor | None = None
        self.couplings: dict[int, Coupling] = {}
        self.pipeline = PipelineFrame()
        self.twin: tuple[str, ...] | None = None
        self.owner: int | None = None
        self.running: list[int] = []
        self.temporary = False  # put in by a trace, to leave with the last of them
        self.replaced: list[tuple[Forward, Any]] = []
        forwards = self.family.forwards(transformer, self.points, self)
        if not trusted:
            check_sources(self.family, forwards, lambda other: Instrumentation(other, trusted=True))
        for forward in forwards:
            _refuse_replaced(forward.module)
        for forward in forwards:
            holder, slot = _slot(forward.module)
            self.replaced.append((forward, holder.get(slot)))
            holder[slot] = forward

    @classmethod
    def of(cls, transformer: nn.Module) -> tuple[Instrumentation, bool]:
        """The transformer's instrumentation, and whether it was made just now."""
        for holder, slot in _places(transformer):
            found = getattr(holder.get(slot), "current_pass", None)
            if isinstance(found, Instrumentation):
                return found, False
        return cls(transformer), True

    @property
    def installed(self) -> bool:
        return bool(self.replaced)

    def remove(self) -> None:
        """Give every module its own forward back.

        Raises RuntimeError, and removes nothing, if somebody has replaced ours.
        """
        places = []
        for forward, original in self.replaced:
            here = [
                (holder, slot)
                for holder, slot in _places(forward.module)
                if holder.get(slot) is forward
            ]
            if not here:
                theirs = forward.module.__dict__.get("forward")
                raise InvalidState(
                    f"The forward of {type(forward.module).__name__} was replaced by {theirs!r} "
                    "after dit_lens; "
                    "undo that first, then call remove() again."
                )
            places.append((forward.module, *here[0], original))
        for module, holder, slot, original in places:
            if holder is module.__dict__ and slot == "forward":
                del holder[slot]
            # accelerate or a diffusers hook sits on the module's forward and calls what is here
            else:
                holder[slot] = original or type(module).forward.__get__(module)
        self.replaced = []
        for point in self.points.values():
            point.listeners.clear()
        self.listening, self.watchers, self.owner = 0, [], None

    # Who listens.

    def attach(self, name: str, listener: Listener) -> Handle:
        self.claim()
        self.points[name].add(listener)
        self.listening += 1
        return Handle(self, name, listener)

    def detach(self, name: str, listener: Listener) -> None:
        listeners = self.points[name].listeners
        for i, each in enumerate(listeners):
            if each is listener:
                del listeners[i]
                self.listening -= 1
        self.release()

    def watch(self, watcher: Watcher) -> None:
        self.claim()
        self.watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        self.watchers = [w for w in self.watchers if w is not watcher]
        if not self.watchers:
            self.pipeline.forget()
        self.release()

    def claim(self) -> None:
        """Hooks belong to the thread that set them: another thread's forward would run through them
        unasked.
        """
        if not self.installed:
            raise InvalidState(
                "This model's hook points were removed; wrap it again with dit_lens.HookedDiT(...)."
            )
        me = get_ident()
        if (self.owner or me) != me or any(thread != me for thread in self.running):
            raise InvalidState(
                "This model is in use by another thread; hooks belong to one thread at a time. "
                "Trace a copy (copy.deepcopy), or wait for the other to finish."
            )
        self.owner = me

    def release(self) -> None:
        if not self.listening and not self.watchers:
            self.owner = None

    # What a forward goes through.

    @contextmanager
    def forward(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Surrounds each forward of the transformer: checks the inputs, tells the watchers."""
        self.family.check_input(self.transformer, inputs)
        me, active = get_ident(), self.listening or self.watchers
        if active:
            refuse_cache(self.transformer)
            if self.owner != me:
                raise InvalidState(
                    "This model is being traced or hooked in another thread; run a copy "
                    "(copy.deepcopy) here."
                )
            if me in self.running:
                raise InvalidState(
                    "The model was called from inside one of its own hooks; call a copy, or call "
                    "it afterwards."
                )
            if torch.is_grad_enabled() and getattr(
                self.transformer, "gradient_checkpointing", False
            ):
                raise InvalidState(
                    "Gradient checkpointing runs each block twice, and so would run each hook "
                    "twice; "
                    "call transformer.disable_gradient_checkpointing(), or use torch.no_grad()."
                )
        self.running.append(me)
        before, self.now = self.now, inputs
        finished = False
        told: list[Watcher] = []
        call = self.describe(inputs) if self.watchers else None
        try:
            if call is not None:
                for watcher in tuple(self.watchers):
                    watcher.begin(call)
                    told.append(watcher)
                call.edits = [(n, e) for n, e in self.edits_now()]
            yield
            finished = True
        except StoppedAtLayer:
            finished = True
            raise
        finally:
            self.running.remove(me)
            self.now = before
            for watcher in told:
                assert call is not None
                watcher.end(call, finished)

    def describe(self, inputs: dict[str, Any]) -> Call:
        x, t = (
            self.family.latents(self.transformer, inputs),
            self.family.timesteps(self.transformer, inputs),
        )
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        classes = inputs.get(self.family.labels_name)
        labels = classes if isinstance(classes, Tensor) else self.labels
        branch, place = self.pipeline.now(self.transformer, self.family.batch_order, inputs, len(x))
        own = (self.family.x_name, self.family.t_name)
        condition = Condition({k: v for k, v in inputs.items() if k not in own})
        condition.labels = labels
        return Call(
            inputs,
            x if self.stream is None else self.stream,
            t,
            labels,
            self.span,
            self.stream,
            torch.is_grad_enabled(),
            autocast,
            couplings=dict(self.couplings),
            twin=self.twin,
            branch=branch,
            place=place,
            grid=tuple(self.family.grid(self.transformer, inputs)),
            condition=condition,
        )

    def edits_now(self) -> Iterator[tuple[str, Editor]]:
        for name, point in self.points.items():
            for listener in point.listeners:
                if isinstance(listener, Editor) and (frozen := listener.frozen()):
                    yield name, frozen

    @contextmanager
    def part(self, span: Span, stream: Tensor | None = None) -> Iterator[None]:
        """Run only the blocks start..end-1, from a given stream [batch, token, d_model] and up to
        `StoppedAtLayer`.

        Blocks before the start are not run: for the time being they hand on what they are given,
        the last of them `stream`.
        """
        start, end = span
        before = self.span, self.stream
        blocks = [] if span == (None, None) else self.family.blocks(self.transformer)
        kept = [(block, block.__dict__.get("forward")) for block in blocks]
        put = InjectStream(stream) if stream is not None and start == 0 else None
        try:
            self.span, self.stream = span, stream
            for i, block in enumerate(blocks):
                if start is not None and i < start:
                    block.__dict__["forward"] = SkippedBlock(
                        self, stream if i == start - 1 else None
                    )
                elif i == end or (end == len(blocks) and i == end - 1):
                    block.__dict__["forward"] = StopBefore(
                        self, block, block.forward if i != end else None
                    )
            if put is not None:
                self.points["hook_embed"].add(put)
            yield
        finally:
            self.span, self.stream = before
            for block, forward in kept:
                if forward is not None:
                    block.__dict__["forward"] = forward
                else:
                    block.__dict__.pop("forward", None)
            if put is not None:
                self.points["hook_embed"].listeners.remove(put)

    @contextmanager
    def known(self, labels: Tensor | None) -> Iterator[None]:
        """The numbers of the conditions that the model is called with inside the `with` block."""
        before, self.labels = self.labels, labels
        try:
            yield
        finally:
            self.labels = before

    @contextmanager
    def alone(self, listeners: Iterable[tuple[str, Listener]]) -> Iterator[None]:
        """For a recomputation: these listeners and no others, and no watchers; then everything as
        it was.
        """
        if get_ident() in self.running:
            raise InvalidState(
                "Activations can't be recomputed inside a hook, while the model runs; read them "
                "afterwards."
            )
        self.claim()
        kept = {name: point.listeners for name, point in self.points.items()}
        state = self.watchers, self.listening, self.span, self.couplings
        steps = {name: point.step for name, point in self.points.items()}
        for point in self.points.values():
            point.listeners = []
        self.watchers, self.listening, self.span, self.couplings = [], 0, (None, None), {}
        try:
            for name, listener in listeners:
                self.points[name].add(listener)
                self.listening += 1
            yield
        finally:
            for name, point in self.points.items():
                point.listeners, point.step = kept[name], steps[name]
            self.watchers, self.listening, self.span, self.couplings = state
            self.release()

    def unembed(self, stream: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What follows the last block, alone, with the conditioning of these arguments and all hook
        points silent.
        """
        kept = [(point, point.listeners) for point in self.points.values() if point.layer() is None]
        for point, _ in kept:
            point.listeners = []
        before, self.now = self.now, inputs
        try:
            with self.part((len(self.family.blocks(self.transformer)), None), stream):
                own = self.replaced[0][0]
                answer = own.answer(own.own(**inputs, return_dict=False)[0])  # type: ignore[attr-defined]
            return self.family.output(self.transformer, answer, inputs)
        finally:
            self.now = before
            for point, listeners in kept:
                point.listeners = listeners

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model keeps its points and loses who listened to the original."""
        return self.__dict__ | {
            "watchers": [],
            "listening": 0,
            "owner": None,
            "running": [],
            "twin": None,
            "span": (None, None),
            "stream": None,
            "now": None,
            "labels": None,
            "couplings": {},
            "pipeline": PipelineFrame(),
        }


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module's own forward may lie: at the bottom of diffusers' hooks, under accelerate's,
    or on the instance.
    """
    registry = module.__dict__.get("_diffusers_hook")
    for ref in registry._fn_refs if registry is not None else ():
        for slot in ("original_forward", "forward"):
            if ref.__dict__[slot] is not None:
                yield ref.__dict__, slot
                break
    if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__:
        yield module.__dict__, "_old_forward"
    yield module.__dict__, "forward"


def _slot(module: nn.Module) -> tuple[dict[str, Any], str]:
    return next(_places(module))


def _refuse_replaced(module: nn.Module) -> None:
    holder, slot = _slot(module)
    found = holder.get(slot)
    if (
        found is not None
        and holder is module.__dict__
        and slot == "forward"
        and getattr(found, "__self__", None) is not module
    ):
        raise InvalidState(
            f"The forward of {type(module).__name__} was already replaced on the instance by "
            f"{found!r}; "
            "undo that first (or wrap the model before it)."
        )
