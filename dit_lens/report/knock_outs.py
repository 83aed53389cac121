"""What `dit-lens patch` shows: which layers cause the gap (knock-outs) and which carry what twin A
decided into twin B (patches).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..measures.estimate import Estimate, number
from ..storage import save_dataset
from .gap import VIEWS
from .style import (
    HIGH,
    INK,
    LOW,
    beside,
    error_bars,
    files,
    legend,
    picture,
    plain_console,
    whole_numbers,
)


def write(
    knocked: xr.Dataset, patched: xr.Dataset, folder: Path, onsets: Mapping[str, int] | None = None
) -> None:
    """Store knock_outs.nc and patches.nc; then print the table and the sentences, and draw
    causes.png.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`, with direct effects.
        patched: of `dit_lens.probes.TwinPatching`.
        folder: for the files; it is made if need be.
        onsets: the layer profiles' onset by view, -1 for none, to compare the causes with.
    """
    stored = store_knock_outs(knocked, folder), store_patches(patched, folder)
    show(knocked, patched, stored, onsets)


def store_knock_outs(knocked: xr.Dataset, folder: Path) -> Path:
    """Store knock_outs.nc.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`, with direct effects.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / "knock_outs.nc", "knock_outs.nc", knocked)


def store_patches(patched: xr.Dataset, folder: Path) -> Path:
    """Store patches.nc.

    Args:
        patched: of `dit_lens.probes.TwinPatching`.
        folder: for the file; it is made if need be.
    """
    return save_dataset(folder / "patches.nc", "patches.nc", patched)


