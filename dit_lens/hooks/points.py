"""Hook points: the places in a forward pass where someone may listen.

A `HookPoint` is an identity function with a list of listeners, called as `x = point(x)`. It is a
plain object and not an `nn.Module`: nothing appears in `state_dict`, and a point where nobody
listens costs one truth test.

Two kinds of listener share the list, editors first, each kind in the order of its coming:

- an *observer* gets the very tensor that flows on, after all edits, and must not touch it
  (recorders, probes: no copy);
- an *editor*, the user's `fn(activation, hook)`, gets a copy and may change it in place, as
  TransformerLens users do: the stream is often one tensor under two names (`resid_post` of a block,
  `resid_pre` of the next), and what was recorded under the first must not change when the second is
  edited. Returning None changes nothing; a function that changed its copy in place and returned
  None most likely forgot to return it, and is told so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidType, InvalidValue
from .names import NamesFilter, layer_of

HookFunction = Callable[..., Any]
_order = count()

LOCK = RLock()
"""Held while it changes who listens; one for all models, as whoever holds it may let another go."""


@dataclass(frozen=True)
class Hearing:
    """Which listeners a pass goes through.

    Attributes:
        scopes: of those who listen to passes of one scope only, those of these.
        alone: whether all others stay silent.
    """

    scopes: tuple[object, ...] = ()
    alone: bool = False

    def hears(self, listener: Listener) -> bool:
        """Whether a pass goes through a listener.

        Args:
            listener: at some hook point.
        """
        if listener.scope is None:
            return not self.alone
        for scope in self.scopes:  # no `any`: this is asked at every point of every pass
            if scope is listener.scope:
                return True
        return False


NOT_LOOKED: tuple[None, tuple[Listener, ...]] = None, ()
"""What a hook point knows of its listeners after one has come or gone."""


class Heard(Protocol):
    """What says who is heard, and may say otherwise at any time."""

    @property
    def top(self) -> Hearing: ...


def pairs_of(name: str, hooks: Any) -> list[tuple[NamesFilter, HookFunction]]:
    """Hooks or edits, pairs of a names filter and a function; raises InvalidType for anything else.

    Args:
        name: of the argument.
        hooks: the argument.
    """
    expected = "a list of pairs (names, fn(activation, hook))"
    found = arguments.listed(name, hooks, expected, fewest=0)
    for pair in found:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise arguments.refusal(
                name, pair, "pairs (names, fn(activation, hook))", wrong_type=True
            )
        arguments.function(f"{name}: fn", pair[1], "fn(activation, hook)")
    return [(names, fn) for names, fn in found]


class HookPoint:
    """One named place in the forward pass, with TransformerLens's `name`, `layer()` and `ctx`.

    Attributes:
        name: the full hook name.
        ctx: a dict for the user's hook functions to keep things in.
        step: for an edit of a trace, and for hooks that were set after it, the denoising step of
            the call under way (0 the noisiest); otherwise None.
        branch: with it, the branch of guidance of the call, as the pipeline tells: "cond",
            "uncond", "skip", "cond | uncond" of a batch of both, or "".
        changed: whether an editor has replaced the value in the latest call.
        attached: all listeners, whoever's passes they listen to.
        hearing: which of them are heard in this thread and task is on its top; None is all.
    """

    __slots__ = ("name", "ctx", "step", "branch", "changed", "attached", "hearing", "_found")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[str, Any] = {}
        self.step: int | None = None
        self.branch = ""
        self.changed = False
        self.attached: tuple[Listener, ...] = ()
        self.hearing: Heard | None = None
        self._found: tuple[Hearing | None, tuple[Listener, ...]] = NOT_LOOKED

    def __call__(self, x: Tensor) -> Tensor:
        if not self.attached:
            return x
        listeners = self.listeners
        if listeners:
            self.changed, self.step, self.branch = False, None, ""  # of another call
        for listener in listeners:
            x = listener(x, self)
        return x

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Those who listen to the pass under way in this thread and task."""
        if not self.attached:
            return ()
        hearing = EVERYBODY if self.hearing is None else self.hearing.top
        found = self._found
        if found[0] is not hearing:
            with LOCK:  # nobody comes or goes in between
                found = self._found = hearing, tuple(filter(hearing.hears, self.attached))
        return found[1]

    def layer(self) -> int | None:
        """The block this point belongs to, or None for the points before and after the blocks."""
        return layer_of(self.name)

    def add(self, listener: Listener) -> None:
        """Insert in its place: editors before observers, older before younger."""
        with LOCK:
            self.attached = tuple(sorted((*self.attached, listener), key=lambda each: each.order))
            self._found = NOT_LOOKED

    def drop(self, listener: Listener) -> None:
        """Take a listener off, if it is there."""
        with LOCK:
            self.attached = tuple(each for each in self.attached if each is not listener)
            self._found = NOT_LOOKED

    def wants(self, kind: type) -> bool:
        return any(isinstance(listener, kind) for listener in self.listeners)

    @property
    def edited(self) -> bool:
        """Whether what the point returned must be computed with: a value that an editor replaced in
        the latest call, or one through which a gradient is awaited.
        """
        return bool(self.listeners) and (self.changed or self.wants(BackwardEditor))

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, {len(self.attached)} listening)"

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return HookPoint, (self.name,)  # a copied or unpickled model starts with nobody listening


