"""What a run depends on besides its model and labels: settings, seeds, and changes on the way."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InvalidValue
from ..hooks.names import NamesFilter
from ..hooks.points import HookFunction

Edits = Sequence[tuple[NamesFilter, HookFunction]]
Seeds = int | Sequence[int]
GuidedChannels = Literal["all", "first3"]
Progress = Callable[[int, int], object]
"""What long work reports to: called with how much is done, and how much there is in all."""


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
    """

    from_step: int
    seeds: tuple[int, ...]
    edits: Edits = ()


def seeds_at(history: tuple[Change, ...], step: int) -> tuple[int, ...]:
    """The seeds in force at a step: those of the latest change."""
    return [change.seeds for change in history if change.from_step <= step][-1]


def edits_at(history: tuple[Change, ...], step: int) -> Edits:
    """The edits in force at a step: those of every change so far."""
    return [edit for change in history if change.from_step <= step for edit in change.edits]


def check_settings(settings: Settings) -> None:
    if (
        not isinstance(settings.steps, int)
        or isinstance(settings.steps, bool)
        or settings.steps < 1
    ):
        raise InvalidValue(
            f"steps={settings.steps!r} is no number of denoising steps; expected 1 or more."
        )
    if not math.isfinite(settings.guidance):
        raise InvalidValue(
            f"guidance={settings.guidance} is not a number to scale with; expected 1 (none) or "
            "more."
        )
    if not 0 <= settings.eta <= 1:
        raise InvalidValue(
            f"eta={settings.eta} is out of range; expected 0 (deterministic) to 1 (as stochastic "
            "as DDPM)."
        )
    if settings.guided_channels not in ("all", "first3"):
        near = difflib.get_close_matches(
            str(settings.guided_channels), ["all", "first3"], n=1, cutoff=0
        )[0]
        raise InvalidValue(
            f"guided_channels={settings.guided_channels!r} is no convention; did you mean {near!r}?"
        )


def check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise InvalidValue(
            f"Step {step} is outside the run; it has {steps} steps, 0 (the noisiest) to "
            f"{steps - 1}."
        )


def item_seeds(seeds: Seeds, items: int) -> list[int]:
    """One seed an item: seed, seed + 1, ...

    of an int; ValueError for another number of them than of items.
    """
    own = [seeds + i for i in range(items)] if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(own) != items or min(own) < 0:
        raise InvalidValue(
            f"There are {len(own)} seeds, {own[:3]}...; expected {items}, one for each label, none "
            "negative."
        )
    return own
