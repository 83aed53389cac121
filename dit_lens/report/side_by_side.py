"""What `dit-lens plan --side-by-side` shows: ways to make a run cheaper, as a table for each budget
and a picture of error against what is left.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate
from ..pictures.style import INK, error_bars, legend
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

KIND = "side_by_side.nc"
SHOWN = {
    "macs",
    "time",
    "effect",
    "effect_interval",
    "total",
    "total_interval",
    "over_plan",
    "over_plan_interval",
    "psnr",
    "psnr_interval",
}
"""What has a place of its own in the table; all else is a judge's."""


def store(result: xr.Dataset, folder: Path) -> Path:
    """Store side_by_side.nc.

    Args:
        result: of `dit_lens.experiments.side_by_side`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / KIND, KIND, result)


def show(result: xr.Dataset, stored: Path) -> None:
    """Print the tables and the sentences, and draw the picture beside what is stored.

    Args:
        result: of `dit_lens.experiments.side_by_side`.
        stored: the file that holds it.
    """
    console = plain_console(180)
    for i in range(result.sizes["budget"]):
        console.print(_table(result.isel(budget=i)))
    for line in str(result.attrs["sentence"]).split("\n"):
        console.print(line, soft_wrap=True)
    files(console, [draw(result, beside(stored, KIND, "side_by_side.png")), stored])


def _table(one: xr.Dataset) -> Table:
    """The ways at one budget."""
    judged = [str(n) for n, v in one.data_vars.items() if n not in SHOWN and v.dims == ("way",)]
    bands = [str(band) for band in one.band.values]
    table = Table(
        title=f"At {float(one.budget):.1%} of the multiply-accumulates: effect on the image "
        "(1: a stranger's distance)".replace("%", " %"),
        title_justify="left",
    )
    columns = ["", "MACs", "time", *bands, "times the plan's", "PSNR / dB", *judged]
    for column in columns:
        table.add_column(column, no_wrap=True)
    for way in one.way.values:
        row = one.sel(way=str(way))
        effects = [
            f"{Estimate.of(row.effect.sel(band=b), row.effect_interval.sel(band=b)):.1e}"
            for b in bands
        ]
        over = Estimate.of(row.over_plan, row.over_plan_interval)
        table.add_row(
            str(way),
            f"{float(row.macs):.3f}",
            f"{float(row.time):.2f}",
            *effects,
            "" if way == "plan" else f"{over:.2g}",
            f"{Estimate.of(row.psnr, row.psnr_interval):.1f}",
            *(f"{float(row[name]):.3g}" for name in judged),
        )
    return table


def draw(result: xr.Dataset, path: Path) -> Path:
    """The error in all bands together against the share of multiply-accumulates that is left.

    Args:
        result: of `dit_lens.experiments.side_by_side`.
        path: of the picture.
    """
    from matplotlib import colormaps

    ways = [str(way) for way in result.way.values]
    others = [way for way in ways if way != "plan"]
    colours = dict(zip(others, colormaps["tab10"](range(10)), strict=False))
    marks = dict(zip(others, "os^vDPX<>", strict=False))
    with picture(path, (6.8, 3.6)) as (_, ax):
        for way in ways:
            rows = result.sel(way=way).sortby("macs")
            colour = INK if way == "plan" else colours[way]
            ax.errorbar(
                rows.macs.values,
                rows.total.values,
                yerr=error_bars(rows.total.values, rows.total_interval.values),
                color=colour,
                marker="*" if way == "plan" else marks[way],
                markersize=8 if way == "plan" else 4,
                linewidth=1.5 if way == "plan" else 0.8,
                elinewidth=0.7,
                capsize=2,
                zorder=3 if way == "plan" else 2,
                # a logarithm has no place for none
                label=way if bool((rows.total > 0).any()) else f"{way}: no error",
            )
        ax.set_yscale("log")
        ax.set_xlabel("share of multiply-accumulates left")
        ax.set_ylabel("error, 1 a stranger's distance in a band")
        legend(ax, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return path