EVERYBODY = Hearing()
"""What a plain pass goes through."""


class Listener:
    """Something attached to a hook point; `order` is its place among the listeners there. With a
    `scope` it listens to passes of that scope only. `in_parts` says whether it understands a step
    whose batch goes through the model in several passes.
    """

    late = False
    scope: object = None
    in_parts = False

    def __init__(self) -> None:
        self.order = (self.late, next(_order))

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        raise NotImplementedError


class Observer(Listener):
    """Calls `fn(activation, point)` with the live tensor and passes it on unchanged."""

    late = True

    def __init__(self, fn: Callable[[Tensor, HookPoint], object]) -> None:
        super().__init__()
        self.fn = fn

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        self.fn(x, point)
        return x


class Editor(Listener):
    """Calls the user's `fn(activation, hook)`; what it returns, if anything, goes on in place of
    the activation.

    `now` says whether the edit applies to the call under way, at which step, and of which branch of
    guidance; None means always.
    """

    def __init__(
        self, fn: HookFunction, now: Callable[[], tuple[bool, int, str]] | None = None
    ) -> None:
        super().__init__()
        self.fn, self.now, self.by_keyword = fn, now, takes_hook_by_keyword(fn)

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        if self.now is not None:
            active, step, branch = self.now()
            if not active:
                return x
            point.step, point.branch = step, branch
        copy = x.clone()
        before = version(copy)
        new = self.fn(copy, hook=point) if self.by_keyword else self.fn(copy, point)
        if new is None:
            refuse_changed(copy, x, before, point, "activation")
            if not copy.requires_grad:
                return x
            return laid_out(copy, x)  # the user may have kept the copy to ask for its .grad
        point.changed = True
        new = checked(new, x, point)
        # what flows on may be changed in place, and what the user returned is the user's
        return new if new is copy else new.clone()

    def frozen(self) -> Editor | None:
        """This edit as it acts in the call under way, to be replayed later; None if it does not
        act.
        """
        now = None if self.now is None else self.now()
        if now is not None and not now[0]:
            return None
        twin = Editor(self.fn, None if now is None else lambda: now)
        twin.order = self.order
        return twin


