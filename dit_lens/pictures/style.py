"""What all pictures share: three colours that stay apart for every kind of colour vision and in
grey, ticks at whole numbers, intervals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import arguments

LOW, HIGH, INK = "#0b559f", "#e08214", "#222222"
"""Of low frequencies, of high ones, of everything else."""
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"
WINDOWS = 12
"""So many windows of steps are named beside a map: more would lie over each other."""


def axes_for(ax: Any, size: tuple[float, float] = (4.2, 3.0)) -> Any:
    """The axes that were given, or new ones in a figure of pyplot's.

    Args:
        ax: matplotlib axes, or None.
        size: of the figure, in inches.

    Raises:
        InvalidType: for anything else, such as an array of axes.
    """
    if ax is not None:
        from matplotlib.axes import Axes

        nearest = "one of them, such as axes[0]" if isinstance(ax, (np.ndarray, list)) else None
        if not isinstance(ax, Axes):
            raise arguments.refusal("ax", ax, "matplotlib axes", nearest, wrong_type=True)
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def families(texts: Iterable[str]) -> list[str]:
    """The font families for texts: the usual ones, and behind them an installed font with the
    characters that these lack, such as Chinese ones, if there is any.

    Args:
        texts: that will be drawn.
    """
    from matplotlib import font_manager, rcParams

    usual = list(rcParams["font.family"])
    own = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=usual)))
    missing = set(map(ord, "".join(texts))) - own.get_charmap().keys()
    if not missing:
        return usual

    def lacks(font: font_manager.FontEntry) -> int:
        try:
            return len(missing - font_manager.get_font(font.fname).get_charmap().keys())
        except (OSError, RuntimeError):  # matplotlib's list of fonts may be older than the fonts
            return len(missing)

    # matplotlib's "Last Resort" has a box for every character
    fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
    best = min(fonts, key=lacks)
    return usual if lacks(best) == len(missing) else [*usual, best.name]


def whole_numbers(*axes: Any) -> None:
    """Ticks at whole numbers only, for axes (such as `ax.xaxis`) of layers or steps."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # also of one layer


def windows_up(ax: Any, names: Any) -> None:
    """Ticks upwards for windows of steps, of so many only that their names don't touch."""
    rows = range(0, len(names), -(-len(names) // WINDOWS))
    ax.set_yticks(rows, [names[row] for row in rows])


def error_bars(value: ArrayLike, interval: ArrayLike) -> Any:
    """matplotlib's `yerr` [2, n] for values [n] with intervals [n, bound]."""
    return np.abs(np.asarray(interval).T - np.asarray(value))


def legend(ax: Any, **options: Any) -> None:
    """A small legend, readable where it lies over what is drawn."""
    options = {"fontsize": 7, "edgecolor": "none", "framealpha": 0.8} | options
    ax.legend(**options)


def points(ax: Any, x: Any, value: Any, interval: Any, color: str = INK, **options: Any) -> None:
    """Points with their intervals, joined by a line where `linestyle` says so.

    Args:
        ax: where.
        x: their places.
        value: their values [n].
        interval: their intervals [n, bound].
        color: of both.
        options: further ones of matplotlib's `errorbar`.
    """
    usual = {"fmt": "o", "markersize": 3, "linewidth": 0.9, "capsize": 2, "color": color}
    ax.errorbar(x, value, yerr=error_bars(value, interval), **(usual | options))


def zero(ax: Any, at: float = 0.0) -> None:
    """A thin line at nothing, or at another value."""
    ax.axhline(at, color=INK, linewidth=0.6, linestyle=":")


def said(ax: Any, text: str) -> None:
    """A few words in the middle of axes in which nothing can be drawn."""
    middle = {"ha": "center", "va": "center", "fontsize": 8, "color": INK}
    ax.annotate(text, (0.5, 0.5), xycoords="axes fraction", **middle)


def signed_map(ax: Any, values: Any, x: Any, label: str) -> Any:
    """A heat map of signed effects, its colours centred on zero, with a colour bar.

    Args:
        ax: where.
        values: [row, column].
        x: the columns' whole numbers; what lies between them is left grey.
        label: of the colours.
    """
    first, last = int(np.min(x)), int(np.max(x))
    found = np.full((len(values), last - first + 1), np.nan)
    found[:, np.asarray(x) - first] = values
    top = max(float(np.nanmax(np.abs(found))) if np.isfinite(found).any() else 0.0, 1e-9)
    image = ax.imshow(
        found,
        aspect="auto",
        origin="lower",
        cmap=DIVERGING,
        vmin=-top,
        vmax=top,
        extent=(first - 0.5, last + 0.5, -0.5, len(found) - 0.5),
    )
    ax.set_facecolor("#dddddd")
    ax.figure.colorbar(image, ax=ax, label=label)
    return image
