"""What `dit-lens diagnose` shows: the verdict, the repairs as a table, and one page of pictures."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate, number
from ..pictures.style import HIGH, INK, LOW, error_bars, whole_numbers
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

KIND = "diagnosis.nc"
COLUMNS = 6
"""So many images stand beside each other on the page."""


def store(result: xr.Dataset, folder: Path) -> Path:
    """Store diagnosis.nc.

    Args:
        result: of `dit_lens.experiments.diagnose`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / KIND, KIND, result)


def show(result: xr.Dataset, stored: Path, more: tuple[Path, ...] = ()) -> None:
    """Print the verdict and the repairs, and draw the page beside the stored figures.

    Args:
        result: of `dit_lens.experiments.diagnose`.
        stored: the file that holds it.
        more: other files that were written.
    """
    console = plain_console(120)
    for line in str(result.attrs["sentence"]).split("\n"):
        console.print(line, soft_wrap=True)
    if "repair_works" in result:
        console.print(_table(result))
    drawn = draw(result, beside(stored, KIND, "diagnosis.png"))
    files(console, [drawn, stored, *more])


def _table(result: xr.Dataset) -> Table:
    """The repairs that were tried."""
    table = Table(title="Repairs that were tried, the best first", title_justify="left")
    for column in ("repair", "score", "works", "collateral", "cures others", "harms others"):
        table.add_column(column, no_wrap=column != "repair")

    def share(value: float) -> str:
        return f"{value:.0%}" if np.isfinite(value) else "-"

    for i, name in enumerate(result.repair.values):
        one = result.isel(repair=i)
        table.add_row(
            str(name),
            number(float(one.repair_score), ".2f"),
            "yes" if float(one.repair_works) else "no",
            number(float(one.repair_collateral), ".3f"),
            share(float(one.repair_cured)),
            share(float(one.repair_harmed)),
        )
    return table


def draw(result: xr.Dataset, path: Path) -> Path:
    """The page: the bad image, good ones and the repaired one; how often the fault comes by the
    step up to which the past is shared; the effect of patches by layer and step; single layers.

    Args:
        result: of `dit_lens.experiments.diagnose`.
        path: of the picture.
    """
    sentence = str(result.attrs["sentence"]).split("\n")[0]
    shown = [str(name) for name in result.shown.values]
    with picture(path, (9.5, 5.2)) as (figure, blank):
        blank.remove()
        figure.suptitle("\n".join(textwrap.wrap(sentence, 125)), fontsize=9, x=0.01, ha="left")
        # two figures in one: the columns of the pictures and of the images are not the same
        above, below = figure.subfigures(2, 1, height_ratios=[0.55, 1.0])
        chance, where, layers = below.subplots(1, 3)
        for i, ax in enumerate(above.subplots(1, COLUMNS)):
            ax.set_axis_off()
            name = _slot(i, shown)
            if name is None:
                continue
            values = result.picture.sel(shown=name).values
            grey = len(values) == 1
            ax.imshow(
                1 - values[0] if grey else np.moveaxis(values[:3], 0, -1).clip(0, 1),
                cmap="gray" if grey else None,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            ax.set_title(name, fontsize=8)
        _chance(chance, result)
        _map(below, where, result)
        _layers(layers, result)
    return path


def _slot(i: int, shown: list[str]) -> str | None:
    """Which image stands in a column: the bad one first, the repaired one last."""
    good = [name for name in shown if name.startswith("good")]
    order = ["bad", *good[: COLUMNS - 2]]
    order += [None] * (COLUMNS - 1 - len(order))  # type: ignore[list-item]
    return [*order, "repaired" if "repaired" in shown else None][i]


def _chance(ax: Any, result: xr.Dataset) -> None:
    bars = error_bars(result.chance.values, result.chance_interval.values)
    ax.errorbar(result.release, result.chance, bars, color=INK, marker="o", markersize=3, capsize=2)
    base = Estimate.of(result.base_rate, result.base_rate_interval.values)
    ax.axhspan(base.low, base.high, color=LOW, alpha=0.15, linewidth=0)
    ax.axhline(base.value, color=LOW, linewidth=1, label="other seeds")
    ax.set(ylim=(-0.03, 1.03), xlabel="past shared up to step", ylabel="share with the fault")
    ax.set_title(f"when: {result.attrs['how']}")
    ax.legend(fontsize=7, edgecolor="none", loc="best")
    whole_numbers(ax.xaxis)


def _map(figure: Any, ax: Any, result: xr.Dataset) -> None:
    """Every place that was patched, the small ones over the large ones."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    steps, n = int(result.attrs["steps"]), int(result.attrs["n_layers"])
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(-0.5, n - 0.5), xlabel="step, 0 the noisiest")
    ax.set(ylabel="layer", title="where: effect of a patch, both ways")
    ax.set_facecolor("#eeeeee")
    colours = colormaps["viridis"]
    if "place_effect" in result:
        size = result.place_depth.values * (
            result.place_last.values - result.place_first.values + 1
        )
        for i in np.argsort(-size, kind="stable"):
            one = result.isel(place=int(i))
            first, last = int(one.place_first), int(one.place_last)
            corner = (first - 0.5, int(one.place_layer) - 0.5)
            value = max(0.0, float(one.place_effect))
            ax.add_patch(
                Rectangle(
                    corner,
                    last - first + 1,
                    int(one.place_depth),
                    facecolor=colours(value),
                    edgecolor="white",
                    linewidth=0.3,
                )
            )
    if result.attrs["first"] >= 0:
        for edge in (result.attrs["first"] - 0.5, result.attrs["last"] + 0.5):
            ax.axvline(edge, color="white", linewidth=1.2, linestyle="--")
        ax.set_xlabel("step, 0 the noisiest (dashed: the window)")
    figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=ax, fraction=0.05)
    whole_numbers(ax.xaxis, ax.yaxis)


def _layers(ax: Any, result: xr.Dataset) -> None:
    ax.set(title="single layers", ylabel="effect, 1 all of the fault", ylim=(-0.25, 1.1))
    if "effect" not in result:
        ax.text(0.5, 0.5, "none was measured", ha="center", transform=ax.transAxes, color=INK)
        ax.set_xticks([])
        return
    order = np.argsort(result.layer.values)
    values, ends = result.effect.values[order], result.effect_interval.values[order]
    blamed = {s.strip() for s in str(result.attrs["layers"]).split(",")}
    names = [str(layer) for layer in result.layer.values[order]]
    colours = [HIGH if name in blamed else "#bbbbbb" for name in names]
    if "together" in result:
        values = np.append(values, result.together)
        ends = np.vstack([ends, result.together_interval])
        names, colours = [*names, "together"], [*colours, HIGH]
    ax.bar(names, values, yerr=error_bars(values, ends), color=colours, ecolor=INK, capsize=2)
    ax.axhline(0.5, color=INK, linewidth=0.6, linestyle=":")
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set_xlabel("layer (orange: to blame)")
