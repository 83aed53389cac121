"""Instrumentation: a model's hook points, put into it and taken out again without a trace.

One `Instrumentation` belongs to one transformer, however many `HookedDiT`s and traces look at it.
It puts the family's `Forward`s into the module instances (at the bottom of accelerate's and
diffusers' own hooks, so offloading stays in force), keeps the list of who listens, and guards what
would otherwise go silently wrong: a second thread running through the first one's hooks, a hook
that calls its own model, compiled or checkpointed forwards that skip or repeat hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidState
from ..families import family_of
from ..families.config import Condition
from ..families.forwards import Forward
from ..families.upstream import check_sources
from ..hooks.passes import Coupling, PassContext, Span
from ..hooks.points import Editor, HookPoint, Listener, Observer, stop
from .call import Call, Watcher
from .forward_slot import held, places, put_back, refuse_replaced, slot
from .kernels import Kernels
from .partial import StoppedAtLayer, only
from .pipeline_frame import PipelineFrame, listen_no_more, listen_to
from .supported import refuse_cache, refuse_unfit
from .witness import Witness, checksum, witnessed

NOTHING = PassContext()
"""A plain pass: all blocks, no coupling."""


class Handle:
    """Takes one listener off again; `remove()` twice is harmless."""

    def __init__(self, instrumentation: Instrumentation, name: str, listener: Listener) -> None:
        self.instrumentation, self.name, self.listener = instrumentation, name, listener

    def remove(self) -> None:
        """Take the listener off."""
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
        self.users = 0  # HookedDiTs and open traces; the last one to go takes the points out
        # Of a model that is only seen from outside not every stream can be read.
        streams = [] if self.family.read_only else witnessed(list(self.sites))
        self.witnessed = streams or ["hook_sample"]
        self.pipeline = PipelineFrame()
        self.owner: int | None = None  # the thread whose hooks are on
        self.running: list[int] = []
        self.replaced: list[tuple[Forward, Any]] = []
        self._fresh_context()

        # What is put in must still be what diffusers computes, and nobody else may sit there.
        forwards = self.family.forwards(transformer, self.points, self)
        if not trusted:
            check_sources(self.family, forwards, lambda other: Instrumentation(other, trusted=True))
        for forward in forwards:
            refuse_replaced(forward.module)
        for forward in forwards:
            holder, key = slot(forward.module)
            self.replaced.append((forward, holder.get(key)))
            holder[key] = forward
        listen_to(transformer)

    @classmethod
    def of(cls, transformer: nn.Module) -> Instrumentation:
        """The transformer's instrumentation, made if it has none."""
        for holder, key in places(transformer):
            found = getattr(holder.get(key), "current_pass", None)
            if isinstance(found, Instrumentation):
                return found
        return cls(transformer)

    @property
    def installed(self) -> bool:
        return bool(self.replaced)

    def remove(self) -> None:
        """Give every module its own forward back.

        Raises:
            RuntimeError: if somebody has replaced ours; then nothing is removed.
        """
        found = [
            (forward.module, held(forward.module, forward), original)
            for forward, original in self.replaced
        ]
        for module, place, original in found:
            put_back(module, place, original)
        listen_no_more(self.transformer)
        self.replaced = []
        for point in self.points.values():
            point.listeners.clear()
        self.listening, self.watchers, self.owner, self.users = 0, [], None, 0

    def retain(self) -> None:
        """One more looks at this model; each `let_go()` is one less."""
        self.users += 1

    def let_go(self) -> None:
        """One less looks at this model; the last one takes the hook points out."""
        self.users = max(0, self.users - 1)
        if self.installed and not (self.users or self.watchers or self.listening):
            self.remove()

    # Who listens.

    def attach(self, name: str, listener: Listener) -> Handle:
        """Add a listener at a hook point."""
        self.claim_thread()
        self.points[name].add(listener)
        self.listening += 1
        return Handle(self, name, listener)

    def detach(self, name: str, listener: Listener) -> None:
        """Take a listener off, if it is there."""
        listeners = self.points[name].listeners
        for i, each in enumerate(listeners):
            if each is listener:
                del listeners[i]
                self.listening -= 1
                self.points[name].step = None
        self.release_thread()

    def watch(self, watcher: Watcher) -> None:
        """Show every call to a watcher."""
        self.claim_thread()
        self.watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """No longer show calls to a watcher."""
        self.watchers = [w for w in self.watchers if w is not watcher]
        if not self.watchers:
            self.pipeline.forget()
        self.release_thread()

    def claim_thread(self) -> None:
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

    def release_thread(self) -> None:
        """Let other threads set hooks, once nobody listens."""
        if not self.listening and not self.watchers:
            self.owner = None

    # What a pass is run under.

    def _fresh_context(self) -> None:
        self._witness: Witness | None = None
        self._context: ContextVar[PassContext] = ContextVar("context", default=NOTHING)
        self._inputs: ContextVar[dict[str, Any] | None] = ContextVar("inputs", default=None)

    @property
    def context(self) -> PassContext:
        """What a pass is run under in this thread and task."""
        return self._context.get()

    @property
    def couplings(self) -> Mapping[int, Coupling]:
        """What acts inside the attention of each layer."""
        return self.context.couplings

    @property
    def now(self) -> dict[str, Any] | None:
        """The transformer's arguments in the call under way, if one is."""
        return self._inputs.get()

    @contextmanager
    def under(self, **changes: Any) -> Iterator[None]:
        """Run passes under another context; what was in force before comes back.

        Args:
            changes: fields of `PassContext`.
        """
        token = self._context.set(replace(self.context, **changes))
        try:
            yield
        finally:
            self._context.reset(token)

    @contextmanager
    def part(self, span: Span, stream: Tensor | None = None) -> Iterator[None]:
        """Run only the blocks start..end-1, from a given stream [batch, token, d_model] and up to
        `StoppedAtLayer`.
        """
        blocks = self.family.blocks(self.transformer)
        embed = self.points["hook_embed"]
        with (
            self.under(span=span, stream=stream),
            only(span, stream, self.family, blocks, embed, lambda: self.now or {}),
        ):
            yield

    # What a forward goes through.

    @contextmanager
    def forward(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Surrounds each forward of the transformer: checks the inputs, tells the watchers."""
        self.family.check_input(self.transformer, inputs)
        me = get_ident()
        self._refuse_unhookable(me)
        self.running.append(me)
        token = self._inputs.set(inputs)
        begun: list[Watcher] = []
        finished = False
        call = self._describe(inputs) if self.watchers else None
        try:
            if call is None:
                yield
            else:
                for watcher in tuple(self.watchers):
                    watcher.begin(call)
                    begun.append(watcher)
                call.edits = list(self._edits_now())
                with self.witnessing() as call.witness:
                    yield
            finished = True
        except StoppedAtLayer:
            finished = True
            raise
        finally:
            self.running.remove(me)
            self._inputs.reset(token)
            for watcher in begun:
                assert call is not None
                watcher.end(call, finished)

    def _refuse_unhookable(self, me: int) -> None:
        """Raise RuntimeError where somebody listens, and hooks would see something else than they
        should.
        """
        if not (self.listening or self.watchers):
            return
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
        if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise InvalidState(
                "Gradient checkpointing runs each block twice, and so would run each hook "
                "twice; call transformer.disable_gradient_checkpointing(), or use "
                "torch.no_grad()."
            )

    def _describe(self, inputs: dict[str, Any]) -> Call:
        """The call under way, as watchers are shown it."""
        family, context = self.family, self.context
        x, t = family.latents(self.transformer, inputs), family.timesteps(self.transformer, inputs)
        classes = inputs.get(family.labels_name)
        labels = classes if isinstance(classes, Tensor) else context.labels
        branch, place = self.pipeline.now(self.transformer, family.batch_order, inputs, len(x))
        rest = {k: v for k, v in inputs.items() if k not in (family.x_name, family.t_name)}
        return Call(
            inputs=inputs,
            x=x if context.stream is None else context.stream,
            t=t,
            condition=Condition.numbered(rest, labels),
            labels=labels,
            context=context,
            kernels=Kernels.now(x.device.type),
            branch=branch,
            place=place,
            grid=tuple(family.grid(self.transformer, inputs)),
        )

    @contextmanager
    def witnessing(self) -> Iterator[Witness]:
        """Take the checksums of the streams of one pass; gives the dict that they go to."""
        if self._witness is not None:  # whoever runs the pass takes them already
            yield self._witness
            return
        witness = self._witness = {}
        observer = Observer(lambda value, point: witness.update({point.name: checksum(value)}))
        points = [self.points[name] for name in self.witnessed]
        try:
            for point in points:
                point.listeners.append(observer)  # last, so after all edits
            yield witness
        finally:
            self._witness = None
            for point in points:
                if observer in point.listeners:
                    point.listeners.remove(observer)

    def _edits_now(self) -> Iterator[tuple[str, Editor]]:
        for name, point in self.points.items() if self.listening else ():
            for listener in point.listeners:
                if isinstance(listener, Editor) and (frozen := listener.frozen()):
                    yield name, frozen

    # Passes beside the user's own.

    @contextmanager
    def alone(self, listeners: Iterable[tuple[str, Listener]]) -> Iterator[None]:
        """Run with only these listeners, no watchers and a fresh context; restore all afterwards.

        Args:
            listeners: (hook name, listener) that hear this pass.

        Raises:
            RuntimeError: inside a hook, while the model runs.
        """
        if get_ident() in self.running:
            raise InvalidState(
                "Activations can't be recomputed inside a hook, while the model runs; read them "
                "afterwards."
            )
        self.claim_thread()
        points = self.points
        kept = {name: (p.listeners, p.step) for name, p in points.items() if p.listeners}
        state = self.watchers, self.listening
        token = self._context.set(NOTHING)
        for name in kept:
            points[name].listeners = []
        self.watchers, self.listening = [], 0
        try:
            for name, listener in listeners:
                points[name].add(listener)
                self.listening += 1
            yield
        finally:
            for name, point in points.items():
                if point.listeners or name in kept:
                    point.listeners, point.step = kept.get(name, ([], None))
            self.watchers, self.listening = state
            self._context.reset(token)
            self.release_thread()

    def stopping(self, name: str) -> list[tuple[str, Listener]]:
        """What ends a pass at a hook point, for a pass of which nothing later is wanted.

        Nothing where accelerate or diffusers load weights around modules' forwards: an exception
        would pass over their putting them away again, so such a pass runs to its end.
        """
        modules = [self.transformer]
        for module in modules:  # plain attributes: a Module's own way of asking is ten times slower
            own = {} if module is None else vars(module)
            if "_hf_hook" in own or "_diffusers_hook" in own:
                return []
            modules.extend(own.get("_modules", {}).values())
        return [(name, Observer(stop))]

    def unembed(self, stream: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What follows the last block, alone, with the conditioning of these arguments and all hook
        points silent.
        """
        kept = [(p, p.listeners) for p in self.points.values() if p.layer() is None]
        for point, _ in kept:
            point.listeners = []
        token = self._inputs.set(inputs)
        try:
            with self.part((len(self.family.blocks(self.transformer)), None), stream):
                own = self.replaced[0][0]
                answer = own.answer(own.own(**inputs, return_dict=False)[0])  # type: ignore[attr-defined]
            return self.family.output(self.transformer, answer, inputs)
        finally:
            self._inputs.reset(token)
            for point, listeners in kept:
                point.listeners = listeners

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model keeps its points and loses who listened to the original."""
        kept = ("family", "transformer", "sites", "points", "replaced", "witnessed")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.watchers, self.listening, self.users = [], 0, 0
        self.owner, self.running = None, []
        self.pipeline = PipelineFrame()
        self._fresh_context()
