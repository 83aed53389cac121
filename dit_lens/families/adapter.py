"""How a transformer that is no diffusers class is spoken to: what it is given, in which units, and
what its answer means.

dit_lens knows latents, timesteps in the scheduler's units, conditions, and outputs as a diffusers
scheduler takes them. An `Adapter` is what lies between those and the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidType, InvalidValue
from ..hooks.passes import Pass
from ..hooks.points import HookPoint
from .answers import members, source_of, with_members
from .base import Family
from .config import Condition, Size
from .forwards import Points, TransformerForward
from .parts.joint import Point
from .signature import signature_of

UNITS = 1000
"""Timesteps from clean data to pure noise where no scheduler says how many it counts."""
TIMES = {"t", "ts", "time", "times", "timestep", "timesteps", "sigma", "sigmas", "noise_level"}
"""Names by which a forward's first argument is the time, and its second x_t."""


@dataclass(frozen=True)
class Adapter:
    """How a model of one's own is called, so that it can be sampled and measured.

    Give only what differs from: a forward whose first three arguments are x_t, the time in the
    scheduler's units and class labels, and which returns what the scheduler takes.

    Args:
        latents: the shape of one item's x_t: (channel, height, width), for video with frames among
            them. A known layout says it itself.
        labels: how many classes there are, the label for no class, if it has one, coming behind
            them; 0 for a model that takes none; or, for a model that is given anything else, the
            further arguments that ask for nothing, as tensors with a batch axis of 1.
        time: the model's own time of clean data and of pure noise, such as (1.0, 0.0) for SiT,
            between which the scheduler's timesteps lie, `num_train_timesteps` of them; None is the
            scheduler's timestep as it is.
        output: from what the model returns to what the scheduler takes, such as `torch.neg`.
        names: of the arguments for x_t, time and labels; the first three by default.
        tokens: where the image's tokens are in the residual stream, such as slice(2, None).
        grid: the grid of the image's tokens, (height, width) or (frame, height, width); by default
            that of square patches.

    >>> Adapter(latents=(4, 32, 32), labels=1000, time=(1.0, 0.0), output=torch.neg).labels
    1000
    """

    latents: Size = ()
    labels: int | Mapping[str, Tensor] = 0
    time: tuple[float, float] | None = None
    output: Callable[[Any], Tensor] | None = None
    names: tuple[str, ...] = ()
    tokens: slice = field(default_factory=lambda: slice(None))
    grid: Size | None = None

    def __post_init__(self) -> None:
        found = arguments.listed("latents", self.latents, "(channel, height, width)", fewest=0)
        if len(found) not in (0, 3, 4):
            raise arguments.refusal("latents", self.latents, "(channel, height, width)")
        fit = [arguments.whole(f"latents[{i}]", n, 1, 2**20) for i, n in enumerate(found)]
        object.__setattr__(self, "latents", tuple(fit))
        if not isinstance(self.labels, Mapping):
            object.__setattr__(self, "labels", arguments.whole("labels", self.labels, 0, 2**31))
        for name, value in self.labels.items() if isinstance(self.labels, Mapping) else ():
            arguments.text("labels: an argument's name", name)
            arguments.tensor(f"labels[{name!r}]", value)
        if self.time is not None:
            ends = arguments.listed("time", self.time, "the time of (clean data, pure noise)")
            known = [arguments.number(f"time[{i}]", v) for i, v in enumerate(ends)]
            if len(known) != 2 or known[0] == known[1]:
                raise arguments.refusal("time", self.time, "two different numbers (clean, noise)")
            object.__setattr__(self, "time", tuple(known))
        if self.output is not None:
            arguments.function("output", self.output, "fn(what the model returned)")
        found = arguments.listed("names", self.names, "a list of arguments' names", fewest=0)
        names = tuple(arguments.text(f"names[{i}]", name) for i, name in enumerate(found))
        object.__setattr__(self, "names", names)
        arguments.instance("tokens", self.tokens, slice, "a slice, such as slice(2, None)")
        if self.grid is not None:
            found = arguments.listed("grid", self.grid, "(height, width)", fewest=1)
            fit = [arguments.whole(f"grid[{i}]", n, 1, 2**20) for i, n in enumerate(found)]
            object.__setattr__(self, "grid", tuple(fit))


