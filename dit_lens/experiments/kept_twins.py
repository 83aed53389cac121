"""Twins as one piece of a measurement."""

from __future__ import annotations

from typing import Any

from ..model.hooked import HookedDiT
from ..sampling.kept import kept_run
from ..sampling.run import Run
from ..twinning.twins import Twins, twins


def kept_twins(name: str, model: HookedDiT, pairs: int, labels: Any, **settings: Any) -> Twins:
    """Twins made, or found made.

    Args:
        name: of the piece.
        model: the opened model.
        pairs: how many.
        labels: one a pair.
        **settings: further arguments of `twins`, by the noise tie without a scheduler of its own.
    """
    made: list[Twins] = []

    def run() -> Run:
        made.append(twins(model, pairs, labels, **settings))
        return made[0].run

    kept = kept_run(name, run, model)
    release = int(settings.get("release", 0))
    return made[0] if made else Twins(kept, pairs, release, "noise", 0.0)
