"""What a run depends on besides its model and labels: settings, seeds, and changes on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .. import arguments
from ..errors import InvalidValue
from ..hooks.names import NamesFilter
from ..hooks.points import HookFunction

Edits = Sequence[tuple[NamesFilter, HookFunction]]
Seeds = int | Sequence[int]
GuidedChannels = Literal["all", "first3"]
Progress = Callable[[int, int], object]
"""What long work reports to: called with how much is done, and how much there is in all."""
STRONGEST = 1000
"""Guidance beyond this leaves numbers that no dtype holds, and no images."""


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides model, labels and seeds.

    Attributes:
        steps: denoising steps.
        guidance: strength of classifier-free guidance; 1 is none.
        guided_channels: which channels are guided, "all" or "first3".
        scheduler: a name of `SAMPLERS`, or a diffusers scheduler.
        eta: how stochastic the sampler is, 0 to 1.
    """

    steps: int = 50
    guidance: float = 1.0
    guided_channels: GuidedChannels = "all"
    scheduler: Any = "ddim"
    eta: float = 0.0


@dataclass(frozen=True)
class Change:
    """What is different from a step on.

    Attributes:
        from_step: the step.
        seeds: where each item's noise comes from.
        edits: what acts beside the earlier edits.
        until: the first step at which these edits no longer act; None is the run's end.
    """

    from_step: int
    seeds: tuple[int, ...]
    edits: Edits = ()
    until: int | None = None


def seeds_at(history: tuple[Change, ...], step: int) -> tuple[int, ...]:
    """The seeds in force at a step: those of the latest change."""
    return [change.seeds for change in history if change.from_step <= step][-1]


def edits_at(history: tuple[Change, ...], step: int) -> Edits:
    """The edits in force at a step: those of every change so far that have not ended."""
    acting = [
        change
        for change in history
        if change.from_step <= step and (change.until is None or step < change.until)
    ]
    return [edit for change in acting for edit in change.edits]


def checked_settings(
    steps: Any, guidance: Any, guided_channels: Any, scheduler: Any, eta: Any
) -> Settings:
    """The settings, each of its type and within its bounds.

    Raises InvalidValue or InvalidType otherwise.
    """
    return Settings(
        arguments.whole("steps", steps, 1),
        arguments.number("guidance", guidance, -STRONGEST, STRONGEST, why="1 for none"),
        arguments.choice("guided_channels", guided_channels, get_args(GuidedChannels)),
        scheduler,
        arguments.number("eta", eta, 0, 1, why="as stochastic as DDPM"),
    )


def check_step(step: Any, steps: int, name: str = "step") -> int:
    """A step of a run of so many; 0 is the noisiest.

    Raises InvalidValue or InvalidType otherwise.
    """
    return arguments.whole(name, step, 0, steps - 1, "a step of the run, 0 the noisiest")


def item_seeds(seeds: Any, items: int) -> list[int]:
    """One seed an item: seed, seed + 1, ... of a single one.

    Raises InvalidValue for another number of them than of items.
    """
    if arguments.is_whole(seeds):
        first = arguments.seed("seeds", seeds)
        return [first + i for i in range(items)]
    own = arguments.listed("seeds", seeds, "a whole number of 0 or more, or a list of them")
    if len(own) != items:
        raise InvalidValue(f"There are {len(own)} seeds; expected {items}, one for each label.")
    return [arguments.seed(f"seeds[{i}]", s) for i, s in enumerate(own)]
