"""What `dit-lens compare` shows: what a change to a model does, as a table, sentences and a
picture.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate
from ..pictures.result import Result
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

KIND = "compare.nc"
ROWS = {
    "moved by (1: a stranger's distance)": ("effect", ".2e"),
    "power, times what it was": ("power", ".3f"),
    "the unchanged model's error, times its own": ("error", ".3f"),
    "decided later by, in steps": ("later", "+.2f"),
}


def store(result: xr.Dataset, folder: Path) -> Path:
    """Store compare.nc.

    Args:
        result: of `dit_lens.experiments.compare`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / KIND, KIND, result)


def show(result: xr.Dataset, stored: Path) -> None:
    """Print the table and the sentences, and draw the picture beside what is stored.

    Args:
        result: of `dit_lens.experiments.compare`.
        stored: the file that holds it.
    """
    console = plain_console(120)
    table = Table(title="What the change does, for the same seeds [95 %]", title_justify="left")
    for column in ("", *map(str, result.band.values)):
        table.add_column(column, no_wrap=True)
    for words, (name, form) in ROWS.items():
        values = [
            Estimate.of(result[name][b], result[f"{name}_interval"][b])
            for b in range(result.sizes["band"])
        ]
        table.add_row(words, *(f"{value:{form}}" for value in values))
    console.print(table)
    for line in str(result.attrs["sentence"]).split("\n"):
        console.print(line, soft_wrap=True)
    files(console, [draw(result, beside(stored, KIND, "compare.png")), stored])


def draw(result: xr.Dataset, path: Path) -> Path:
    """Draw what the change does to images, and to when they are decided.

    Args:
        result: of `dit_lens.experiments.compare`.
        path: the file.
    """
    plot = Result.of(result).plot
    with picture(path, (7.0, 2.5), ncols=2, width_ratios=(3, 2)) as (_, (left, right)):
        plot.change(ax=left)
        plot.decided(ax=right)
    return path
