"""What `dit-lens gap --couple` shows: a row for each strength of the coupling, two sentences, a
picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..experiments.coupling_sweep import SENSES
from .gap import HIGH, INK, LOW, _pyplot

if TYPE_CHECKING:
    import xarray as xr


def write(results: xr.Dataset, folder: Path) -> None:
    """Print the table and the sentences; write knob.nc and knob.png into the folder."""
    from rich.console import Console
    from rich.table import Table

    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=110, highlight=False)
    table = Table(
        title=f"Twins coupled throughout ({results.attrs['form']} form, eps {results.attrs['eps']:g})",
        title_justify="left",
    )
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
        gaps = [
            f"{float(v):+.2f} [{a:+.2f}, {b:+.2f}]"
            for v, (a, b) in zip(one.gap.values, one.gap_interval.values, strict=True)
        ]
        table.add_row(
            f"{g:g}",
            *(f"{v:.1f}" for v in one.parting.values),
            *gaps,
            f"{float(one.rho):+.2f}",
            f"{float(one.response.mean()):+.2f}",
        )
    console.print(table)
    for sense in SENSES:
        console.print(results.attrs[f"sentence_{sense}"], soft_wrap=True)
    results.to_netcdf(folder / "knob.nc", engine="scipy")
    console.print(
        f"[dim]pictures and figures: {draw(results, folder / 'knob.png')}, "
        f"{folder / 'knob.nc'}[/dim]",
        soft_wrap=True,
    )


def draw(results: xr.Dataset, path: Path) -> Path:
    """The gap in both senses against g, and what attention leaves of the difference, beside rho."""
    plt = _pyplot()
    figure, (steps, size, response) = plt.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
    g = results.g.values
    for ax, sense, unit in (
        (steps, "parting", "gap, steps (high minus low)"),
        (size, "size", "log E low $-$ log E high"),
    ):
        one = results.sel(sense=sense)
        ax.errorbar(
            g,
            one.gap,
            yerr=np.abs(one.gap_interval.values.T - one.gap.values),
            color=INK,
            marker="o",
            markersize=4,
            linewidth=1,
            capsize=2,
        )
        ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        ax.set_ylabel(unit)
    steps.set_title("when the twins part")
    size.set_title("what they end up differing by")
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
    response.plot(
        g, results.rho, color=HIGH, linestyle="--", linewidth=1, label=r"$\rho$ = (1 - g)/(1 + g)"
    )
    response.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    response.set(
        ylabel="difference left by attention",
        title=f"response of attention, step {int(results.attrs['step'])}",
    )
    response.legend(fontsize=7, frameon=False)
    for ax in (steps, size, response):
        ax.set_xlabel("coupling g")
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path
