"""What `dit-lens gap --attributes` shows: a table with a row an attribute, a sentence, and two
pictures: when each is decided beside the bands, and the order in which a picture is painted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate
from ..pictures.attributes import (
    AGREE,
    NOTHING,
    draw_decided,
    order,
    plain_name,
    steps_size,
)
from ..pictures.style import INK
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

CAPTION = (
    "decided: clones released at this step end with the same value half as often as they could, "
    "beyond chance; "
    "readable: the predicted x0 reads as the finished image, so measured. Readable is not "
    "decided: a prediction reads as the likelier value, also where another is still possible."
)
DIFFER = "white"
KEY = (
    "squares: the attributes in the order of the columns on the right; full: the twins agree, "
    "empty: they differ, dot: the label leaves no choice"
)
PAIRS = 4
"""Shown in the picture."""


def write(results: xr.Dataset, folder: Path) -> None:
    """Store attributes.nc; then print the table and the sentences, and draw two pictures.

    Args:
        results: of `dit_lens.experiments.attributes`.
        folder: for the files; it is made if need be.
    """
    show(results, save_dataset(folder / "attributes.nc", "attributes.nc", results))


def show(results: xr.Dataset, stored: Path) -> None:
    """Print the table and the sentences, and draw two pictures beside the stored result.

    Args:
        results: of `dit_lens.experiments.attributes`.
        stored: the file that holds them.
    """
    console = plain_console(110)
    console.print(table(results))
    for line in [results.attrs["headline"], *results.attrs["notes"].splitlines()]:
        console.print(line, soft_wrap=True)
    pictures = [
        draw_steps(results, beside(stored, "attributes.nc", "attributes.png")),
        draw_order(results, beside(stored, "attributes.nc", "painters_order.png")),
    ]
    files(console, [*pictures, stored])


def table(results: xr.Dataset) -> Table:
    """One row an attribute, in the order in which they are decided, then the bands.

    Args:
        results: of `dit_lens.experiments.attributes`.
    """
    shown = Table(
        title=results.attrs["title"],
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        padding=(0, 1),
    )
    for column in ("", "decided [95 %]", "readable [95 %]"):
        shown.add_column(column, justify="right", no_wrap=True)
    step = results.sel(quantity="step")
    for name in order(results):
        one = step.sel(attribute=name)
        estimates = (
            Estimate.of(one[of], one[f"{of}_interval"]) for of in ("commitment", "readable")
        )
        shown.add_row(plain_name(name), *(f"{e:.1f}" for e in estimates))
    for axis, band, decided in _bands(results):
        shown.add_row(f"{band} {axis}", f"{decided:.1f}", "")
    return shown


def _bands(results: xr.Dataset) -> list[tuple[str, str, Estimate]]:
    """What bands there are, by kind and name, with their commitment step."""
    step, found = results.sel(quantity="step"), []
    for axis, kind in (("split", "frequencies"), ("band", "cycles/pixel")):
        for name in results[axis].values:
            one = step.sel({axis: name})
            decided = Estimate.of(one[f"{axis}_commitment"], one[f"{axis}_commitment_interval"])
            found.append((kind, str(name), decided))
    return found


def draw_steps(results: xr.Dataset, path: Path) -> Path:
    """When each attribute is decided, and when it can be read, above the bands.

    Args:
        results: of `dit_lens.experiments.attributes`.
        path: of the picture.
    """
    with picture(path, steps_size(results)) as (_, ax):
        draw_decided(ax, results)
    return path


def draw_order(results: xr.Dataset, path: Path) -> Path:
    """The painter's order: a row for each release, what twins ended as side by side, which of their
    attributes agree, and how often those of all pairs do.

    Args:
        results: of `dit_lens.experiments.attributes`.
        path: of the picture.
    """
    names, releases = order(results), results.release.values
    pairs = min(PAIRS, results.sizes["shown"])
    high, wide = results.sizes["row"], results.sizes["column"]
    gap = max(1, round(0.12 * wide))
    with picture(
        path,
        (1.0 + 1.75 * pairs + 0.34 * len(names), 1.1 + 0.98 * len(releases)),
        nrows=len(releases),
        ncols=pairs + 1,
        width_ratios=[1.75] * pairs + [0.34 * len(names)],
        squeeze=False,
    ) as (figure, axes):
        figure.get_layout_engine().set(wspace=0.02, hspace=0.02, w_pad=0.02, h_pad=0.02)
        for row, release in enumerate(releases):
            one = results.sel(release=release)
            for i in range(pairs):
                ax, mine = axes[row, i], one.isel(shown=i)
                for twin, at in zip(("A", "B"), (0, wide + gap), strict=True):
                    _draw_image(ax, mine.end.sel(twin=twin).values, at)
                _draw_marks(
                    ax, one.agrees.isel(pair=i).sel(attribute=names).values, 2 * wide + gap, high
                )
                ax.set(xlim=(-0.5, 2 * wide + gap - 0.5), ylim=(1.2 * high, -0.5), aspect="equal")
                ax.axis("off")
                if row == 0:
                    ax.set_title(f"twins {i + 1}")
            axes[row, 0].text(
                -0.06,
                0.58,
                f"{release}",
                transform=axes[row, 0].transAxes,
                ha="right",
                va="center",
            )
            _draw_shares(axes[row, -1], one.agreement.sel(attribute=names).values)
        axes[0, -1].set_xticks(
            range(len(names)),
            [plain_name(name) for name in names],
            rotation=55,
            ha="left",
            fontsize=8,
        )
        axes[0, -1].xaxis.tick_top()
        axes[0, -1].tick_params(axis="x", length=0, labeltop=True)
        axes[-1, -1].set_xlabel("agreement of all pairs beyond chance")
        figure.supylabel("released at step", fontsize=9)
        figure.supxlabel(KEY, fontsize=8)
    return path


def _draw_image(ax: Any, image: Any, at: int) -> None:
    """One image [channel, row, column], its left edge at a column."""
    channels, high, wide = image.shape
    shown = np.clip(image.transpose(1, 2, 0), 0, 1)
    ax.imshow(
        np.repeat(shown, 3, -1) if channels == 1 else shown,
        extent=(at - 0.5, at + wide - 0.5, high - 0.5, -0.5),
        interpolation="nearest",
    )


def _draw_marks(ax: Any, agrees: Any, wide: float, high: float) -> None:
    """A square for each attribute below two images: full where they agree, a dot where the label
    leaves no choice.
    """
    from matplotlib.patches import Circle, Rectangle

    step = wide / len(agrees)
    side = min(0.72 * step, 0.12 * high)
    for i, same in enumerate(agrees):
        x, y = (i + 0.5) * step - 0.5, 1.04 * high + side / 2
        if np.isnan(same):
            ax.add_patch(Circle((x, y), side / 8, color=NOTHING, linewidth=0))
            continue
        ax.add_patch(
            Rectangle(
                (x - side / 2, y - side / 2),
                side,
                side,
                facecolor=AGREE if same else DIFFER,
                edgecolor=AGREE,
                linewidth=0.7,
            )
        )


def _draw_shares(ax: Any, agreement: Any) -> None:
    """One row of a heat map: an attribute's agreement over all pairs, with its figure."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("agreement", [DIFFER, AGREE])
    ax.imshow(np.clip(agreement, 0, 1)[None], vmin=0, vmax=1, cmap=colours, aspect="auto")
    for i, value in enumerate(agreement):
        if np.isfinite(value):
            ax.text(
                i,
                0,
                f"{value:.2f}".replace("0.", ".").replace("-.00", ".00"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value > 0.55 else INK,
            )
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)
