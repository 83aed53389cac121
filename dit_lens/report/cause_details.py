"""What `dit-lens patch` shows when more is asked for: cumulative knock-outs and the smallest set,
Shapley shares, layers by windows of steps, and the exchange of bands between twins.

Each is one file with its sentence, and one table or picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..experiments.effects import moves
from ..measures.estimate import Estimate, number
from ..pictures.style import HIGH, INK, LOW, error_bars, legend, whole_numbers, windows_up
from ..storage import save_dataset
from .style import DOT, beside, files, picture, plain_console

WIDTH = 120


def write(kind: str, result: xr.Dataset, folder: Path) -> None:
    """Store a result, print its table and sentence and draw its picture.

    Args:
        kind: the name of its file, one of `SHOWN`.
        result: of the experiment of that name.
        folder: for the files; it is made if need be.
    """
    show(kind, result, save_dataset(folder / kind, kind, result))


def show(kind: str, result: xr.Dataset, stored: Path) -> None:
    """Print a stored result's table and sentence, and draw its picture beside it.

    Args:
        kind: one of `SHOWN`.
        result: of the experiment of that name.
        stored: its file.
    """
    console, drawn = plain_console(WIDTH), []
    if kind == "shapley.nc":
        console.print(_shares(result))
    console.print(result.attrs["sentence"], soft_wrap=True)
    if kind in PICTURES:
        path = beside(stored, kind, kind.replace(".nc", ".png"))
        PICTURES[kind](result, path)
        drawn.append(path)
    files(console, [*drawn, stored])


def _cumulative(result: xr.Dataset, path: Path) -> None:
    with picture(path, (5, 3)) as (_, ax):
        for end, color in (("first", LOW), ("last", HIGH)):
            one = result.sel(end=end)
            yerr = error_bars(one.effect, one.effect_interval)
            options = {"fmt": "o-", "markersize": 3, "linewidth": 0.9, "capsize": 2}
            ax.errorbar(
                one.depth, one.effect, yerr=yerr, color=color, label=f"{end} layers", **options
            )
        ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        ax.axhline(-result.attrs["gap"], color=INK, linewidth=0.8, linestyle="--", label="no gap")
        lost = int(np.isnan(result.effect.values).sum())
        without = f"; {lost} sets leave a band without commitment" if lost else ""
        ax.set(
            xlabel=f"layers knocked out together ({result.attrs['how']})",
            ylabel="change of the gap, steps",
            title=f"the gap is {result.attrs['gap']:+.2f} steps{without}",
        )
        whole_numbers(ax.xaxis)
        legend(ax)


def _shares(result: xr.Dataset) -> Table:
    drawn = "all" if result.attrs["every"] else f"{int(result.attrs['orders'])} drawn"
    table = Table(
        title=f"Shares of the change of the gap (steps, mean over {drawn} orders), and what two do "
        "beyond themselves [95 %, all at once]",
        title_justify="left",
    )
    names = [str(name) for name in result.player.values]
    for column in ("layers", "share [95 %]", "error of drawing", *(f"and {n}" for n in names)):
        table.add_column(column, justify="right", no_wrap=True)
    for i, name in enumerate(names):
        one = result.isel(player=i)
        both = (result.interaction.values[i, j] for j in range(len(names)))
        table.add_row(
            name,
            f"{Estimate.of(one.share, one.share_interval):+.2f}",
            number(one.monte_carlo, ".3f"),
            *(number(value, "+.2f") for value in both),
        )
    return table


def _windows(result: xr.Dataset, path: Path) -> None:
    values, sure = result.effect.values, moves(result).values
    top = max(float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0, 1e-6)
    first, last = (int(result.layer[i]) for i in (0, -1))
    with picture(path, (6, 2.8)) as (figure, ax):
        image = ax.imshow(
            values.T,
            aspect="auto",
            origin="lower",
            cmap="RdBu_r",
            vmin=-top,
            vmax=top,
            extent=(first - 0.5, last + 0.5, -0.5, result.sizes["window"] - 0.5),
        )
        column, row = np.nonzero(sure)
        ax.plot(result.layer.values[column], row, **DOT)
        column, row = np.nonzero(np.isnan(values))
        ax.plot(result.layer.values[column], row, "x", color=HIGH, markersize=4)
        windows_up(ax, result.window.values)
        ax.set(
            xlabel="layer knocked out (dot: surely moves the gap; x: a band does not commit)",
            ylabel="in these steps",
            title=f"the gap is {result.attrs['gap']:+.2f} steps",
        )
        whole_numbers(ax.xaxis)
        figure.colorbar(image, ax=ax, label="change of the gap, steps")


def _interchange(result: xr.Dataset, path: Path) -> None:
    """A column a band taken and a band of the image; above the move at full dose by layer, below
    its mean over layers by dose, a line a window.
    """
    panels = [(taken, band) for taken in ("low", "high") for band in ("low", "high")]
    windows = [str(window) for window in result.window.values]
    shades = np.linspace(0.3, 1, len(windows))
    mean = "mean over layers" + (" and heads" if result.sizes["head"] > 1 else "")
    with picture(path, (10, 4.6), nrows=2, ncols=4, sharey=True) as (_, axes):
        for (taken, band), (by_layer, by_dose) in zip(panels, axes.T, strict=True):
            color = LOW if taken == "low" else HIGH
            for window, shade in zip(windows, shades, strict=True):
                one = result.move.sel(taken=taken, band=band, window=window)
                full, options = one.isel(dose=-1), {"color": color, "alpha": float(shade)}
                by_layer.plot(full.layer, full.mean("head"), ".-", label=window, **options)
                if result.sizes["head"] > 1:
                    for head in full["head"].values:
                        by_layer.plot(full.layer, full.sel(head=head), ".", markersize=2, **options)
                doses = [0.0, *one.dose.values]
                by_dose.plot(doses, [0.0, *one.mean(("layer", "head")).values], ".-", **options)
            for ax in (by_layer, by_dose):
                ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
            by_layer.set(xlabel="layer", title=f"{taken} band from A:\nthe image's {band} band")
            by_dose.set(xlabel=f"dose ({mean})")
            whole_numbers(by_layer.xaxis)
        for ax in axes[:, 0]:
            ax.set(ylabel="share of the way to A")
        # a window in which the exchange leads away would leave the rest without room
        axes[0, 0].set_ylim(bottom=max(axes[0, 0].get_ylim()[0], -0.6))
        legend(axes[0, 0], title="steps", title_fontsize=7)


PICTURES: dict[str, Callable[[xr.Dataset, Path], None]] = {
    "cumulative.nc": _cumulative,
    "windows.nc": _windows,
    "interchange.nc": _interchange,
}
SHOWN = ("cumulative.nc", "smallest_set.nc", "shapley.nc", "windows.nc", "interchange.nc")
"""The files that are shown here, in this order."""