def show(
    knocked: xr.Dataset,
    patched: xr.Dataset,
    stored: tuple[Path, Path],
    onsets: Mapping[str, int] | None = None,
) -> None:
    """Print the table and the sentences, and draw the picture beside the stored knock-outs.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`, with direct effects.
        patched: of `dit_lens.probes.TwinPatching`.
        stored: the files that hold them.
        onsets: the layer profiles' onset by view, -1 for none, to compare the causes with.
    """
    console = plain_console(120)
    table = Table(
        title="Knocked out one by one (gap, steps) and patched from twin A into twin B "
        "(share of the way to A)",
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
        moves = (carried.sel(layer=layer, band=band) for band in ("low", "high"))
        table.add_row(
            str(layer),
            number(one.gap, "+.2f"),
            f"{Estimate.of(one.effect, one.effect_interval):+.1f}",
            number(one.direct_effect, "+.2f"),
            number(one.mediated_effect, "+.2f"),
            *(number(move, "+.3f") for move in moves),
        )
    console.print(table)
    for line in sentences(knocked, patched) + ([against(knocked, onsets)] if onsets else []):
        console.print(line, soft_wrap=True)
    drawn = draw(knocked, patched, beside(stored[0], "knock_outs.nc", "causes.png"))
    files(console, [drawn, *stored])


def carries(patched: xr.Dataset) -> xr.DataArray:
    """The most that a layer moves B towards A in any window, its sites' moves added up.

    Args:
        patched: of `dit_lens.probes.TwinPatching`.

    Returns:
        xr.DataArray: [layer, band], shares of the way from B to A.
    """
    return patched.move.sum("site").max("window")


def sentences(knocked: xr.Dataset, patched: xr.Dataset) -> list[str]:
    """Which layers the gap needs, which suffice to carry what A decided, and how much of it.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`.
        patched: of `dit_lens.probes.TwinPatching`.
    """
    carried = carries(patched)
    most = {
        band: int(carried.layer[int(carried.sel(band=band).values.argmax())])
        for band in ("low", "high")
    }
    most_by = [
        f"{band} most by layer {layer} ({share:.1%} of the way)"
        if (share := float(carried.sel(band=band, layer=layer))) > 0.005
        else f"{band} by none"
        for band, layer in most.items()
    ]
    causes = _causes(knocked)
    removing = [
        layer
        for layer in causes
        if abs(float(knocked.gap.sel(layer=layer))) < abs(knocked.attrs["gap"]) / 2
    ]
    # the paper's last five of 28, in a model of any depth
    depth = int(knocked.attrs["n_layers"])
    end = max(1, round(depth * 5 / 28))
    last = [layer for layer in causes if layer >= depth - end]
    lines = ["Necessity: " + knocked.attrs["sentence"]]
    lines.append(
        "Sufficiency: patched at one window, what A decided is carried into B, "
        f"{' and '.join(most_by)}."
    )
    lost = int(np.isnan(knocked.effect.values).sum())
    measured = f" of the {knocked.sizes['layer'] - lost} that can be measured" if lost else ""
    whole = (
        f"Without layer {' or '.join(map(str, removing))} at most half of the gap is left"
        if removing
        else f"No single layer{measured} takes away half of the gap"
    )
    where = f"the last {end} of {depth} layers" if end > 1 else f"the last of {depth} layers"
    late = f"; in {where} lie {len(last)} of the {len(causes)} that move it" if causes else ""
    lines.append(f"{whole}{late}.")
    return lines


def against(knocked: xr.Dataset, onsets: Mapping[str, int]) -> str:
    """Whether the layers that the profiles point at are layers that cause anything.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`.
        onsets: the layer profiles' onset by view, -1 for none.
    """
    causes = _causes(knocked)
    named = {view: layer for view, layer in onsets.items() if layer >= 0}
    if not named or not causes:
        missing = "no layer moves the gap" if named else "no profile has an onset"
        return f"Profile and cause can't be compared: {missing}."
    compared = ", ".join(
        f"{VIEWS[view]}: layer {layer}, {'a cause' if layer in causes else 'no cause'}"
        for view, layer in named.items()
    )
    verdict = "agree" if set(named.values()) <= set(causes) else "do not agree"
    return f"Profile and cause {verdict} ({compared})."


def _causes(knocked: xr.Dataset) -> list[int]:
    """The layers named as causes; netCDF makes a number of a list of one."""
    layers: list[int] = np.atleast_1d(knocked.attrs["causes"]).astype(int).tolist()
    return layers


def draw(knocked: xr.Dataset, patched: xr.Dataset, path: Path) -> Path:
    """The effect of each knock-out with its simultaneous interval, direct and mediated, and the
    patches' moves by layer and window.

    Args:
        knocked: of `dit_lens.experiments.knock_outs`, with direct effects.
        patched: of `dit_lens.probes.TwinPatching`.
        path: of the picture.
    """
    gap = float(knocked.attrs["gap"])
    with picture(path, (11, 3.3), ncols=3, width_ratios=(1.5, 1, 1)) as (figure, axes):
        # knock-outs
        effects, layers = axes[0], knocked.layer.values
        effects.errorbar(
            layers,
            knocked.effect,
            yerr=error_bars(knocked.effect, knocked.effect_interval),
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
        effects.axhline(-gap, color=HIGH, linewidth=0.8, linestyle="--", label="no gap left")
        effects.set(
            xlabel="layer knocked out",
            ylabel="change of the gap, steps",
            title=f"the gap is {gap:+.2f} steps",
        )
        legend(effects)

        # patches
        move = patched.move.sum("site")
        # a few patches lead far away, and would leave the rest without colour
        top = float(np.quantile(np.abs(move), 0.98))
        first, last = (int(patched.layer[i]) for i in (0, -1))
        for ax, band in zip(axes[1:], ("low", "high"), strict=True):
            image = ax.imshow(
                move.sel(band=band).values.T,
                aspect="auto",
                origin="lower",
                cmap="RdBu_r",
                vmin=-top,
                vmax=top,
                extent=(first - 0.5, last + 0.5, -0.5, move.sizes["window"] - 0.5),
            )
            ax.set_yticks(range(move.sizes["window"]), patched.window.values)
            ax.set(
                xlabel="layer patched, attention and MLP",
                ylabel="steps",
                title=f"B's move towards A, {band}",
            )
        whole_numbers(*(ax.xaxis for ax in axes))
        figure.colorbar(image, ax=axes[1:], label="share of the way", extend="both")
    return path
