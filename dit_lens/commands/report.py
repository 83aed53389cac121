"""Print the tables and draw the pictures of stored results again."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MissingFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RESULTS."""
    parser.add_argument(
        "results", type=Path, help="the gap.nc that `dit-lens gap` wrote, or its folder"
    )


def run(args: argparse.Namespace) -> None:
    """Write the report of the stored dataset into the folder that it lies in."""
    from ..report import gap as gap_report

    path = args.results / "gap.nc" if args.results.is_dir() else args.results
    if not path.exists():
        raise MissingFile(
            f"There are no results at {str(path)!r}; expected the gap.nc that `dit-lens gap` wrote."
        )
    gap_report.write(gap_report.read(path), path.parent)
