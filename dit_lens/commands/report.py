"""Print the tables and draw the pictures of stored results again."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Answer, stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RESULTS."""
    parser.add_argument(
        "results",
        type=Path,
        help="the folder that `dit-lens gap` or `patch` wrote, or a file in it",
    )


def run(args: argparse.Namespace) -> Answer:
    """Show what is stored there; see `dit_lens.report.stored`."""
    from ..report.stored import show

    show(args.results)
    return stored(args.results)
