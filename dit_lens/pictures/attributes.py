"""When each attribute of the finished image is decided, beside the bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from .style import HIGH, INK, LOW, error_bars, legend

AGREE, NOTHING = "#0f8b6d", "#8c8c8c"
BANDS = "split", "band"
"""Low and high, and rings of frequencies."""


def order(results: xr.Dataset) -> list[str]:
    """The attributes as they are decided; those without a commitment step last.

    Args:
        results: of `dit_lens.experiments.attributes`.
    """
    decided = results.commitment.sel(quantity="step")
    return [str(a) for a in results.attribute.values[np.argsort(decided.values, kind="stable")]]


def plain_name(name: str) -> str:
    """An attribute's name as it is shown.

    Args:
        name: such as "hair_colour".
    """
    return name.replace("_", " ")


def steps_size(results: xr.Dataset) -> tuple[float, float]:
    """Of a figure of all attributes and bands, in inches.

    Args:
        results: of `dit_lens.experiments.attributes`.
    """
    return 5.4, 1.0 + 0.24 * sum(results.sizes[axis] for axis in ("attribute", *BANDS))


def draw_decided(ax: Any, results: xr.Dataset) -> None:
    """When each attribute is decided, and when it can be read, above the bands.

    Args:
        ax: where.
        results: of `dit_lens.experiments.attributes`.
    """
    names, step = order(results), results.sel(quantity="step")
    bands = [str(name) for axis in BANDS for name in results[axis].values]
    rows = len(names) + len(bands)
    usual: dict[str, Any] = {"markersize": 3.5, "linewidth": 0.8, "capsize": 1.5}
    for variable, marker, face, colour, shift, label in (
        ("commitment", "o", INK, INK, 0.0, "decided (clones)"),
        ("readable", "D", "white", AGREE, 0.28, "readable (predicted x0)"),
    ):
        one = step.sel(attribute=names)
        ax.errorbar(
            one[variable],
            np.arange(len(names)) + shift,
            xerr=error_bars(one[variable], one[f"{variable}_interval"]),
            fmt=marker,
            color=colour,
            markerfacecolor=face,
            label=label,
            **usual,
        )
    row = len(names)
    for axis, colours in zip(BANDS, ((LOW, HIGH), (NOTHING,)), strict=True):
        value, ends = step[f"{axis}_commitment"], step[f"{axis}_commitment_interval"]
        for i in range(len(value)):
            ax.errorbar(
                value[[i]],
                [row],
                xerr=error_bars(value[[i]], ends[[i]]),
                fmt="s",
                color=colours[i % len(colours)],
                **usual,
            )
            row += 1
    ax.axhline(len(names) - 0.4, color=INK, linewidth=0.6)
    ax.set_yticks(range(rows), [*map(plain_name, names), *bands])
    for title, middle in (
        ("attributes", (len(names) - 1) / 2),
        ("bands, cycles per pixel", (len(names) + rows - 1) / 2),
    ):
        ax.text(
            1.01,
            middle,
            title,
            transform=ax.get_yaxis_transform(),
            rotation=270,
            va="center",
            fontsize=8,
        )
    ax.set(
        ylabel="what is decided",
        xlabel=f"step of {results.attrs['steps']} (0 is the noisiest)",
        xlim=(0, results.attrs["steps"]),
        ylim=(rows - 0.4, -0.6),
    )
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    legend(ax, loc="lower right")
