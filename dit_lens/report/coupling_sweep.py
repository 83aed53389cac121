"""What `dit-lens gap --couple` shows: a row for each strength of the coupling, sentences, a
picture.
"""

from __future__ import annotations

from pathlib import Path

import xarray as xr
from rich.table import Table

from ..experiments.coupling_sweep import SENSES
from ..measures.estimate import Estimate, number
from ..pictures.style import HIGH, INK, LOW, error_bars, legend
from ..storage import save_dataset
from .style import beside, files, picture, plain_console


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
    console = plain_console(120)
    form, eps = results.attrs["form"], results.attrs["eps"]
    gaps = Table(
        title=f"The gap of twins coupled by g ({form} form, eps {eps:g}), in three senses [95 %]",
        title_justify="left",
    )
    for column in ("g", "agreement, steps", "low parts at", "high", "parting, steps", "log size"):
        gaps.add_column(column, justify="right", no_wrap=True)
    parts = Table(
        title=f"What attention leaves of the twins' difference, mean of layers at step "
        f"{int(results.attrs['step'])}, and the finished images",
        title_justify="left",
    )
    for column in (
        "g",
        "rho",
        "routing",
        "xi",
        "pattern",
        *(f"{band} energy [95 %]" for band in results.band.values),
        "read [95 %]",
    ):
        parts.add_column(column, justify="right", no_wrap=True)
    for g in results.g.values:
        one = results.sel(g=g)
        agreement, parting, size = (
            f"{Estimate.of(gap.gap, gap.gap_interval):+.2f}"
            for gap in (one.sel(sense=sense) for sense in SENSES)
        )
        when = (number(step) for step in one.parting.values)
        gaps.add_row(f"{g:g}", agreement, *when, parting, size)
        energies = zip(one.energy.values, one.energy_interval.values, strict=True)
        parts.add_row(
            f"{g:g}",
            number(one.rho, "+.2f"),
            number(one.routing.mean(), "+.2f"),
            number(one.xi, "+.2f"),
            number(one.pattern.mean(), "+.2f"),
            *(f"{Estimate.of(*energy):.2f}" for energy in energies),
            f"{Estimate.of(one['read'], one.read_interval):.0%}",
        )
    console.print(gaps)
    console.print(parts)
    for sense in (*SENSES, "quality"):
        console.print(results.attrs[f"sentence_{sense}"], soft_wrap=True)
    drawn = draw(results, beside(stored, "coupling_sweep.nc", "coupling_sweep.png"))
    files(console, [drawn, stored])


def draw(results: xr.Dataset, path: Path) -> Path:
    """The gap in three senses against g; both parts of what attention leaves, by layer; quality.

    Args:
        results: of `dit_lens.experiments.couplings`.
        path: of the picture.
    """
    g = results.g.values
    with picture(path, (10.5, 5.8), nrows=2, ncols=3) as (_, axes):
        titles = {
            "agreement": ("when they commit", "gap, steps (high minus low)"),
            "parting": ("when they part", "gap, steps (high minus low)"),
            "size": ("what they end up differing by", "log E low $-$ log E high"),
        }
        for ax, (sense, (title, unit)) in zip(axes[0], titles.items(), strict=True):
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
        step = int(results.attrs["step"])
        laws = {
            "routing": ("rho", r"$\rho$ = (1 - g)/(1 + g)"),
            "pattern": ("xi", r"$\xi$ = 1/(1 + g)"),
        }
        for ax, (part, (law, formula)) in zip(axes[1], laws.items(), strict=False):
            for layer in results.layer.values:
                label = "each layer" if layer == 0 else None
                values = results[part].sel(layer=layer)
                ax.plot(g, values, color=LOW, alpha=0.25, linewidth=0.8, label=label)
            mean = results[part].mean("layer")
            ax.plot(g, mean, color=LOW, marker="o", markersize=4, label="mean of layers")
            ax.plot(g, results[law], color=HIGH, linestyle="--", linewidth=1, label=formula)
            ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
            ax.set(title=f"{part}, step {step}", ylabel="difference left by attention")
            legend(ax)
        quality = axes[1][2]
        for band, colour in zip(results.band.values, (LOW, HIGH), strict=True):
            one = results.sel(band=band)
            bars = error_bars(one.energy, one.energy_interval)
            options = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}
            quality.errorbar(
                g, one.energy, yerr=bars, color=colour, label=f"{band} energy", **options
            )
        bars = error_bars(results["read"], results.read_interval)
        quality.errorbar(g, results["read"], yerr=bars, color=INK, label="read", **options)
        quality.axhline(1, color=INK, linewidth=0.6, linestyle=":")
        quality.set(title="the finished images", ylabel=f"energy, share of g = {g[0]:g}; read")
        legend(quality)
        for ax in axes.flat:
            ax.set_xlabel("coupling g")
    return path
