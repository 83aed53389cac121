"""Wiring: a model's hook points, put into it and taken out again without a trace.

One `Wiring` belongs to one transformer, however many `HookedDiT`s and traces look at it. It puts the family's `Forward`s into the
module instances (into accelerate's `_old_forward` where accelerate sits on `forward`, so offloading stays in force), keeps the list
of who listens, and guards what would otherwise go silently wrong: a second thread running through the first one's hooks, a
hook that calls its own model, compiled or checkpointed forwards that skip or repeat hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .families import family_of
from .families.base import Forward
from .hook_points import Editor, HookPoint, Listener

Span = tuple[int | None, int | None]


@dataclass
class Call:
    """One call of the transformer: all that its forward depends on, and the edits in force."""

    x: Tensor
    t: Tensor
    y: Tensor
    span: Span = (None, None)
    grad: bool = False
    autocast: torch.dtype | None = None
    edits: list[tuple[str, Editor]] = field(default_factory=list)
    twin: tuple[str, ...] | None = None
    memo: dict[Any, Any] = field(
        default_factory=dict, repr=False
    )  # what sites look up, once a call: each costs a GPU a wait

    def kept(self) -> Call:
        """A copy that outlives the call, whatever the caller does to its tensors."""
        x, t, y = (v.detach().clone() for v in (self.x, self.t, self.y))
        return Call(x, t, y, self.span, self.grad, self.autocast, self.edits, self.twin)


class Watcher(Protocol):
    """Told of every call (traces are)."""

    def begin(self, call: Call) -> None: ...
    def end(self, call: Call, finished: bool) -> None: ...


class Handle:
    """Takes one listener off again; `remove()` twice is harmless."""

    def __init__(self, wiring: Wiring, name: str, listener: Listener) -> None:
        self.wiring, self.name, self.listener = wiring, name, listener

    def remove(self) -> None:
        self.wiring.detach(self.name, self.listener)


class Wiring:
    """The hook points of one transformer; `Wiring.of(transformer)` finds or makes them."""

    def __init__(self, transformer: nn.Module) -> None:
        _refuse_compiled(transformer)
        self.family = family_of(transformer)
        self.family.check_model(transformer)
        self.transformer = transformer
        self.sites = self.family.sites(transformer)
        self.points = {name: HookPoint(name) for name in self.sites}
        self.watchers: list[Watcher] = []
        self.listening = 0
        self.span: Span = (None, None)
        self.twin: tuple[str, ...] | None = None
        self.owner: int | None = None
        self.running: list[int] = []
        self.temporary = False  # put in by a trace, to leave with the last of them
        self.replaced: list[tuple[Forward, str, Any]] = []
        forwards = self.family.forwards(transformer, self.points, self)
        for forward in forwards:
            _refuse_replaced(forward.module)
        for forward in forwards:
            slot = _slot(forward.module)
            self.replaced.append((forward, slot, forward.module.__dict__.get(slot)))
            forward.module.__dict__[slot] = forward

    @classmethod
    def of(cls, transformer: nn.Module) -> tuple[Wiring, bool]:
        """The transformer's wiring, and whether it was made just now."""
        for slot in ("forward", "_old_forward"):
            found = getattr(transformer.__dict__.get(slot), "wiring", None)
            if isinstance(found, Wiring):
                return found, False
        return cls(transformer), True

    @property
    def installed(self) -> bool:
        return bool(self.replaced)

    def remove(self) -> None:
        """Give every module its own forward back. Raises RuntimeError, and removes nothing, if somebody has replaced ours."""
        places = []
        for forward, _, original in self.replaced:
            here = [s for s in ("forward", "_old_forward") if forward.module.__dict__.get(s) is forward]
            if not here:
                theirs = forward.module.__dict__.get("forward")
                raise RuntimeError(
                    f"The forward of {type(forward.module).__name__} was replaced by {theirs!r} after dit_lens; "
                    "undo that first, then call remove() again."
                )
            places.append((forward.module, here[0], original))
        for module, slot, original in places:
            if original is not None:
                module.__dict__[slot] = original
            elif slot == "_old_forward":  # accelerate came after us and kept our forward there
                module.__dict__[slot] = type(module).forward.__get__(module)
            else:
                del module.__dict__[slot]
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
        self.release()

    def claim(self) -> None:
        """Hooks belong to the thread that set them: another thread's forward would run through them unasked."""
        if not self.installed:
            raise RuntimeError("This model's hook points were removed; wrap it again with dit_lens.HookedDiT(...).")
        me = get_ident()
        if (self.owner or me) != me or any(thread != me for thread in self.running):
            raise RuntimeError(
                "This model is in use by another thread; hooks belong to one thread at a time. "
                "Trace a copy (copy.deepcopy), or wait for the other to finish."
            )
        self.owner = me

    def release(self) -> None:
        if not self.listening and not self.watchers:
            self.owner = None

    # What a forward goes through.

    @contextmanager
    def forward(self, x: Tensor, t: Tensor | None, y: Tensor | None) -> Iterator[None]:
        """Surrounds each forward of the transformer: checks the inputs, tells the watchers."""
        if self.span[0] is None:
            self.family.check_input(self.transformer, x, t, y)
        me, active = get_ident(), self.listening or self.watchers
        if active:
            if self.owner != me:
                raise RuntimeError(
                    "This model is being traced or hooked in another thread; run a copy (copy.deepcopy) here."
                )
            if me in self.running:
                raise RuntimeError(
                    "The model was called from inside one of its own hooks; call a copy, or call it afterwards."
                )
            if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
                raise RuntimeError(
                    "Gradient checkpointing runs each block twice, and so would run each hook twice; "
                    "call transformer.disable_gradient_checkpointing(), or use torch.no_grad()."
                )
        self.running.append(me)
        call, finished = self.describe(x, t, y), False
        told: list[Watcher] = []
        try:
            if self.watchers:
                for watcher in tuple(self.watchers):
                    watcher.begin(call)
                    told.append(watcher)
                call.edits = [(n, e) for n, e in self.edits_now()]
            yield
            finished = True
        finally:
            self.running.remove(me)
            for watcher in told:
                watcher.end(call, finished)

    def describe(self, x: Tensor, t: Any, y: Any) -> Call:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Call(x, t, y, self.span, torch.is_grad_enabled(), autocast, twin=self.twin)

    def edits_now(self) -> Iterator[tuple[str, Editor]]:
        for name, point in self.points.items():
            for listener in point.listeners:
                if isinstance(listener, Editor) and (frozen := listener.frozen()):
                    yield name, frozen

    @contextmanager
    def part(self, span: Span) -> Iterator[None]:
        """Run only the blocks start..end-1: from a given stream, or up to a stream."""
        before, self.span = self.span, span
        try:
            yield
        finally:
            self.span = before

    @contextmanager
    def alone(self, listeners: Iterable[tuple[str, Listener]]) -> Iterator[None]:
        """For a recomputation: these listeners and no others, and no watchers; then everything as it was."""
        if get_ident() in self.running:
            raise RuntimeError(
                "Activations can't be recomputed inside a hook, while the model runs; read them afterwards."
            )
        self.claim()
        kept = {name: point.listeners for name, point in self.points.items()}
        state = self.watchers, self.listening, self.span
        steps = {name: point.step for name, point in self.points.items()}
        for point in self.points.values():
            point.listeners = []
        self.watchers, self.listening, self.span = [], 0, (None, None)
        try:
            for name, listener in listeners:
                self.points[name].add(listener)
                self.listening += 1
            yield
        finally:
            for name, point in self.points.items():
                point.listeners, point.step = kept[name], steps[name]
            self.watchers, self.listening, self.span = state
            self.release()

    def unembed(self, stream: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The family's last layer alone, with its hook points silent."""
        kept = [(point, point.listeners) for point in self.points.values() if point.layer() is None]
        for point, _ in kept:
            point.listeners = []
        try:
            output: Tensor = self.replaced[0][0].last_layer(stream, t, y)
            return output
        finally:
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
        }


def _slot(module: nn.Module) -> str:
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__ else "forward"


def _refuse_replaced(module: nn.Module) -> None:
    found = module.__dict__.get("forward")
    if found is not None and _slot(module) == "forward":
        raise RuntimeError(
            f"The forward of {type(module).__name__} was already replaced on the instance by {found!r}; "
            "undo that first (or wrap the model before it)."
        )


def _refuse_compiled(transformer: nn.Module) -> None:
    if hasattr(transformer, "_orig_mod") or any(m._compiled_call_impl is not None for m in transformer.modules()):
        raise RuntimeError(
            "The model is compiled: torch.compile ignores hooks added afterwards. Open the original instead "
            "(compiled._orig_mod, or load it again), and compile nothing while you look inside."
        )
