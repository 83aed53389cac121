"""Measurements that can be kept and shared: what `store=` and `engine=` do."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import arguments
from ..errors import InvalidState
from ..storage import versions
from .content import content, digest
from .engines import Engine, checked_engine
from .sending import Call
from .store import Store
from .work import Work, at, current, helped, scope

Function = TypeVar("Function", bound=Callable[..., Any])
USUAL = "usual"
"""What a model says of its `kernels` where nothing is chosen."""
ASIDE = ("store", "engine", "progress", "each")
"""Arguments that a result does not depend on."""


def measured(function: Function) -> Function:
    """Decorate a measurement with the arguments `store` and `engine`, which it does not see.

    Within another measurement, or a command, the pieces are that one's.

    Args:
        function: the measurement; its first argument is the model.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:  # Python's own would say of which function
            raise TypeError(f"{function.__name__}() {error}") from None
        given = bound.arguments
        store = arguments.optional(arguments.path, "store", given.pop("store", None))
        engine = checked_engine(given.pop("engine", "local"))
        if isinstance(device := getattr(given.get("model"), "device", None), torch.device):
            arguments.require_float64(device)
        work = current()
        if work is not None:
            own = {k: v for k, v in given.items() if k not in ASIDE and not work.knows(v)}
            with scope(f"{function.__name__} {digest(own)}"):
                return helped(function, **given)
        if store is None and not engine.elsewhere:
            return function(**given)
        bound.apply_defaults()
        settings = {k: v for k, v in bound.arguments.items() if k not in ASIDE}
        model = settings.pop("model", None)
        words = settings.get("labels")
        for each in given.values():
            if words is not None and hasattr(each, "conditions"):
                each.conditions.numbers(words)  # which the model knows from then on
        about = about_of(function.__name__, settings, model)
        with working(store, about, engine, made, given, model):
            return made(**given)

    return made  # type: ignore[return-value]


@contextmanager
def kept_in(
    store: Path | None, name: str, settings: Mapping[str, Any], model: Any
) -> Iterator[None]:
    """Within the block pieces are kept in a store, if there is one and they are not kept already.

    Args:
        store: the folder, or None.
        name: of the measurement.
        settings: what the pieces depend on besides the model.
        model: the opened model.
    """
    if store is None or current() is not None:
        yield
        return
    with working(store, about_of(name, settings, model), Engine(), None, {}, model):
        yield


def about_of(name: str, settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Which measurement it is.

    Args:
        name: of the function or the command.
        settings: its arguments by name, those that a result depends on.
        model: the opened model.
    """
    shown = {key: _setting(value) for key, value in settings.items()}
    return {
        "measurement": name,
        "settings": shown,
        "model": "none" if model is None else digest(model),
        "kernels": getattr(model, "kernels", USUAL),
        "versions": versions(),
    }


def _setting(value: Any) -> str:
    text = content(value)
    plain = isinstance(value, (type(None), bool, int, float, str))
    return repr(value) if plain and len(text) < 200 else digest(value)


def device_of(model: Any) -> str:
    """The kind of device that a model is on."""
    return str(model.device.type) if hasattr(model, "device") else "cpu"


@contextmanager
def working(
    store: Path | None,
    about: Mapping[str, Any],
    engine: Engine,
    again: Callable[..., Any] | None,
    given: dict[str, Any],
    model: Any,
    extra: Mapping[str, Any] | None = None,
) -> Iterator[Work]:
    """Within the block, pieces are kept in a store and run by an engine.

    Args:
        store: the folder; None is a temporary one.
        about: which measurement it is, from `about_of`.
        engine: where pieces are run.
        again: what other processes call to help.
        given: its arguments.
        model: that is measured, opened; None where there is none.
        extra: what else the store's root says.

    Raises:
        InvalidValue: for a store of another measurement.
        InvalidState: if another process is at it.
        UnwritableFile: where it can't be written.
    """
    device = device_of(model)
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-lens-")))
        key = digest(dict(about))
        kept = Store(store, about, extra, None if engine.elsewhere else device)
        stack.callback(kept.close)
        kept.lead()
        others = None
        if engine.elsewhere:
            if (chosen := about["kernels"]) != USUAL:
                raise InvalidState(
                    f"Other processes would measure without what is chosen here ({chosen}); "
                    "expected the usual settings of PyTorch and diffusers, or engine='local'."
                )
            sent = {k: v for k, v in given.items() if k not in ASIDE}
            asked = [each.conditions for each in sent.values() if hasattr(each, "conditions")]
            instead = [pair for each in asked for pair in each.encoded()]
            others = engine.started(kept, key, Call(again, sent, instead), device)
            stack.callback(others.close)
        n = 1 if others is None else others.n
        work = Work(kept, key, others=others, workers=n, model=model)
        with at(work):
            yield work
