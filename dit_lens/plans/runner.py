"""Running a plan: the held computations are left out, and what was added before is added again.

What is held is put in by the listeners of `Trace.hold`. In addition the modules that
compute a held part answer with zeros in its place, which nobody reads; and where all that a block
adds is held, the block itself is left out: what was added is added to the streams that enter it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..families.forward_slot import find, put_back, slot
from ..hooks.hold import STREAMS, Added, Clock, parts
from ..hooks.names import layer_of, site_of
from ..hooks.points import Listener
from ..model.call import Call
from ..model.hooked import HookedDiT
from ..model.instrumentation import Instrumentation
from ..model.steps import StepCounter
from ..model.taken import Taken
from .kept import KeptHold
from .plan import Plan

APART = 1e-3
"""Timesteps that differ by no more than this share of the longest are the same, besides what the
weights' type rounds.
"""


@contextmanager
def reuse(model_or_pipe: Any, plan: Plan | str | Path, remap: bool = False) -> Iterator[HookedDiT]:
    """Run a pipeline, or anything that calls the transformer, with a plan's cells held.

        with dit_lens.reuse(pipe, "plan.json"):
            pipe(class_labels=[207], num_inference_steps=50)

    Held computations are left out. Each branch of guidance is held from itself. Afterwards the
    model is as it was, whatever happens in the block.

    Args:
        model_or_pipe: a `HookedDiT`, a pipeline or a transformer.
        plan: a plan, or the file of one.
        remap: let runs of other steps than the plan's be run too: each step then does what the plan
            does at the timestep nearest to its own, and a warning says so. Otherwise such a run is
            refused at its first step that differs.

    Yields:
        HookedDiT: the opened model.

    Raises:
        InvalidValue: for a plan of another model, or, in the block, a run of other steps.
        InvalidState: if the model is under a plan already, or in use by another thread.

    >>> import dit_lens; model = dit_lens.load("digits"); run = dit_lens.sample(model, [3], steps=3)
    >>> plan = dit_lens.experiments.Plan.of(model, run.timesteps, [(5, "attn", 2), (5, "mlp", 2)])
    >>> with dit_lens.reuse(model, plan):
    ...     faster = dit_lens.sample(model, [3], steps=3)
    >>> bool((faster.latents[2] == run.latents[2]).all() and (faster.x0[2] != run.x0[2]).any())
    True
    """
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    arguments.instance("plan", plan, Plan, "a Plan, or the path of one")
    arguments.flag("remap", remap)
    model = HookedDiT.of(model_or_pipe)
    try:
        plan.require_model(model)
        model.require_eval()
        with Taken() as taken:
            runner = _Runner(model, plan, remap)
            runner.put_on(taken)
            yield model
    finally:
        if model is not model_or_pipe:
            model.close()


class _Runner(StepCounter):
    """Watches the calls, and knows what is held in the one under way."""

    proves = False

    def __init__(self, model: HookedDiT, plan: Plan, remap: bool) -> None:
        super().__init__()
        self.model, self.plan, self.remap = model, plan, remap
        self.last = -1
        self.of_plan = 0  # the plan's step that is run
        self.held: frozenset[tuple[int, str]] = frozenset()  # in the call under way
        self.now = Clock(0, 0)
        self.time = 0.0
        self.said = False
        self.longest = max(map(abs, plan.timesteps))
        self.holds: dict[tuple[int, str], list[KeptHold]] = {}
        self.mine: set[Listener] = set()
        self.silent: dict[frozenset[tuple[int, str]], frozenset[str]] = {}

    # Which step it is.

    def begin(self, call: Call) -> None:
        self.number(call, self.last)
        self.now, t = self.clock(), float(call.t[0])
        self.of_plan = self._of_plan(t)
        planned = self.plan.timesteps[self.of_plan]
        self.time = planned if self._same(planned, t) else t  # not rounded, as far as is known
        steps = self.plan.held.items() if self.step else ()
        self.held = frozenset(place for place, held in steps if self.of_plan in held)
        if self.held not in self.silent:
            self.silent[self.held] = frozenset(_left_out(self.model.names, self.held))
        call.left_out |= self.silent[self.held]

    def end(self, call: Call, finished: bool) -> None:  # noqa: ARG002 (a watcher is given it)
        self.held = frozenset()
        self.last = max(self.last, self.row) if finished else self.last

    def _of_plan(self, t: float) -> int:
        """The plan's step for the one under way, at time t."""
        times = self.plan.timesteps
        if self.step < len(times) and self._same(times[self.step], t):
            return self.step
        if not self.remap:
            at = f"{times[self.step]:g}" if self.step < len(times) else "none"
            raise InvalidValue(
                f"The plan is for {len(times)} steps, and step {self.step} of this run is at the "
                f"timestep {t:g}, the plan's at {at}; sample with the steps and the scheduler that "
                "it was made for, or let it choose the nearest: reuse(model, plan, remap=True)."
            )
        if not self.said:
            self.said = True
            warnings.warn(
                f"The plan was made for {len(times)} other timesteps: each step does what it does "
                "at the one whose noise is nearest, which nobody has measured.",
                stacklevel=2,
            )
        # not the first, which has nothing to be held from
        return min(range(1, len(times)), key=lambda s: abs(times[s] - t), default=0)

    def _same(self, planned: float, t: float) -> bool:
        """Whether a call's time t is one of the plan's: it comes in the weights' type."""
        rounded = torch.finfo(self.model.dtype).eps * abs(planned)
        return abs(planned - t) <= APART * self.longest + rounded

    # What is put in.

    def put_on(self, taken: Taken) -> None:
        """Listeners at what is added, and what stands in for blocks and their parts."""
        model, inst = self.model, self.model.instrumentation
        if any(isinstance(watcher, _Runner) for watcher in inst.watchers):
            raise InvalidState("The model is under a plan already; leave that one first.")
        taken.undo(Instrumentation.let_go, model.transformer, self)
        Instrumentation.of(model.transformer, self)
        blocks = model.family.blocks(model.transformer)
        for layer in sorted({layer for layer, _ in self.plan.held}):
            of_layer = parts(model.names, layer)
            for part in of_layer:
                if (layer, part) in self.plan.held:
                    self.holds[layer, part] = [
                        self._hold(layer, part, place) for place in of_layer[part]
                    ]
            for hold in (h for part in of_layer for h in self.holds.get((layer, part), [])):
                for name, listener in hold.listeners:
                    self.mine.add(listener)
                    taken.undo(inst.detach, name, listener)
                    inst.attach(name, listener)
            self._stand_in(taken, blocks[layer], layer, list(of_layer))
        taken.undo(inst.unwatch, self)
        inst.watch(self)

    def _hold(self, layer: int, part: str, place: Added) -> KeptHold:
        def made_of() -> tuple[int, ...] | None:
            if (layer, part) not in self.held:
                return None
            return self.plan.sources[layer, part, self.of_plan]

        axes = self.model.sites[place.name]
        return KeptHold(place, made_of, lambda: self.now, lambda: self.time, self.remap, axes)

    def _stand_in(self, taken: Taken, block: nn.Module, layer: int, of_layer: list[str]) -> None:
        """What leaves out a block of which all is held, and the children of a held part."""
        computes = self.model.family.computes
        for part in of_layer:
            mine = (layer, part) in self.plan.held
            children = [
                child
                for name in computes.get(part, ())
                if (child := getattr(block, name, None)) is not None
            ]
            if mine and not children and len(of_layer) > 1:
                raise InvalidValue(
                    f"{type(self.model.transformer).__name__} does not say which modules compute "
                    f"{part!r}, so it can't be left out; expected a plan that holds whole blocks, "
                    "or a family with `computes`."
                )
            for child in children if mine else ():
                idle = partial(_Idle, module=child, runner=self, place=(layer, part))
                _replace(taken, child, idle)
        if all((layer, part) in self.plan.held for part in of_layer):
            places = {(layer, part): self.holds[layer, part] for part in of_layer}
            _replace(taken, block, lambda own: _Over(own, self, block, places))