class BackwardEditor(Listener):
    """Calls `fn(gradient, hook)` in the backward pass; what it returns, if anything, replaces the
    gradient.
    """

    def __init__(self, fn: HookFunction) -> None:
        super().__init__()
        self.fn, self.by_keyword = fn, takes_hook_by_keyword(fn)

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        if not x.requires_grad:
            raise InvalidState(
                f"A backward hook waits at {point.name!r}, but no gradient flows there: "
                "gradients are off, or neither the weights before it nor the input require them."
            )

        step = point.step  # by the time of the backward pass it is that of a later call

        def on_grad(grad: Tensor) -> Tensor | None:
            point.step = step
            copy = grad.clone()  # autograd may have given the same tensor to another branch
            before = version(copy)
            new = self.fn(copy, hook=point) if self.by_keyword else self.fn(copy, point)
            if new is not None:
                return checked(new, grad, point)
            refuse_changed(copy, grad, before, point, "gradient")
            return None

        x = x.view_as(x)  # a tensor of its own: the stream may be one tensor under two names
        x.register_hook(on_grad)
        return x


def version(x: Tensor) -> int:
    """How often a tensor was changed in place, as PyTorch counts it; 0 in inference mode."""
    return 0 if x.is_inference() else x._version


def refuse_changed(copy: Tensor, x: Tensor, before: int, point: HookPoint, what: str) -> None:
    """Raise InvalidState where a hook that returned None changed its copy of x in place.

    Version counters say nothing in inference mode, and miss what happens through `.data` or NumPy,
    so values are compared too; on an accelerator, where that waits for the device, only in
    inference mode.
    """
    changed = version(copy) != before
    if not changed and (copy.device.type == "cpu" or copy.is_inference()):
        now, then = copy.detach(), x.detach()
        with suppress(RuntimeError):  # inside torch.func.vmap no value can be looked at
            changed = not torch.equal(now, then)
            changed = changed and not torch.allclose(now, then, rtol=0, atol=0, equal_nan=True)
    if changed:
        raise InvalidState(
            f"The hook at {point.name!r} changed its {what} in place and returned None; return it."
        )


def laid_out(copy: Tensor, x: Tensor) -> Tensor:
    """`copy`, equal to x, in the memory layout of x: in another one, other kernels would read it,
    and the last bits change.
    """
    if copy.stride() == x.stride():
        return copy
    found: Tensor = _SameLayout.apply(copy, x.detach())
    return found


class _SameLayout(torch.autograd.Function):
    """`copy` for the graph, `x` for the values: equal, in another memory layout."""

    @staticmethod
    def forward(_ctx: Any, _copy: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def checked(new: object, old: Tensor, point: HookPoint) -> Tensor:
    """What a hook returned, if it can take the activation's place; otherwise one clear error."""
    if not isinstance(new, Tensor):
        raise InvalidType(
            f"The hook at {point.name!r} returned a {type(new).__name__}; expected a tensor or "
            "None."
        )
    if new.shape != old.shape:
        raise InvalidValue(
            f"The hook at {point.name!r} returned shape {list(new.shape)}; expected "
            f"{list(old.shape)}, that of the activation."
        )
    if new.dtype != old.dtype or new.device != old.device:
        raise InvalidValue(
            f"The hook at {point.name!r} returned {new.dtype} on {new.device}; expected "
            f"{old.dtype} on {old.device}: use .to(activation)."
        )
    return new


def takes_hook_by_keyword(fn: HookFunction) -> bool:
    """TransformerLens passes `hook=`; other argument names still work, by position.

    Raises InvalidType for what can't be called with an activation and a hook, where that is known.
    """
    expected = "expected a function fn(activation, hook)."
    if not callable(fn):
        raise InvalidType(f"{arguments.shown(fn)} is not a hook; {expected}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # builtins and some C functions have no signature
        return False
    named = signature.parameters.get("hook")
    by_keyword = named is not None and named.kind is not inspect.Parameter.POSITIONAL_ONLY
    try:
        signature.bind(None, hook=None) if by_keyword else signature.bind(None, None)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise InvalidType(
            f"The hook {name}{signature} can't be called with an activation and a hook ({error}); "
            f"{expected}"
        ) from None
    return by_keyword


class StopForward(Exception):
    """Ends a forward pass early, once everything wanted from it has been seen."""


def stop(_x: Tensor, point: HookPoint) -> None:
    """An observer's function that ends the pass at its point."""
    raise StopForward(point.name)
