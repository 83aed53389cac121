"""What measurements on a model will cost on this device: forwards, memory, time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common import (
    Answer,
    add_device,
    add_model,
    add_quick,
    add_size,
    batch_of,
    calibrating,
    console,
    open_model,
    sizes,
)

if TYPE_CHECKING:
    from ..experiments.cost import Cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and the size of the runs."""
    add_model(parser)
    add_quick(parser, pairs=(48, 16), steps=(50, 25))
    add_size(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> Answer:
    """Calibrate, and print a table."""
    from ..experiments.cost import gap_cost

    pairs, steps = sizes(args)
    model = open_model(args)
    batch = batch_of(args, model, 2 * pairs)
    with calibrating() as progress:
        costs = [
            gap_cost(model, pairs, steps, batch=batch, clones=clones, progress=progress)
            for clones in (True, False)
        ]
    show(costs)
    return Answer([vars(each) for each in costs])


def show(costs: Sequence[Cost]) -> None:
    """Print what measurements cost.

    Args:
        costs: one a row.
    """
    from rich.table import Table

    table = Table("", *(cost.what for cost in costs), title="what it costs on this device")

    def row(name: str, of: Sequence[str]) -> None:
        table.add_row(name, *of)

    about = ["" if cost.exact else "about " for cost in costs]
    row("forwards", [f"{a}{c.forwards:,}" for a, c in zip(about, costs, strict=True)])
    row("images", [f"{a}{c.images:,}" for a, c in zip(about, costs, strict=True)])
    row("block evaluations", [f"{a}{c.blocks:,}" for a, c in zip(about, costs, strict=True)])
    row("TMACs", [f"{c.macs / 1e12:,.3g}" for c in costs])
    row("images at once", [f"{c.batch}" for c in costs])
    row("memory, GB", [f"{c.memory / 1e9:.2f} of {c.available / 1e9:.1f} free" for c in costs])
    if any(c.kept for c in costs):
        row("trajectories, GB", [f"{c.kept / 1e9:.2f} of {c.room / 1e9:.1f} free" for c in costs])
    row("on disk meanwhile, GB", [f"{c.stored / 1e9:.2f}" for c in costs])
    row("time", [f"about {duration(c.seconds)}" for c in costs])
    console(100).print(table)


def duration(seconds: float) -> str:
    """A time in words.

    Args:
        seconds: how long.

    >>> duration(42.3), duration(600), duration(9000)
    ('42 s', '10.0 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
