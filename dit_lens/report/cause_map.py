"""What `dit-lens map` shows: the effect of an intervention by layer and step, under the curves of
when each band is decided, and the four quadrants as a table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate
from ..pictures.style import HIGH, INK, LOW, legend, whole_numbers
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

KIND = "cause_map.nc"


def store(result: xr.Dataset, folder: Path) -> Path:
    """Store cause_map.nc.

    Args:
        result: of `dit_lens.experiments.cause_map`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / KIND, KIND, result)


def show(result: xr.Dataset, stored: Path) -> None:
    """Print the table and the sentences, and draw the picture beside the stored map.

    Args:
        result: of `dit_lens.experiments.cause_map`.
        stored: the file that holds it.
    """
    console = plain_console(120)
    console.print(_table(result))
    for line in str(result.attrs["sentence"]).split("\n"):
        console.print(line, soft_wrap=True)
    drawn = draw(result, beside(stored, KIND, "cause_map.png"))
    files(console, [drawn, stored])


def _table(result: xr.Dataset) -> Table:
    """The four quadrants by band."""
    held = "quadrant_held" in result
    table = Table(
        title=f"Effect of a {result.attrs['kind']} on the image (1: a stranger's distance)",
        title_justify="left",
    )
    for column in ("steps", "layers", "band", "mean of one cell [95 %]"):
        table.add_column(column, no_wrap=True)
    if held:
        table.add_column("every second step held [95 %]", no_wrap=True)
    for half in result.half.values:
        for part in result.part.values:
            for band in result.band.values:
                one = result.sel(half=half, part=part, band=band)
                values = [Estimate.of(one.quadrant, one.quadrant_interval)]
                if held:
                    values.append(Estimate.of(one.quadrant_held, one.quadrant_held_interval))
                table.add_row(half, part, str(band), *(f"{value:.1e}" for value in values))
    return table


def draw(result: xr.Dataset, path: Path) -> Path:
    """A heat map of the effect by layer and step for each site and band, with the commitment curves
    above.

    Args:
        result: of `dit_lens.experiments.cause_map`.
        path: of the picture.
    """
    from matplotlib.colors import LogNorm

    sites, bands = result.site.values, result.band.values
    positive = result.effect.values[result.effect.values > 0]
    # a few cells lie far below the rest, and would take all the colours
    low, high = np.quantile(positive, [0.02, 1.0]) if positive.size else (1e-12, 1.0)
    norm = LogNorm(low, max(high, 1.01 * low))
    rows = 1 + len(bands)
    heights = [0.7, *[1.0] * len(bands)]
    layers = np.arange(result.sizes["layer"] + 1) - 0.5
    with picture(
        path,
        (1 + 3.2 * len(sites), 1.2 + 1.9 * len(bands)),
        nrows=rows,
        ncols=len(sites),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
    ) as (figure, axes):
        colours = [LOW, HIGH] if len(bands) == 2 else [None] * len(bands)
        for column, site in zip(axes.T, sites, strict=True):
            for band, colour in zip(bands, colours, strict=True):
                column[0].plot(result.step, result.decided.sel(band=band), color=colour, label=band)
            column[0].axhline(0.5, color=INK, linewidth=0.5, linestyle=":")
            column[0].set(ylim=(0, 1.02), title=f"{result.attrs['kind']}: {site}")
            for ax, band in zip(column[1:], bands, strict=True):
                effect = result.effect.sel(site=site, band=band)
                for w in range(result.sizes["window"]):
                    ends = [float(result.first[w]) - 0.5, float(result.last[w]) + 0.5]
                    values = np.ma.masked_invalid(effect.isel(window=w).values)[:, None]
                    image = ax.pcolormesh(
                        ends, layers, np.maximum(values, low), norm=norm, cmap="viridis"
                    )
                ax.set_facecolor("#dddddd")
            column[-1].set_xlabel("step, 0 the noisiest")
        for ax, band in zip(axes[1:, 0], bands, strict=True):
            ax.set_ylabel(f"layer ({band})")
        axes[0, 0].set_ylabel("share decided")
        legend(axes[0, 0], loc="lower right")
        for ax in axes[1:, 1:].flat:
            ax.sharey(axes[1, 0])
        whole_numbers(*(ax.xaxis for ax in axes[-1]), *(ax.yaxis for ax in axes[1:, 0]))
        figure.colorbar(image, ax=axes[1:], label="effect, 1 a stranger's distance", extend="min")
    return path
