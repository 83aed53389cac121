"""What `dit-lens gap --couple` shows: a row for each strength of the coupling, two sentences, a
picture.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr
from rich.table import Table

from ..experiments.coupling_sweep import SENSES
from ..measures.estimate import Estimate, number
from ..storage import save_dataset
from .style import HIGH, INK, LOW, beside, error_bars, files, legend, picture, plain_console


def write(results: xr.Dataset, folder: Path) -> None:
    """Store coupling_sweep.nc; then print the table and the sentences, and draw
    coupling_sweep.png.

    Args:
        results: of `dit_lens.experiments.couplings`.
        folder: for the files; it is made if need be.
    """
    show(results, save_dataset(folder / "coupling_sweep.nc", "coupling_sweep.nc", results))


def show(results: xr.Dataset, stored: Path) -> None:
    """Print the table and the sentences, and draw the picture beside the stored result.

    Args:
        results: of `dit_lens.experiments.couplings`.
        stored: the file that holds them.
    """
    console = plain_console(110)
    form, eps = results.attrs["form"], results.attrs["eps"]
    title = f"Twins coupled throughout ({form} form, eps {eps:g})"
    table = Table(title=title, title_justify="left")
    for column in (
        "g",
        "low parts at",
        "high parts at",
        "gap, steps [95 %]",
        "gap, log size [95 %]",
        "rho",
        "response",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for g in results.g.values:
        one = results.sel(g=g)
        gaps = (one.sel(sense=sense) for sense in SENSES)
        table.add_row(
            f"{g:g}",
            *(number(step) for step in one.parting.values),
            *(f"{Estimate.of(gap.gap, gap.gap_interval):+.2f}" for gap in gaps),
            number(one.rho, "+.2f"),
            number(one.response.mean(), "+.2f"),
        )
    console.print(table)
    for sense in SENSES:
        console.print(results.attrs[f"sentence_{sense}"], soft_wrap=True)
    drawn = draw(results, beside(stored, "coupling_sweep.nc", "coupling_sweep.png"))
    files(console, [drawn, stored])


def draw(results: xr.Dataset, path: Path) -> Path:
    """The gap in both senses against g; what attention leaves of the difference, against rho.

    Args:
        results: of `dit_lens.experiments.couplings`.
        path: of the picture.
    """
    g = results.g.values
    with picture(path, (10.5, 3.1), ncols=3) as (_, axes):
        titles = {
            "parting": ("when the twins part", "gap, steps (high minus low)"),
            "size": ("what they end up differing by", "log E low $-$ log E high"),
        }
        for ax, (sense, (title, unit)) in zip(axes, titles.items(), strict=False):
            one = results.sel(sense=sense)
            ax.errorbar(
                g,
                one.gap,
                yerr=error_bars(one.gap, one.gap_interval),
                color=INK,
                marker="o",
                markersize=4,
                linewidth=1,
                capsize=2,
            )
            ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
            ax.set(title=title, ylabel=unit)
        response = axes[2]
        for layer in results.layer.values:
            response.plot(
                g,
                results.response.sel(layer=layer),
                color=LOW,
                alpha=0.25,
                linewidth=0.8,
                label="each layer" if layer == 0 else None,
            )
        response.plot(
            g,
            results.response.mean("layer"),
            color=LOW,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label="mean of layers",
        )
        response.plot(
            g,
            results.linear.mean("layer"),
            color=INK,
            linestyle="none",
            marker="x",
            markersize=5,
            label="first order",
        )
        rho = r"$\rho$ = (1 - g)/(1 + g)"
        response.plot(g, results.rho, color=HIGH, linestyle="--", linewidth=1, label=rho)
        response.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        response.set(
            ylabel="difference left by attention",
            title=f"response of attention, step {int(results.attrs['step'])}",
        )
        legend(response)
        for ax in axes:
            ax.set_xlabel("coupling g")
    return path