def arguments_of(transformer: Any, names: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """The names of the arguments that hold x_t, the time and the labels; of the last "" where there
    is none.

    Args:
        transformer: the transformer.
        names: those that are known; its forward's first three otherwise, the time before x_t where
            it is named so.

    Raises:
        InvalidType: for a forward without a time.
        InvalidValue: for a name that its forward does not have.
    """
    cls = type(transformer)
    taken = signature_of(cls.forward)
    for name in names if not taken.any_name else ():
        arguments.choice(f"names, the arguments of {cls.__name__}.forward,", name, taken.names)
    found = [*names, *taken.names[len(names) :]][:3]
    if len(found) < 2:
        raise InvalidType(
            f"{cls.__name__}.forward takes {taken}, in which x_t and the time have no names; "
            "expected forward(x, t, y), behind functools.wraps where it is wrapped, or the model "
            "inside."
        )
    x, t, y = (*found, "")[:3]
    if not names and x in TIMES and t not in TIMES:
        x, t = t, x
    return x, t, y


def alike(condition: Tensor, known: Tensor) -> bool:
    """Whether two conditions are of one kind: of one dtype, as many axes, and the same width where
    they are sequences [1, token, width].

    Args:
        condition: [1, ...].
        known: the one that asks for nothing.
    """
    if condition.dtype != known.dtype or condition.ndim != known.ndim:
        return False
    return condition.ndim < 3 or condition.shape[2:] == known.shape[2:]


class Spoken(Family):
    """A family that is spoken to by an `Adapter`.

    Args:
        x: the name of the argument that holds x_t.
        t: of the one that holds the time.
        y: of the one that holds labels; "" for none.
        adapter: what else is known; None where nothing is.

    Attributes:
        time: the model's own time of clean data and of pure noise; None is the scheduler's.
        turned: from what the model returns to what the scheduler takes.
        units: how many timesteps the scheduler counts from clean data to pure noise.
    """

    batch_order = None
    units = UNITS
    time: tuple[float, float] | None = None
    turned: Callable[[Any], Tensor] | None = None

    def __init__(self, x: str, t: str, y: str, adapter: Adapter | None) -> None:
        self.x_name, self.t_name, self.labels_name, self.adapter = x, t, y, adapter
        if adapter is not None:
            self.time, self.turned = adapter.time, adapter.output
            if isinstance(adapter.labels, int) and adapter.labels and not y:
                raise InvalidValue(
                    f"labels={adapter.labels} can't be given to {self.model_class}, whose forward "
                    "names no third argument; expected names=('x', 't', 'y'), its own, or labels=0."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Spoken:
        return copy(self)  # that of a copy of the model, which may have another scheduler

    def call(self, transformer: Any, inputs: dict[str, Any]) -> Any:
        given = {name: inputs.get(name) for name in (self.x_name, self.t_name)}
        own = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
        args, named = signature_of(type(transformer).forward).spelled(inputs | own)
        return transformer(*args, **named)  # which may change them in place

    @property
    def n_classes(self) -> int:
        """How many classes the model's labels choose from; a model that takes nothing has one."""
        labels = None if self.adapter is None else self.adapter.labels
        return max(1, labels) if isinstance(labels, int) else 0

    @property
    def empty(self) -> Condition | None:  # type: ignore[override]
        """The condition that asks for nothing, batch axis 1; None where labels do."""
        labels = None if self.adapter is None else self.adapter.labels
        return Condition(labels) if isinstance(labels, Mapping) else None

    def check_labels(self, labels: Tensor, items: int, known: Callable[[Tensor], object]) -> None:
        if labels.ndim != 1 or labels.is_floating_point():
            return  # in a form of the model's own
        if labels.device.type == "cpu":  # elsewhere to look is to wait
            known(labels)
        if len(labels) not in (1, items):
            raise arguments.refusal("y", labels, f"labels [{items}], one for each item")

    def check_condition(self, prompt: str, condition: Condition) -> None:
        known = self.empty
        for name, value in condition.items():
            where = f"The condition of {prompt!r}"
            if known is not None and name not in known:
                names = ", ".join(map(repr, known))
                raise InvalidValue(f"{where} has {name!r}; expected {names}, as Adapter(labels=).")
            got = arguments.shown(value)
            if not isinstance(value, Tensor) or not value.ndim or len(value) != 1:
                raise InvalidValue(
                    f"{where} has {name}={got}; expected a tensor of one item [1, ...]."
                )
            if known is not None and not alike(value, known[name]):
                raise InvalidValue(
                    f"{where} has {name}={got}; expected {arguments.shown(known[name])} or another "
                    "length of it, as Adapter(labels=)."
                )
        absent = [name for name in known or () if name not in condition]
        if absent:
            raise InvalidValue(
                f"The condition of {prompt!r} has no {absent[0]!r}, which Adapter(labels=) has; "
                "expected the same arguments for every prompt."
            )

    def stack(self, conditions: Sequence[Condition]) -> Condition:
        for name in conditions[0]:
            shapes = {tuple(each[name].shape[1:]) for each in conditions}
            if len(shapes) > 1:
                raise InvalidValue(
                    f"Conditions of one batch have {name} of the shapes "
                    f"{', '.join(map(str, sorted(shapes)))}; expected one length for all prompts: "
                    "pad them, with a mask where the model takes one."
                )
        return super().stack(conditions)

    def inputs(
        self, transformer: Any, x: Tensor, t: Tensor, condition: Condition
    ) -> dict[str, Any]:
        given = dict(condition)
        if self.adapter is not None and self.adapter.labels == 0:
            given.pop(self.labels_name, None)
        t = torch.tensor(t, device=x.device) if isinstance(t, (int, float)) else t
        arguments.instance("t", t, Tensor, f"timesteps [{len(x)}] in a tensor")
        t = t if t.ndim else t.expand(len(x))
        if len(t) not in (1, len(x)):
            raise arguments.refusal("t", t, f"timesteps [{len(x)}], one for each item")
        return {self.x_name: x, self.t_name: self.to_own(t), **given}

    def to_own(self, t: Tensor) -> Tensor:
        """The scheduler's timesteps in the model's own units.

        Args:
            t: timesteps [batch].
        """
        if self.time is None:
            return t
        clean, noise = self.time
        return (clean + (noise - clean) * (t.double() / self.units)).float()

    def latents(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        x = inputs[self.x_name]
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise InvalidValue(
                f"{self.model_class}.forward's {self.x_name!r} was given {arguments.shown(x)}, and "
                f"is taken for x_t, {self.t_name!r} for the time; expected latents [batch, ...], "
                f"or dit_lens.Adapter(latents=..., names=({self.t_name!r}, {self.x_name!r}))."
            )
        return x

    def timesteps(self, transformer: Any, inputs: dict[str, Any]) -> Tensor:
        t = torch.as_tensor(inputs[self.t_name])
        t = t.reshape(len(t), -1).amax(1) if t.ndim > 1 else t.reshape(-1)
        if self.time is None:
            return t
        clean, noise = self.time
        # in double, so that the way there and back ends where it began
        return (t.double() - clean) / (noise - clean) * self.units

    def some_time(self, x: Tensor) -> Tensor:
        """A timestep [1] that the model knows, whichever scheduler it is opened with.

        Args:
            x: latents, on whose device it is.
        """
        return torch.full((1,), 1.0 if self.time is None else self.units / 2, device=x.device)

    def count_time(self, scheduler: Any, alone: bool) -> None:
        units = units_of(scheduler) or UNITS
        if self.time is not None and scheduler is not None and not alone and units != self.units:
            raise InvalidState(
                f"This {self.model_class} is open already, with a scheduler of {self.units} "
                f"timesteps, and now one of {units} would say what its time is; call remove() on "
                "the HookedDiT that holds it first."
            )
        if alone:
            self.units = units

    def check_units(self, scheduler: Any) -> None:
        """Refuse a scheduler whose timesteps are not those by which the model is told the time.

        Args:
            scheduler: of diffusers.

        Raises:
            InvalidValue: for another number of them.
        """
        units = units_of(scheduler)
        if self.time is not None and units != self.units:
            raise InvalidValue(
                f"{type(scheduler).__name__} counts {units} timesteps, and the scheduler that this "
                f"model was opened with {self.units}, by which it is told the time; expected "
                f"num_train_timesteps={self.units}, or HookedDiT(module, scheduler, ...) with this "
                "one."
            )

    def output(self, transformer: Any, answer: Any, inputs: dict[str, Any]) -> Tensor:
        if self.turned is not None:
            answer = self.turned(answer)
        return tensor_of(answer, type(transformer).__name__)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        if self.adapter is None:
            raise InvalidState(
                "How this model is called is not known, so that it can't be sampled; expected "
                "HookedDiT(module, ..., adapter=dit_lens.Adapter(latents=..., labels=...)), or a "
                "loop of your own inside dit_lens.trace(model) (docs: Your own model)."
            )
        self.check_units(scheduler)
        super().set_timesteps(scheduler, steps, tokens)


def units_of(scheduler: Any) -> int | None:
    """How many timesteps a scheduler counts; None where it does not say.

    Args:
        scheduler: of diffusers, or None.
    """
    return getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)


def heard(point: Point, x: Any, items: int = 0) -> Any:
    """What goes on from a hook point.

    Args:
        point: the hook point.
        x: the value.
        items: how many the model was called with; 0 where that is not known.

    Raises:
        InvalidState: if somebody listens, and it is no stream.
    """
    if not point.listeners:
        return x
    if name_of(point) == "hook_sample":
        if not isinstance(x, Tensor) or not x.ndim or not x.dtype.is_floating_point:
            raise InvalidState(
                f"'hook_sample' can't be read: what is returned is {arguments.shown(x)}; expected "
                "numbers for each item; Adapter(output=fn) says where they are."
            )
    elif not isinstance(x, Tensor) or x.ndim != 3:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InvalidState(
            f"{name_of(point)!r} has {got}; expected a stream [batch, token, d_model]."
        )
    elif items and len(x) != items:
        raise InvalidState(
            f"{name_of(point)!r} has shape {list(x.shape)} for {items} items; expected a stream "
            f"[{items}, token, d_model], and no windows, frames or tokens in the place of items."
        )
    return point(x)


def name_of(point: Point) -> str:
    """A point's hook name."""
    return point.name if isinstance(point, HookPoint) else point.image.name


def through(
    point: Point,
    returned: Any,
    like: Any = None,
    items: int = 0,
    pick: Callable[[Any], Any] | None = None,
) -> Any:
    """What a module returned, after a hook point on its tensor; of several, the first one, or the
    only one of a stream's shape.

    Args:
        point: the hook point.
        returned: what the module returned.
        like: the stream that it was given.
        items: how many the model was called with; 0 where that is not known.
        pick: what takes the tensor that is meant out of a dict of several, if that is known.

    Raises:
        InvalidState: if which tensor is meant can't be told, or it can't be put back.
    """
    if not point.listeners:
        return returned
    if isinstance(returned, Tensor):
        return heard(point, returned, items)
    if isinstance(returned, Mapping) or not isinstance(returned, (tuple, list)):
        try:
            found = pick(returned) if pick and isinstance(returned, Mapping) else None
            found = tensor_of(returned, name_of(point)) if found is None else found
        except InvalidValue:
            raise InvalidState(
                f"{name_of(point)!r} can't be read: what is returned is "
                f"{arguments.shown(returned)}, in which it is not clear which tensor is meant; "
                "Adapter(output=fn) says it for the model's answer."
            ) from None
        new = heard(point, found, items)
        if new is found:
            return returned
        if type(returned) is dict:
            return {name: new if value is found else value for name, value in returned.items()}
        raise InvalidState(
            f"{name_of(point)!r} lies in a {type(returned).__name__}, in which another value "
            "can't be put; expected a hook that returns None."
        )
    at = [i for i, each in enumerate(returned) if isinstance(each, Tensor)]
    if isinstance(like, Tensor) and len(at) > 1:
        at = [i for i in at if returned[i].shape == like.shape]
        if len(at) != 1:
            raise InvalidState(
                f"{name_of(point)!r} can't be read: of {len(returned)} returned values {len(at)} "
                f"have the stream's shape {list(like.shape)}."
            )
    if not at:
        raise InvalidState(f"{name_of(point)!r} can't be read: no tensor is returned.")
    values = list(returned)
    values[at[0]] = heard(point, values[at[0]], items)
    make = getattr(type(returned), "_make", type(returned))
    return returned if values[at[0]] is returned[at[0]] else make(values)


def tensor_of(answer: Any, whose: str) -> Tensor:
    """The tensor that a model answers with: the answer, the first of several in a list, its
    `sample`, or the only one in a dict.

    Args:
        answer: what it returned.
        whose: the name of its class.

    Raises:
        InvalidValue: if there is none.
    """
    found = answer
    if isinstance(answer, Mapping):
        tensors = [value for value in answer.values() if isinstance(value, Tensor)]
        found = (
            answer["sample"] if "sample" in answer else tensors[0] if len(tensors) == 1 else None
        )
    elif isinstance(answer, (tuple, list)):
        found = answer[0] if answer else None
    elif not isinstance(answer, Tensor):
        found = getattr(answer, "sample", None)
    if not isinstance(found, Tensor):
        raise InvalidValue(
            f"{whose} returns a {type(answer).__name__}; expected a tensor, or "
            "Adapter(output=fn), which makes one of it."
        )
    return found


class SpokenTransformer(TransformerForward):
    """The whole model as its class runs it, with `hook_sample` on what it returns: on the tensor
    that its adapter makes the answer of.

    Args:
        module: the transformer.
        points: all hook points.
        current_pass: the pass.
        turned: the adapter's `output`; None where there is none.
    """

    def __init__(
        self,
        module: Any,
        points: Points,
        current_pass: Pass,
        turned: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__(module, points, current_pass)
        self.turned = turned
        self.places: dict[Any, Any] = {}  # to find one takes several answers, and waits for them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.taken.by_name(args, kwargs)
        with self.current_pass.forward(inputs):
            return self.passed(inputs, args, kwargs)

    def run(self, inputs: dict[str, Any]) -> Any:
        return self.passed(inputs, *self.taken.spelled(inputs))

    def passed(self, inputs: dict[str, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the model answers to a call, through its hook points.

        Args:
            inputs: all arguments by name.
            args: the positional ones, as the caller gave them.
            kwargs: those by name.
        """
        returned, turned = self.own(*args, **kwargs), self.turned
        if not self.sample.listeners:
            return returned
        if turned is None or isinstance(returned, Tensor):
            return through(self.sample, returned, pick=lambda answers: self.meant(answers, inputs))
        try:
            held = members(returned)
            kind = (
                type(returned).__qualname__,
                tuple(k for k, v in held.items() if isinstance(v, Tensor)),
            )
            place = self.places.get(kind)
            if place is None:
                place = source_of(turned, returned)
                self.places[kind] = place
            answer = turned(returned) if place is None else held[place]
        except Exception as error:  # of a stranger's function
            raise InvalidState(
                f"Adapter(output=) fails on {arguments.shown(returned)}, which "
                f"{type(self.module).__name__} returned ({type(error).__name__}: {error})."
            ) from error
        new = heard(self.sample, answer)
        if new is answer:
            return returned
        if place is None:
            raise InvalidState(
                f"{self.sample.name!r} is what Adapter(output=) makes of several values, into "
                "which another can't be put back; expected a hook that returns None."
            )
        return with_members(returned, {place: new})

    def meant(self, answers: Mapping[str, Any], inputs: dict[str, Any]) -> Tensor | None:
        """The tensor that is meant in a dict of several; None where that can't be told.

        Args:
            answers: what the model returned.
            inputs: its arguments by name.
        """
        return None
