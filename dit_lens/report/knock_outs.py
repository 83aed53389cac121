"""What `dit-lens patch` shows: which layers cause the gap (knock-outs) and which carry what twin A
decided into twin B (patches).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .gap import HIGH, INK, LOW, VIEWS, _pyplot, _with_interval

if TYPE_CHECKING:
    import xarray as xr


def write(
    knocked: xr.Dataset, patched: xr.Dataset, folder: Path, onsets: Mapping[str, int] | None = None
) -> None:
    """Print the table and the sentences, held against the profiles' `onsets` (-1: none) if they are
    known.

    Write knock_outs.nc, patches.nc and causes.png into the folder.
    """
    from rich.console import Console
    from rich.table import Table

    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=120, highlight=False)
    table = Table(
        title="Knocked out one by one (gap, steps) and patched from twin A into twin B (share of the way to A)",
        title_justify="left",
    )
    for column in (
        "layer",
        "gap without",
        "effect [95 %, all layers]",
        "direct",
        "mediated",
        "patched: low",
        "high",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    carried = carries(patched)
    for layer in knocked.layer.values:
        one = knocked.sel(layer=layer)
        cells = [f"{float(one[name]):+.2f}" for name in ("direct_effect", "mediated_effect")]
        moves = [f"{float(carried.sel(layer=layer, band=band)):+.3f}" for band in ("low", "high")]
        table.add_row(
            str(layer),
            f"{float(one.gap):+.2f}",
            _with_interval(one.effect, one.effect_interval),
            *cells,
            *moves,
        )
    console.print(table)
    for line in sentences(knocked, patched) + ([against(knocked, onsets)] if onsets else []):
        console.print(line, soft_wrap=True)
    knocked.to_netcdf(folder / "knock_outs.nc", engine="scipy")
    patched.to_netcdf(folder / "patches.nc", engine="scipy")
    files = [
        draw(knocked, patched, folder / "causes.png"),
        folder / "knock_outs.nc",
        folder / "patches.nc",
    ]
    console.print(f"[dim]pictures and figures: {', '.join(map(str, files))}[/dim]", soft_wrap=True)


def carries(patched: xr.Dataset) -> Any:
    """The most that a layer moves B towards A in any window, its sites' moves added up, [layer,
    band].
    """
    return patched.move.sum("site").max("window")


def sentences(knocked: xr.Dataset, patched: xr.Dataset) -> list[str]:
    """Necessity, sufficiency, and whether they name the same layers."""
    carried = carries(patched)
    most = {
        band: int(carried.layer[int(carried.sel(band=band).values.argmax())])
        for band in ("low", "high")
    }
    words = [
        f"{band} most by layer {layer} ({share:.1%} of the way)"
        if (share := float(carried.sel(band=band, layer=layer))) > 0.005
        else f"{band} by none"
        for band, layer in most.items()
    ]
    causes = np.atleast_1d(knocked.attrs["causes"]).astype(int).tolist()
    removing = [
        layer
        for layer in causes
        if abs(float(knocked.gap.sel(layer=layer))) < abs(knocked.attrs["gap"]) / 2
    ]
    last = [layer for layer in causes if layer >= int(knocked.layer[-1]) - 4]
    lines = ["Necessity: " + knocked.attrs["sentence"]]
    lines.append(
        "Sufficiency: patched at one window, what A decided is carried into B, "
        f"{' and '.join(words)}."
    )
    whole = (
        f"Without layer {', '.join(map(str, removing))} at most half of the gap is left"
        if removing
        else "No single layer takes away half of the gap"
    )
    late = (
        f"; of the layers that move it, {len(last)} of {len(causes)} are among the last five"
        if causes
        else ""
    )
    lines.append(f"{whole}{late}.")
    return lines


def against(knocked: xr.Dataset, onsets: Mapping[str, int]) -> str:
    """Whether the layers that the profiles point at are layers that cause anything."""
    causes = np.atleast_1d(knocked.attrs["causes"]).astype(int).tolist()
    named = {view: layer for view, layer in onsets.items() if layer >= 0}
    if not named or not causes:
        return f"Profile and cause can't be compared: {'no profile has an onset' if not named else 'no layer moves the gap'}."
    told = ", ".join(
        f"{VIEWS[view]}: layer {layer}, {'a cause' if layer in causes else 'no cause'}"
        for view, layer in named.items()
    )
    verdict = {True: "agree", False: "do not agree"}[
        all(layer in causes for layer in named.values())
    ]
    return f"Profile and cause {verdict} ({told})."


def draw(knocked: xr.Dataset, patched: xr.Dataset, path: Path) -> Path:
    """The effect of each knock-out with its simultaneous interval, direct and mediated, and the
    patches' moves by layer and window.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.3), layout="constrained", width_ratios=(1.5, 1, 1)
    )
    effects, layers = axes[0], knocked.layer.values
    spread = np.abs(knocked.effect_interval.values.T - knocked.effect.values)
    effects.errorbar(
        layers,
        knocked.effect,
        yerr=spread,
        fmt="o",
        color=INK,
        markersize=3.5,
        linewidth=0.9,
        capsize=2,
        label="whole effect",
    )
    effects.plot(
        layers,
        knocked.direct_effect,
        color=LOW,
        marker="_",
        linestyle="none",
        markersize=8,
        label="direct",
    )
    effects.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    effects.axhline(
        -knocked.attrs["gap"], color=HIGH, linewidth=0.8, linestyle="--", label="no gap left"
    )
    effects.set(
        xlabel="layer knocked out",
        ylabel="change of the gap, steps",
        title=f"the gap is {knocked.attrs['gap']:+.2f} steps",
    )
    effects.legend(fontsize=7, frameon=False)
    move = patched.move.sum("site")
    # a few patches lead far away, and would leave the rest without colour
    top = float(np.quantile(np.abs(move), 0.98))
    for ax, band in zip(axes[1:], ("low", "high"), strict=True):
        image = ax.imshow(
            move.sel(band=band).values.T,
            aspect="auto",
            origin="lower",
            cmap="RdBu_r",
            vmin=-top,
            vmax=top,
        )
        ax.set_yticks(range(move.sizes["window"]), patched.window.values)
        ax.set(
            xlabel="layer patched, attention and MLP",
            ylabel="steps",
            title=f"B's move towards A, {band}",
        )
    figure.colorbar(image, ax=axes[1:], label="share of the way", extend="both")
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path
