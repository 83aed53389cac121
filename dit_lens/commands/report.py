"""Print the tables and draw the pictures of stored results again, or write them as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import MissingFile
from .common import Answer

PAGE = Path("report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RESULTS, and --html."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="the folder that `dit-lens gap`, `patch` and others wrote, or a file in it; several "
        "are shown side by side",
    )
    parser.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=PAGE,
        metavar="PAGE",
        help="write one page with interactive figures instead, which needs no network (default: "
        f"{PAGE}); give it after the folders",
    )


def check(args: argparse.Namespace) -> None:
    """Results that are not there."""
    for path in args.results:
        if not path.exists():
            raise MissingFile(
                f"There are no results at {str(path)!r}; expected the folder that `dit-lens gap`, "
                "`patch` or another command wrote, or a file in it."
            )


def run(args: argparse.Namespace) -> Answer:
    """Show what is stored there; see `dit_lens.report.stored` and `dit_lens.report.page`."""
    if args.html is not None:
        from ..report.page import write

        page = write(args.results, args.html)
        print(f"page: {page}")
        return Answer({"page": str(page)})
    from ..report.stored import results_at, show

    for folder in args.results:
        show(folder)

    def found() -> Any:
        all_ = [{"stored": str(folder), "results": results_at(folder)} for folder in args.results]
        return all_[0] if len(all_) == 1 else all_

    return Answer(found)  # read again only where somebody wants it
