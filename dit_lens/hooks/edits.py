"""The edits behind `Trace.edit`, `patch` and `ablate`: which steps they act at, and the functions
that they put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..errors import InvalidValue
from .points import Editor, HookFunction, HookPoint
from .regions import Region

Steps = None | int | slice | range | Iterable[int]


def step_test(steps: Steps) -> Callable[[int], bool]:
    """Whether a step is among these.

    Raises ValueError for steps that count from the end, or none at all.
    """
    if steps is None:
        return lambda _: True
    if isinstance(steps, slice):
        if any(v is not None and v < 0 for v in (steps.start, steps.stop, steps.step)):
            raise InvalidValue(
                f"{steps} counts steps from the end, which is not known while a run is under way; "
                "count from 0."
            )
        first, last, by = steps.start or 0, steps.stop, steps.step or 1
        return lambda s: s >= first and (last is None or s < last) and (s - first) % by == 0
    chosen = {steps} if isinstance(steps, int) else {int(s) for s in steps}
    if not chosen or min(chosen) < 0:
        raise InvalidValue(
            f"steps={steps!r} names no step; expected numbers from 0 (the noisiest), a slice or a "
            "range."
        )
    return chosen.__contains__


def within(fn: HookFunction, part: Region, axes: tuple[str, ...]) -> HookFunction:
    """`fn`, but letting through only what lies in the region."""
    if part.everything:
        return fn
    whole = Editor(fn)
    return lambda activation, hook: part.merge(activation, whole(activation, hook), axes)


def patch_from_steps(taken: Mapping[str, Mapping[int, Tensor]]) -> HookFunction:
    """Put in what another trace has at the same hook point and step; `taken` is `{name: {step:
    activation}}`.
    """

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        at_step = taken[hook.name]
        if hook.step is None or hook.step not in at_step:
            raise InvalidValue(f"The source trace has no step {hook.step}; it has {len(at_step)}.")
        return _fitting(at_step[hook.step], activation, hook)

    return fn


def patch_from_tensor(source: Tensor) -> HookFunction:
    """Put in a tensor of the activation's shape, or, with one more axis in front, the one for the
    step.
    """

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        if source.ndim != activation.ndim + 1:
            return _fitting(source, activation, hook)
        if hook.step is None or hook.step >= len(source):
            raise InvalidValue(
                f"The patch for {hook.name!r} has {len(source)} steps; there is none for step "
                f"{hook.step}."
            )
        return _fitting(source[hook.step], activation, hook)

    return fn


def ablation(mode: str) -> HookFunction:
    """The function that knocks an activation out. Raises ValueError for an unknown mode."""
    modes: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "mean": lambda a: a.mean(0, keepdim=True).expand_as(a).clone(),
        "resample": lambda a: a.roll(1, 0),
    }
    if mode not in modes:
        raise InvalidValue(
            f"{mode!r} is no way to ablate; expected one of {', '.join(map(repr, modes))}."
        )
    return lambda activation, hook: modes[mode](activation)


def _fitting(patch: Tensor, activation: Tensor, hook: HookPoint) -> Tensor:
    if patch.shape != activation.shape:
        raise InvalidValue(
            f"The patch for {hook.name!r} has shape {list(patch.shape)}; the activation has "
            f"{list(activation.shape)}."
        )
    return patch.to(activation)
