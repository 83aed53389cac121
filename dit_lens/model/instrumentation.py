"""Instrumentation: a model's hook points, put into it and taken out again without a trace.

One `Instrumentation` belongs to one transformer, however many `HookedDiT`s and traces look at it.
It puts the family's `Forward`s into the module instances (at the bottom of accelerate's and
diffusers' own hooks, so offloading stays in force), keeps the list of who listens, and guards what
would otherwise go silently wrong: another thread or task running through hooks that are not its
own, a hook that calls its own model, compiled or checkpointed forwards that skip or repeat hooks.

What belongs to one pass (couplings, which blocks run, checksums, who is heard) lies in `Layers`,
which each thread and each asyncio task has for itself. All that is put into the model is noted in a
`Taken` before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidState, InvalidValue
from ..families import family_of
from ..families.config import Condition
from ..families.forward_slot import (
    Place,
    find,
    held,
    paths_to,
    places,
    put_back,
    refuse_replaced,
    refuse_shared,
    slot,
)
from ..families.forwards import Forward
from ..families.offloading import looked_after, within
from ..families.registry import describe
from ..families.upstream import check_sources
from ..hooks.names import layer_of
from ..hooks.passes import Coupling, PassContext, Span
from ..hooks.points import EVERYBODY, LOCK, Editor, Hearing, HookPoint, Listener, Observer, stop
from .call import Call, Watcher
from .kernels import Kernels
from .partial import InjectStream, StandIn, StoppedAtLayer, replaced
from .pipeline_frame import PipelineFrame, Told, listen_no_more, listen_to
from .supported import refuse_cache, refuse_unfit
from .taken import Layers, Taken
from .witness import Prover, Witness, Witnessing, witnessed

NOTHING = PassContext()
"""A plain pass: all blocks, no coupling."""

OPENING = RLock()
"""Held while a model is opened; two threads that open one model get one instrumentation."""


@dataclass(frozen=True, eq=False)
class Here:
    """Who runs: a thread, and within it an asyncio task, if any."""

    thread: int
    task: asyncio.Task[Any] | None

    @classmethod
    def now(cls) -> Here:
        """Who runs this."""
        try:
            return cls(get_ident(), asyncio.current_task())
        except RuntimeError:  # no event loop runs here
            return cls(get_ident(), None)

    def lets(self, other: Here) -> bool:
        """Whether hooks that this one set may act on the other's passes: the same task, or any task
        if the hooks were set outside of all, or by one that is over.
        """
        anywhere = self.task is None or self.task.done()
        return self.thread == other.thread and (anywhere or self.task is other.task)


class Handle:
    """Takes one listener off again; `remove()` twice is harmless.

    Attributes:
        view: whose hook it is, which stays as long as somebody holds this.
    """

    def __init__(self, instrumentation: Instrumentation, name: str, listener: Listener) -> None:
        self.instrumentation, self.name, self.listener = instrumentation, name, listener
        self.view: object = None

    def remove(self) -> None:
        """Take the listener off."""
        self.instrumentation.detach(self.name, self.listener)


def labels_in(classes: Any, items: int) -> Tensor | None:
    """Labels [batch] or [1] in what a model is given; None for what is no number for each item, as
    one-hot rows are.

    Args:
        classes: its argument for labels.
        items: how many items it is called with.
    """
    if not isinstance(classes, Tensor) or classes.numel() not in (1, items):
        return None
    return classes.reshape(-1)


def silence(taken: Taken, module: nn.Module) -> None:
    """Take the user's own hooks off a module until `taken` gives them back."""
    own = vars(module)
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        if own.get(kind):
            taken.undo(own.__setitem__, kind, own[kind])
            own[kind] = type(own[kind])()