class _Like(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Idle:
    """In place of a module's forward: where its part is held it computes nothing, and answers with
    zeros of the shape that it last gave, in whose place what is held is put. With a module hook of
    somebody's, which would be shown the zeros, it runs.
    """

    def __init__(
        self,
        own: Callable[..., Any],
        module: nn.Module,
        runner: _Runner,
        place: tuple[int, str],
    ) -> None:
        self.own, self.runner, self.place = own, runner, place
        self.hooks = module._forward_hooks
        self.like: dict[tuple[Any, ...], Any] = {}  # branches may differ in the length of the text

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.own,)  # a copied model is under no plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        which = (self.runner.now.branch, self.runner.now.rows)
        if self.place in self.runner.held and which in self.like and not self.hooks:
            return _zeros(self.like[which])
        found = self.own(*args, **kwargs)
        self.like[which] = _shapes(found)
        return found


def _left_out(names: list[str], held: Collection[tuple[int, str]]) -> Iterator[str]:
    """The hook names at which nothing is computed where these parts of layers are held: what is
    inside a part, and of a block of which all is held whatever is no stream and not added to one.
    """
    wholly = {layer for layer, _ in held if {(layer, p) for p in parts(names, layer)} <= set(held)}
    for name in names:
        layer, site = layer_of(name), site_of(name).removeprefix("text.")
        own = site.removeprefix("hook_")
        added = own != site and (own.startswith("resid_") or own.endswith("_out"))
        if layer in wholly and not added:
            yield name
        elif layer is not None and (layer, site.partition(".")[0]) in held:
            yield name


