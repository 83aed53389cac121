"""The edits behind `Trace.edit`, `patch` and `ablate`: which steps they act at, and the functions
that they put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from .points import Editor, HookFunction, HookPoint
from .regions import Region

Steps = None | int | slice | range | Iterable[int]


def checked_steps(steps: Steps) -> Steps:
    """Steps as they can be asked again and again.

    Raises ValueError for steps that count from the end, or none at all, TypeError for what is none.
    """
    expected = "None, a whole number of 0 (the noisiest) or more, or a slice, range or list of them"
    if steps is None:
        return None
    if isinstance(steps, slice):
        parts = (steps.start, steps.stop, steps.step)
        if any(v is not None and arguments.is_whole(v) and v < 0 for v in parts):
            raise InvalidValue(
                f"{steps} counts steps from the end, which is not known while a run is under way; "
                "count from 0."
            )
        chosen = arguments.index("steps", steps)
        assert isinstance(chosen, slice)
        if chosen.step == 0 or (chosen.stop is not None and chosen.stop <= (chosen.start or 0)):
            raise arguments.refusal("steps", steps, "a slice with a step in it")
        return chosen
    if arguments.is_whole(steps):
        return arguments.whole("steps", steps, 0)
    found = arguments.listed("steps", steps, expected)
    return [arguments.whole(f"steps[{i}]", s, 0) for i, s in enumerate(found)]


def step_test(steps: Steps) -> Callable[[int], bool]:
    """Whether a step is among these; raises as `checked_steps` does."""
    steps = checked_steps(steps)
    if steps is None:
        return lambda _: True
    if isinstance(steps, slice):
        first, last, by = steps.start or 0, steps.stop, steps.step or 1
        return lambda s: s >= first and (last is None or s < last) and (s - first) % by == 0
    return ({steps} if isinstance(steps, int) else set(steps)).__contains__


def within(fn: HookFunction, part: Region, axes: tuple[str, ...]) -> HookFunction:
    """`fn`, but letting through only what lies in the region, and shown only its branch of
    guidance.
    """
    if part.everything:
        return fn
    whole = Editor(fn)

    def inside(activation: Tensor, hook: HookPoint) -> Tensor:
        region, rows = part.of_branch(hook.name, hook.branch, len(activation))
        if region is part:
            return part.merge(activation, whole(activation, hook), axes)
        own, asked = activation[rows], hook.branch
        if len(own):
            hook.branch = str(part.branch)  # fn is shown this branch alone
            try:
                new = whole(own, hook)
            finally:
                hook.branch = asked
            activation[rows] = region.merge(own, new, axes)
        return activation

    return inside


def patch_from_steps(taken: Mapping[str, Mapping[int, Mapping[str, Tensor]]]) -> HookFunction:
    """Put in what another trace has at the same hook point, step and branch of guidance; `taken` is
    `{name: {step: {branch: activation}}}`.
    """

    def fn(activation: Tensor, hook: HookPoint) -> Tensor:
        at = taken[hook.name]
        if hook.step is None or hook.step not in at:
            raise InvalidValue(f"The source trace has no step {hook.step}; it has {len(at)}.")
        of_branch = at[hook.step]
        found = of_branch.get(hook.branch)
        if found is None and len(of_branch) == 1 and "" in (hook.branch, *of_branch):
            (found,) = of_branch.values()  # which branches its batch holds is told on one side only
        if found is not None:
            return _fitting(found, activation, hook)
        # one batch here and two calls there, or the halves of a batch in another order
        halves = {
            word: half for words, value in of_branch.items() for word, half in _halves(words, value)
        }
        wanted = _halves(hook.branch, activation)
        if any(word not in halves for word, _ in wanted):
            raise InvalidValue(
                f"The source trace has no branch {hook.branch!r} at step {hook.step}; it has "
                f"{', '.join(map(repr, of_branch))}."
            )
        return torch.cat([_fitting(halves[word], half, hook) for word, half in wanted])

    return fn


def patch_from_tensor(source: Tensor) -> HookFunction:
    """Put in a tensor of the activation's shape, or, with one more axis in front, the one for the
    step.
    """

    source = source.detach().clone()  # what happens to the caller's tensor later is not meant

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


class Steering:
    """An edit that adds a direction, a certain number of times.

    Args:
        direction: what is added.
        scale: how often.
    """

    def __init__(self, direction: Tensor, scale: float) -> None:
        self.direction, self.scale = direction, scale

    def __call__(self, activation: Tensor, hook: HookPoint) -> Tensor:
        try:
            return activation + self.scale * self.direction.to(activation)
        except RuntimeError:
            raise InvalidValue(
                f"direction has shape {list(self.direction.shape)}; expected one that broadcasts "
                f"against {hook.name!r}, {list(activation.shape)}."
            ) from None


def _halves(branch: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """The branches of guidance in a batch, each with its items."""
    words = branch.split(" | ")
    return list(zip(words, value.chunk(len(words)), strict=False))


def ablation(mode: str) -> HookFunction:
    """The function that knocks an activation out; where a batch has both branches of guidance, in
    each by itself. Raises ValueError for an unknown mode.
    """
    modes: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "mean": lambda a: a.mean(0, keepdim=True).expand_as(a).clone(),
        "resample": lambda a: a.roll(1, 0),  # each item gets that of the one before
    }
    out = modes[arguments.choice("mode", mode, modes)]

    def fn(activation: Tensor, hook: HookPoint | None) -> Tensor:
        of = _halves("" if hook is None else hook.branch, activation)
        if hook is not None and mode != "zero" and len(of[0][1]) == 1:
            raise InvalidValue(
                f"mode={mode!r} is over the items of a batch, and there is one"
                f"{' in each branch of guidance' * (len(of) > 1)}, so that {hook.name!r} would "
                "stay as it is; expected several items, or mode='zero'."
            )
        return torch.cat([out(half) for _, half in of]) if len(of) > 1 else out(activation)

    return fn


def _fitting(patch: Tensor, activation: Tensor, hook: HookPoint) -> Tensor:
    if patch.shape != activation.shape:
        raise InvalidValue(
            f"The patch for {hook.name!r} has shape {list(patch.shape)}; the activation has "
            f"{list(activation.shape)}."
        )
    return patch.to(activation)