class Instrumentation:
    """The hook points of one transformer; `Instrumentation.of(transformer)` finds or makes them."""

    def __init__(
        self, transformer: nn.Module, trusted: bool = False, user: object | None = None
    ) -> None:
        refuse_unfit(transformer)
        self.family = family_of(transformer)
        self.family.check_model(transformer)
        self.transformer = transformer
        self.sites = self.family.sites(transformer)
        self.points = {name: HookPoint(name) for name in self.sites}
        # Of a model that is only seen from outside not every stream can be read.
        streams = [] if self.family.read_only else witnessed(list(self.sites))
        self.witnessed = streams or ["hook_sample"]
        self.replaced: list[tuple[Forward, Any]] = []
        self.paths: list[Place] | None = []
        self._fresh()
        if user is not None:
            self.users.add(user)
        try:
            self._put_in(trusted)
        except BaseException:
            self._take_out()
            raise

    def _put_in(self, trusted: bool = False) -> None:
        """Put our forwards in: what they compute must still be what diffusers computes, and nobody
        else may sit there.
        """
        forwards = self.family.forwards(self.transformer, self.points, self)
        refuse_shared(self.transformer, [forward.module for forward in forwards])
        if not trusted:
            check_sources(self.family, forwards, lambda other: Instrumentation(other, trusted=True))
        for forward in forwards:
            refuse_replaced(forward.module)
        for forward in forwards:
            holder, key = slot(forward.module)
            self.replaced.append((forward, holder.get(key)))
            holder[key] = forward
        listen_to(self.transformer)
        self.paths = paths_to(self.transformer, [forward.module for forward in forwards])

    def _give_back(self) -> None:
        """Give every module its own forward back; begun again, it goes on."""
        listen_no_more(self.transformer)
        for forward, original in reversed(self.replaced):
            place = find(forward.module, forward)
            if place is not None:
                put_back(forward.module, place, original)
        self.replaced, self.paths = [], []

    def _put_in_anew(self) -> None:
        """After a module was replaced. The hook points stay, so they must be the same ones."""
        self._give_back()
        if self.family.sites(self.transformer) != self.sites:
            raise InvalidState(
                "A module of this model was replaced by one that has other hook points; open it "
                "again: remove(), then dit_lens.HookedDiT(...)."
            )
        self._stand_ins.clear()
        self._put_in()

    @property
    def moved(self) -> str | None:
        """The path of a module that was replaced since our forwards were put in, as by an adapter
        that wraps it; None where all are in place.
        """
        if self.paths is None:  # of a copy
            self.paths = paths_to(self.transformer, [each.module for each, _ in self.replaced])
        for children, name, module, path in self.paths:
            if children.get(name) is not module:
                return path
        return None

    def _fresh(self) -> None:
        """Nobody listens, and no pass is under way."""
        self.watchers: list[Watcher] = []
        self.ears: set[tuple[str, Listener]] = set()  # who listens to every pass
        self.readers: set[object] = set()  # passes beside the user's own
        self.blocks: set[object] = set()  # `with` blocks of hooks
        self.users: set[object] = set()  # HookedDiTs and open traces; the last takes the points out
        self.owned: dict[object, list[tuple[str, Listener]]] = {}  # hooks that go with their user
        self.running: list[Here] = []
        self.leaving = False
        self.pipeline = PipelineFrame()
        self._owner: Here | None = None  # whose hooks are on
        self._stand_ins: dict[int, StandIn] = {}
        self._lens: tuple[dict[str, Any] | None, dict[str, Any]] = None, {}
        self.proving: set[object] = set()  # for whom the streams are listened to
        self._witness: Layers[Witnessing | None] = Layers("witness", None)
        self.prover = Prover(self._witness)
        self._context = Layers("context", NOTHING)
        self._inputs: Layers[dict[str, Any] | None] = Layers("inputs", None)
        self._hearing = Layers("hearing", EVERYBODY)
        self._proven = EVERYBODY, replace(EVERYBODY, scopes=(self.prover,))
        for point in self.points.values():
            point.hearing = self._hearing

    @classmethod
    def found(cls, transformer: nn.Module) -> Instrumentation | None:
        """The transformer's instrumentation, if it has one."""
        for holder, key in places(transformer):
            forward = holder.get(key)
            # and not accelerate's wrapper, which takes over the attributes of what it wraps
            found = getattr(forward, "current_pass", None) if isinstance(forward, Forward) else None
            if isinstance(found, Instrumentation):
                return found
        return None

    @classmethod
    def of(cls, transformer: nn.Module, user: object | None = None) -> Instrumentation:
        """The transformer's instrumentation, made if it has none.

        Args:
            transformer: the transformer.
            user: who looks at it from now on, until `let_go(transformer, user)`.
        """
        with OPENING:
            with LOCK:
                found = cls.found(transformer)
                if found is not None and user is not None:
                    found.users.add(user)
            return cls(transformer, user=user) if found is None else found

    @classmethod
    def describe(cls, transformer: nn.Module, *described: Any) -> None:
        """Open a transformer as its user describes it, from now on.

        Args:
            transformer: the transformer.
            *described: as for `families.registry.describe`.

        Raises:
            RuntimeError: if it is open already, and otherwise.
        """
        with OPENING:
            found = cls.found(transformer)  # of a copy too
            if found is None:
                refuse_unfit(transformer)
                describe(transformer, *described)
            elif found.family.described != described:
                raise InvalidState(
                    f"This {type(transformer).__name__} is open already, and otherwise; call "
                    "remove() on the HookedDiT that holds it first."
                )

    @classmethod
    def let_go(cls, transformer: nn.Module, user: object) -> None:
        """One less looks at this transformer; the last one takes the hook points out.

        Args:
            transformer: the transformer.
            user: who was given to `of`.
        """
        with LOCK:
            found = cls.found(transformer)
            if found is not None:
                found.drop_hooks(user)
                found.users.discard(user)
                if not (found.users or found.busy or found.running):
                    found.remove()

    def count_time(self, scheduler: Any, user: object) -> None:
        """Tell the family which scheduler its timesteps are of.

        Args:
            scheduler: that a view was opened with, or None.
            user: the view.

        Raises:
            RuntimeError: if somebody else has the model open with one that counts otherwise.
        """
        with LOCK:
            self.family.count_time(scheduler, alone=self.users <= {user})

    @property
    def installed(self) -> bool:
        return bool(self.replaced)

    @property
    def busy(self) -> bool:
        """Whether somebody listens or watches."""
        return bool(self.ears or self.watchers or self.readers)

    def remove(self) -> None:
        """Give every module its own forward back.

        Raises:
            RuntimeError: if somebody has replaced ours, or a pass is under way elsewhere; then
                nothing is removed.
        """
        with LOCK:
            me = get_ident()
            if any(each.thread != me for each in self.running):
                raise InvalidState(
                    "This model is in use by another thread or task; wait for it to finish, then "
                    "remove the hook points."
                )
            if not self.leaving:
                for forward, _ in self.replaced:
                    held(forward.module, forward)
            self.leaving = True
            self._take_out()

    def _take_out(self) -> None:
        """Give back whatever of ours is there; begun again, it goes on. The transformer's own
        forward comes last, as by it what is left is found again.
        """
        for point in self.points.values():
            for listener in point.attached:
                point.drop(listener)
        self._give_back()
        self._fresh()

    # Who listens.

    def attach(self, name: str, listener: Listener) -> Handle:
        """Add a listener at a hook point."""
        point, handle = self.points[name], Handle(self, name, listener)
        with LOCK:
            self.claim()
            self.ears.add((name, listener))
            point.add(listener)
        return handle

    def detach(self, name: str, listener: Listener) -> None:
        """Take a listener off, if it is there."""
        with LOCK:
            point = self.points[name]
            point.drop(listener)
            point.step, point.branch = None, ""
            self.ears.discard((name, listener))

    def drop_hooks(self, user: object) -> list[str]:
        """Take off the hooks that go with a user; gives where they were.

        Args:
            user: who was given to `of`.
        """
        with LOCK:
            mine = [ear for ear in self.owned.get(user, ()) if ear in self.ears]
            for name, listener in mine:
                self.detach(name, listener)
            self.owned.pop(user, None)
            return [name for name, _ in mine]

    def watch(self, watcher: Watcher) -> None:
        """Show every call to a watcher."""
        with LOCK:
            self.claim()
            self.watchers = [*self.watchers, watcher]
            if watcher.proves:
                self._prove(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """No longer show calls to a watcher."""
        with LOCK:
            self.watchers = [w for w in self.watchers if w is not watcher]
            self._prove_no_more(watcher)
            if not self.watchers:
                self.pipeline.forget()

    def claim(self) -> None:
        """Hooks belong to the thread and task that set them: another's forward would run through
        them unasked.
        """
        if not self.installed:
            raise InvalidState(
                "This model's hook points were removed; wrap it again with dit_lens.HookedDiT(...)."
            )
        me = Here.now()
        theirs = self.busy and self._owner is not None and not self._owner.lets(me)
        if theirs or any(each.thread != me.thread for each in self.running):
            raise InvalidState(
                "This model is in use by another thread or task; hooks belong to one at a time. "
                "Trace a copy (copy.deepcopy), or wait for the other to finish."
            )
        if not (self.busy and self._owner is not None):
            if self.moved is not None and not self.running:
                self._put_in_anew()
            self._owner = me

    @property
    def owner(self) -> Here | None:
        """Whose hooks are on; None if nobody listens."""
        return self._owner if self.busy else None

    @property
    def listening(self) -> int:
        """How many listeners to every pass are attached, and how many passes beside the user's own
        are under way.
        """
        return len(self.ears) + len(self.readers)

    def require_parts(self) -> None:
        """Raise RuntimeError if somebody listens who would take a part of a step's batch for all of
        it.
        """
        order = list(self.sites)
        for name, listener in sorted(self.ears, key=lambda ear: order.index(ear[0])):
            if not listener.in_parts:
                kind = "An edit" if isinstance(listener, Editor) else "What listens"
                raise InvalidState(
                    f"{kind} at {name!r} sees a step's whole batch at once, and batch= would show "
                    "it in parts; expected batch=None here, an edit given to replay(edits=...), or "
                    "a probe with in_parts = True."
                )

    # What a pass is run under.

    @property
    def context(self) -> PassContext:
        """What a pass is run under in this thread and task."""
        return self._context.top

    @property
    def couplings(self) -> Mapping[int, Coupling]:
        """What acts inside the attention of each layer."""
        return self.context.couplings

    @property
    def now(self) -> dict[str, Any] | None:
        """The transformer's arguments in the call under way, if one is."""
        return self._inputs.top

    @contextmanager
    def under(self, **changes: Any) -> Iterator[None]:
        """Run passes under another context; what was in force before comes back.

        Args:
            changes: fields of `PassContext`.
        """
        with Taken() as taken:
            self._context.put(taken, replace(self.context, **changes))
            yield

    @contextmanager
    def part(self, span: Span, stream: Tensor | None = None) -> Iterator[None]:
        """Run only the blocks start..end-1, from a given stream [batch, token, d_model] and up to
        `StoppedAtLayer`.
        """
        with Taken() as taken:
            self._context.put(taken, replace(self.context, span=span, stream=stream))
            blocks = self.family.blocks(self.transformer)
            user = object()
            for layer in replaced(span, len(blocks)):
                stand_in = self._stand_in(layer, blocks)
                taken.undo(stand_in.leave, user)
                stand_in.enter(user)
            if stream is not None and span[0] == 0:
                heard = self._hearing.top
                self._hearing.put(taken, replace(heard, scopes=(*heard.scopes, user)))
                put_in = InjectStream(stream, user)
                taken.undo(self.points["hook_embed"].drop, put_in)
                self.points["hook_embed"].add(put_in)
            yield

    def _stand_in(self, layer: int, blocks: list[nn.Module]) -> StandIn:
        """What stands in for a block: the one that is there, or else a new one, as another tool may
        have put its own on top.
        """
        with LOCK:
            found = self._stand_ins.get(layer)
            if found is None or not found.there:
                found = StandIn(self.family, blocks, layer, lambda: (self.context, self.now or {}))
                self._stand_ins[layer] = found
            return found

    # What a forward goes through.

    @contextmanager
    def forward(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Surrounds each forward of the transformer: checks the inputs, tells the watchers."""
        self.family.check_input(self.transformer, inputs)
        me = Here.now()
        with Taken() as taken:
            taken.undo(self._ended, me)
            with LOCK:
                self._refuse_unhookable(me)
                self.running.append(me)
            self._inputs.put(taken, inputs)
            watchers = () if self._hearing.top.alone else tuple(self.watchers)
            with self._watched(self._describe(inputs), watchers) if watchers else taken:
                yield

    def _ended(self, me: Here) -> None:
        with LOCK:
            self.running = [each for each in self.running if each is not me]
            self._lens = None, {}

    @contextmanager
    def _watched(self, call: Call, watchers: Sequence[Watcher]) -> Iterator[None]:
        """Show a call to the watchers, and whether it was finished."""
        begun: list[Watcher] = []
        finished = False
        try:
            for watcher in watchers:
                watcher.begin(call)
                begun.append(watcher)
            if any(watcher.proves for watcher in watchers):
                call.edits = list(self._edits_now())
                with self.witnessing() as call.witness:
                    yield
            else:
                yield
            finished = True
        except StoppedAtLayer:
            finished = True
            raise
        finally:
            for watcher in begun:
                watcher.end(call, finished)

    def _refuse_unhookable(self, me: Here) -> None:
        """Raise RuntimeError where somebody listens, and hooks would see something else than they
        should.
        """
        owner = self.owner
        if owner is None:
            return
        refuse_cache(self.transformer)
        if self.moved is not None:
            raise InvalidState(
                f"The module at {self.moved!r} was replaced while somebody listens, and what it "
                "does would not be seen; leave the trace or the hooks, then trace again."
            )
        if not owner.lets(me):
            raise InvalidState(
                "This model is being traced or hooked in another thread or task; run a copy "
                "(copy.deepcopy) here."
            )
        if any(each.thread == me.thread for each in self.running):
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
        missing = [name for name in (family.x_name, family.t_name) if name not in inputs]
        if missing:
            raise InvalidValue(
                f"{type(self.transformer).__name__} was called without {missing[0]!r}, and can't "
                f"be traced so; got {', '.join(map(repr, inputs)) or 'no arguments'}."
            )
        x, t = family.latents(self.transformer, inputs), family.timesteps(self.transformer, inputs)
        labels = labels_in(inputs.get(family.labels_name), len(x))
        labels = context.labels if labels is None else labels
        if context.step is None:
            known = family.batch_order, family.prompt_names
            told = self.pipeline.now(self.transformer, *known, inputs, len(x))
        else:  # a loop of ours says so itself, whoever called it
            told = Told(branch=context.branch)
        rest = {k: v for k, v in inputs.items() if k not in (family.x_name, family.t_name)}
        return Call(
            inputs=inputs,
            x=x if context.stream is None else context.stream,
            t=t,
            condition=Condition.numbered(rest, labels),
            labels=labels,
            prompts=told.prompts,
            negatives=told.negatives,
            context=context,
            kernels=Kernels.now(x.device.type),
            branch=told.branch,
            place=told.place,
            grid=tuple(family.grid(self.transformer, inputs)),
        )

    def is_witness(self, listener: Listener) -> bool:
        """Whether a listener only takes checksums of the pass under way.

        Args:
            listener: at some hook point.
        """
        return listener is self.prover

    @contextmanager
    def witnessing(self) -> Iterator[Witness]:
        """Take the checksums of the streams of one pass; gives the dict that they go to."""
        under_way = self._witness.top
        if under_way is not None:  # whoever runs the pass takes them already
            yield under_way.witness
            return
        taking = Witnessing()
        with Taken() as taken:
            self._witness.put(taken, taking)
            self._hearing.put(taken, self._proving_too(self._hearing.top))
            taken.undo(self._prove_no_more, taking)
            self._prove(taking)
            try:
                yield taking.witness
            except StoppedAtLayer:
                taking.finished()
                raise
            taking.finished()

    def _proving_too(self, heard: Hearing) -> Hearing:
        """Who hears a pass whose checksums are taken: the same for the same, which hook points know
        again.
        """
        if self._proven[0] is not heard:
            self._proven = heard, replace(heard, scopes=(*heard.scopes, self.prover))
        return self._proven[1]

    def _prove(self, user: object) -> None:
        """Listen to the streams, for passes that take checksums. Whoever runs many such passes asks
        once, as to come and to go at each stream costs a small model a hundredth of its time.
        """
        with LOCK:
            if not self.proving:
                for name in self.witnessed:
                    self.points[name].add(self.prover)
            self.proving.add(user)

    def _prove_no_more(self, user: object) -> None:
        with LOCK:
            self.proving.discard(user)
            if not self.proving:
                for name in self.witnessed:
                    self.points[name].drop(self.prover)

    def _put_on(self, taken: Taken, listeners: Iterable[tuple[str, Listener]]) -> None:
        """Add listeners that have a scope of their own, until `taken` gives them back."""
        added = [(self.points[name], listener) for name, listener in listeners]

        def take_off() -> None:
            for point, listener in added:
                point.drop(listener)

        taken.undo(take_off)
        for point, listener in added:
            point.add(listener)

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
        if any(each.thread == get_ident() for each in self.running):
            raise InvalidState(
                "Activations can't be recomputed inside a hook, while the model runs; read them "
                "afterwards."
            )
        scope = object()
        mine = [(name, copy(listener)) for name, listener in listeners]
        for _, listener in mine:
            listener.scope = scope
        steps = {name: self.points[name].step for name, _ in mine}

        def restore_steps() -> None:
            for name, step in steps.items():
                self.points[name].step = step

        with Taken() as taken:
            taken.undo(self.readers.discard, scope)
            with LOCK:
                self.claim()
                self.readers.add(scope)
            taken.undo(restore_steps)
            self._context.put(taken, NOTHING)
            self._witness.put(taken, None)
            self._hearing.put(taken, Hearing((scope,), alone=True))
            self._put_on(taken, mine)
            yield

    def stopping(self, name: str) -> list[tuple[str, Listener]]:
        """What ends a pass at a hook point, for a pass of which nothing later is wanted.

        Nothing where accelerate or diffusers load weights around modules' forwards: an exception
        would pass over their putting them away again, so such a pass runs to its end.
        """
        name, blocks = self.family.certain_at(name), self.family.blocks(self.transformer)
        passed_over = looked_after(self.transformer, blocks, layer_of(name))
        return [] if passed_over else [(name, Observer(stop))]

    def unembed(self, stream: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What follows the last block, alone, with the conditioning of these arguments; hook points
        and the module hooks of others are silent.
        """
        with Taken() as taken:
            self._hearing.put(taken, Hearing(alone=True))
            memo = self._memo_of(inputs)
            if not memo:  # what is called first calls modules inside of modules
                for module in within(self.transformer):
                    silence(taken, module)
            answer = self.family.final(self.transformer, stream, inputs, memo)
            if answer is None:  # the whole model, with nothing between embedding and last layer
                self._inputs.put(taken, inputs)
                with self.part((len(self.family.blocks(self.transformer)), None), stream):
                    answer = self.replaced[0][0].run(inputs)  # type: ignore[attr-defined]
            return self.family.output(self.transformer, answer, inputs)

    def _memo_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the last layer's conditioning is kept in: one dict for all readings with the very
        arguments of the pass under way, but for x, and otherwise a fresh one.
        """
        now = self._inputs.top
        same = now is not None and all(
            now.get(name) is value for name, value in inputs.items() if name != self.family.x_name
        )
        if not same:
            return {}
        if self._lens[0] is not now:
            self._lens = now, {}
        return self._lens[1]

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled model keeps its points and loses who listened to the original."""
        kept = ("family", "transformer", "sites", "points", "replaced", "witnessed")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.paths = None
        self._fresh()