def _shapes(answer: Any) -> Any:
    """What is remembered of a module's answer: of each tensor its shape, type and device."""
    if isinstance(answer, (tuple, list)):
        return tuple(map(_shapes, answer))
    return _Like(answer.shape, answer.dtype, answer.device)


def _zeros(like: Any) -> Any:
    if isinstance(like, _Like):
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return tuple(map(_zeros, like))


class _Over:
    """In place of a block's forward: where all that it adds is held, only the sum is made."""

    def __init__(
        self,
        own: Callable[..., Any],
        runner: _Runner,
        block: nn.Module,
        places: dict[tuple[int, str], list[KeptHold]],
    ) -> None:
        self.own, self.runner, self.block = own, runner, block
        self.places = frozenset(places)
        self.holds = [hold for holds in places.values() for hold in holds]
        inst, layers = runner.model.instrumentation, {layer for layer, _ in places}
        self.points = [p for name, p in inst.points.items() if layer_of(name) in layers]
        if 0 in layers:
            self.points += [p for name, p in inst.points.items() if name.endswith("hook_embed")]

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.own,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner
        if not self.places <= runner.held or self.others_listen():
            return self.own(*args, **kwargs)
        family, inputs = runner.model.family, runner.model.instrumentation.now or {}
        streams, returned = family.skip_block(inputs, args, kwargs)
        streams = streams | {"": family.stream_in(self.block, inputs, args, kwargs)}
        for hold in self.holds:
            value = hold.value()
            assert value is not None
            stream = STREAMS[site_of(hold.place.name).startswith("text.")]
            x = streams[stream]
            if x.shape != value.shape:
                raise InvalidValue(
                    f"{hold.place.name!r} is {list(x.shape)} at step {runner.step} and was "
                    f"{list(value.shape)} where it is held from; a plan needs one batch and one "
                    "size throughout."
                )
            # as the blocks do: some add in a wider type
            streams[stream] = (x.to(value.dtype) + value).to(x.dtype)
        return returned(streams)

    def others_listen(self) -> bool:
        """Whether anybody else's hook, edit or probe is at the block in the call under way: then it
        runs, its held parts idle. Who only takes checksums does not count.
        """
        inst = self.runner.model.instrumentation
        heard = (listener for point in self.points for listener in point.listeners)
        return any(each not in self.runner.mine and not inst.is_witness(each) for each in heard)


def _itself(own: Callable[..., Any]) -> Callable[..., Any]:
    return own


def _replace(taken: Taken, module: nn.Module, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Put a callable in the place of a module's own forward, which it is given."""
    holder, key = slot(module)
    before = holder.get(key)
    mine = make(before or type(module).forward.__get__(module))

    def take_out() -> None:
        place = find(module, mine)
        if place is not None:
            put_back(module, place, before)

    taken.undo(take_out)
    holder[key] = mine
