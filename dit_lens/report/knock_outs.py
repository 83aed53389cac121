"""What `dit-lens patch` shows first: which layers cause the gap (knock-outs) and which carry what
twin A decided into twin B (patches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..experiments.effects import FEWEST_MOVE, moves
from ..measures.estimate import Estimate, number
from ..pictures.style import HIGH, INK, LOW, error_bars, legend, whole_numbers
from ..storage import save_dataset
from .gap import VIEWS
from .style import DOT, beside, files, picture, plain_console

BANDS = ("low", "high")
REPLACED = {"zero": "nothing", "mean": "the mean over items", "resample": "another item's addition"}
"""What a way of knocking out puts in place of what a layer adds, in words."""


def write(
    knocked: xr.Dataset, patched: xr.Dataset, folder: Path, onsets: Mapping[str, int] | None = None
) -> None:
    """Store knock_outs.nc and patches.nc; then print the table and the sentences, and draw
    causes.png.

    Args:
        knocked: of `side_by_side`.
        patched: of `dit_lens.probes.TwinPatching`.
        folder: for the files; it is made if need be.
        onsets: the layer profiles' onset by view, -1 for none, to compare the causes with.
    """
    stored = store_knock_outs(knocked, folder), store_patches(patched, folder)
    show(knocked, patched, stored, onsets)


def side_by_side(results: Sequence[xr.Dataset]) -> xr.Dataset:
    """Knock-outs of the same layers in several ways, as one result [how, layer].

    Args:
        results: of `dit_lens.experiments.knock_outs`, one a way.
    """
    ways = [result.attrs["how"] for result in results]
    way = xr.DataArray(ways, dims="how", name="how")
    found = xr.concat(list(results), way, combine_attrs="drop")
    attrs = dict(results[0].attrs)
    attrs |= {f"sentence_{way}": r.attrs["sentence"] for way, r in zip(ways, results, strict=True)}
    for name in ("how", "sentence", "causes"):
        attrs.pop(name)
    return found.assign_attrs(attrs)


def store_knock_outs(knocked: xr.Dataset, folder: Path) -> Path:
    """Store knock_outs.nc.

    Args:
        knocked: of `side_by_side`.
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
        knocked: of `side_by_side`.
        patched: of `dit_lens.probes.TwinPatching`.
        stored: the files that hold them.
        onsets: the layer profiles' onset by view, -1 for none, to compare the causes with.
    """
    console = plain_console(120)
    table = Table(
        title="Knocked out one by one (effect on the gap in steps, by one pass [95 %, all layers "
        "at once]) and patched from twin A into B (largest sure share of the way to A)",
        title_justify="left",
    )
    ways = [str(way) for way in knocked.how.values]
    split = "direct_effect" in knocked
    columns = ["layer", *(f"by {way}" for way in ways)]
    columns += ["direct", "mediated"] if split else []
    for column in (*columns, "patched: low", "high"):
        table.add_column(column, justify="right", no_wrap=True)
    best = surest(patched)
    for layer in knocked.layer.values:
        one = knocked.sel(layer=layer)
        cells = [
            f"{Estimate.of(each.effect, each.effect_interval):+.2f}"
            for each in (one.sel(how=way) for way in ways)
        ]
        if split:
            parts = (one[f"{part}_effect"].isel(how=0) for part in ("direct", "mediated"))
            cells += [number(part, "+.2f") for part in parts]
        cells += [number(best.sel(layer=layer, band=band), ".1%") for band in BANDS]
        table.add_row(str(layer), *cells)
    console.print(table)
    for line in sentences(knocked, patched) + ([against(knocked, onsets)] if onsets else []):
        console.print(line, soft_wrap=True)
    drawn = draw(knocked, patched, beside(stored[0], "knock_outs.nc", "causes.png"))
    files(console, [drawn, *stored])


def sure_moves(patched: xr.Dataset) -> xr.DataArray:
    """The moves towards A that are surely ones, NaN elsewhere, [layer, site, window, band]; the
    intervals hold for all of them at once, so their largest is sure too.

    Args:
        patched: of `dit_lens.probes.TwinPatching`.
    """
    low = patched.move_together.sel(bound="low")
    return patched.move.where((low > 0) & (patched.move > FEWEST_MOVE))


def surest(patched: xr.Dataset) -> xr.DataArray:
    """The largest sure move of each layer over sites and windows, [layer, band].

    Args:
        patched: of `dit_lens.probes.TwinPatching`.
    """
    return sure_moves(patched).max(("site", "window"))


def sentences(knocked: xr.Dataset, patched: xr.Dataset) -> list[str]:
    """Which layers the gap needs, which suffice to carry what A decided, and how much of it.

    Args:
        knocked: of `side_by_side`.
        patched: of `dit_lens.probes.TwinPatching`.
    """
    ways = [str(way) for way in knocked.how.values]
    named = {way: causes(knocked, way) for way in ways}
    lines = [f"Necessity: {knocked.attrs[f'sentence_{ways[0]}']}"]
    lines += [
        f"The same with {REPLACED[way]} in place of what a layer adds ({way}): "
        f"{knocked.attrs[f'sentence_{way}']}"
        for way in ways[1:]
    ]
    if len(ways) > 1:
        lines.append(_agreeing(named))
    lines.append(sufficiency(patched))
    lines.append(_half(knocked.sel(how=ways[0]), named[ways[0]]))
    return lines


def _agreeing(named: Mapping[str, Sequence[int]]) -> str:
    """Which layers every way of knocking out names."""
    every = set.intersection(*(set(layers) for layers in named.values()))
    some = set.union(*(set(layers) for layers in named.values())) - every
    *others, last = named
    ways = f"{', '.join(others)} and {last}"
    if not every and not some:
        return f"No layer is named by {ways}."
    text = f"Named by {ways} alike: {', '.join(map(str, sorted(every))) or 'none'}"
    if some:
        by = (
            f"{layer} ({', '.join(way for way, layers in named.items() if layer in layers)})"
            for layer in sorted(some)
        )
        text += f"; by some only: {', '.join(by)}"
    return f"{text}."


def sufficiency(patched: xr.Dataset) -> str:
    """Which cell carries most of what A decided into B, if any surely does.

    Args:
        patched: of `dit_lens.probes.TwinPatching`.
    """
    cells = int(patched.move.size / patched.sizes["band"])
    if not np.isfinite(patched.move_together.values).any():
        return (
            "Sufficiency: with so few pairs no patch has an interval, so none is said to carry "
            "anything."
        )
    sure, said = sure_moves(patched), []
    for band in BANDS:
        own = sure.sel(band=band)
        count = int(np.isfinite(own).sum())
        if not count:
            said.append(f"{band} by none")
            continue
        at = np.unravel_index(int(np.nanargmax(own.values)), own.shape)
        one = patched.sel(band=band).isel(dict(zip(own.dims, at, strict=True)))
        move = Estimate.of(one.move, one.move_together)
        said.append(
            f"{band} by {count}, the largest estimate {move:.0%} of the way (layer "
            f"{int(one.layer)}, {one.site.item()}, steps {one.window.item()})"
        )
    return (
        f"Sufficiency: of {cells} patches of one site in one window, what A decided is surely "
        f"carried into B, {' and '.join(said)}; 95 % for all of them at once."
    )


def _half(knocked: xr.Dataset, named: Sequence[int]) -> str:
    """Whether half of the gap hangs on one layer, and where the layers that move it lie."""
    gap, half = knocked.attrs["gap"], abs(knocked.attrs["gap"]) / 2
    removing = [layer for layer in named if abs(float(knocked.gap.sel(layer=layer))) <= half]
    sure = [
        layer
        for layer in removing
        if np.abs(knocked.effect_interval.sel(layer=layer).values + gap).max() <= half
    ]
    # the paper's last five of 28, in a model of any depth
    depth = int(knocked.attrs["n_layers"])
    end = max(1, round(depth * 5 / 28))
    last = [layer for layer in named if layer >= depth - end]
    lost = int(np.isnan(knocked.effect.values).sum())
    measured = f" of the {knocked.sizes['layer'] - lost} that can be measured" if lost else ""
    if not Estimate.of(gap, knocked.attrs["gap_interval"]).sign:
        whole = "The gap can't be told from 0, so nothing is said of half of it"
    elif sure:
        whole = f"Without layer {_or(sure)} at most half of the gap is left"
    elif removing:
        whole = f"Without layer {_or(removing)} less than half of the gap is left, but not for sure"
    else:
        whole = f"No single layer{measured} takes away half of the gap"
    where = f"the last {end} of {depth} layers" if end > 1 else f"the last of {depth} layers"
    late = f"; in {where} lie {len(last)} of the {len(named)} that move it" if named else ""
    return f"{whole}{late}."


def _or(layers: Sequence[int]) -> str:
    return " or ".join(map(str, layers))


def against(knocked: xr.Dataset, onsets: Mapping[str, int]) -> str:
    """Whether the layers that the profiles point at are layers that cause anything.

    Args:
        knocked: of `side_by_side`.
        onsets: the layer profiles' onset by view, -1 for none.
    """
    found = causes(knocked, str(knocked.how.values[0]))
    named = {view: layer for view, layer in onsets.items() if layer >= 0}
    if not named or not found:
        missing = "no layer moves the gap" if named else "no profile has an onset"
        return f"Profile and cause can't be compared: {missing}."
    compared = ", ".join(
        f"{VIEWS[view]}: layer {layer}, {'a cause' if layer in found else 'no cause'}"
        for view, layer in named.items()
    )
    verdict = "agree" if set(named.values()) <= set(found) else "do not agree"
    return f"Profile and cause {verdict} ({compared})."


def causes(knocked: xr.Dataset, way: str) -> list[int]:
    """The layers that move the gap when knocked out in one way.

    Args:
        knocked: of `side_by_side`.
        way: "zero", "mean" or "resample".
    """
    one = knocked.sel(how=way)
    found: list[int] = one.layer.values[moves(one).values].tolist()
    return found


def draw(knocked: xr.Dataset, patched: xr.Dataset, path: Path) -> Path:
    """The effect of each knock-out with its simultaneous interval, by way, and the patches' moves
    by layer, site and window.

    Args:
        knocked: of `side_by_side`.
        patched: of `dit_lens.probes.TwinPatching`.
        path: of the picture.
    """
    gap, ways = float(knocked.attrs["gap"]), [str(way) for way in knocked.how.values]
    with picture(path, (12, 3.6), ncols=3, width_ratios=(1.6, 1, 1)) as (figure, axes):
        # knock-outs
        effects, layers = axes[0], knocked.layer.values
        for i, (way, color) in enumerate(zip(ways, (INK, LOW, "#7b3294"), strict=False)):
            one = knocked.sel(how=way)
            effects.errorbar(
                layers + (i - (len(ways) - 1) / 2) * 0.25,
                one.effect,
                yerr=error_bars(one.effect, one.effect_interval),
                fmt="o",
                color=color,
                markersize=3,
                linewidth=0.8,
                capsize=1.5,
                label=f"by {way}",
            )
        if "direct_effect" in knocked:
            direct = knocked.direct_effect.isel(how=0)
            options = {"color": HIGH, "marker": "_", "linestyle": "none", "markersize": 8}
            effects.plot(layers, direct, label=f"direct part, by {ways[0]}", **options)
        effects.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        effects.axhline(-gap, color=HIGH, linewidth=0.8, linestyle="--", label="no gap left")
        effects.set(
            xlabel="layer knocked out",
            ylabel="change of the gap, steps",
            title=f"the gap is {gap:+.2f} steps, by one pass",
        )
        legend(effects)

        # patches
        rows = [
            (str(site), str(window))
            for site in patched.site.values
            for window in patched.window.values
        ]
        top = max(float(np.quantile(np.abs(patched.move), 0.98)), 1e-6)
        first, last = (int(patched.layer[i]) for i in (0, -1))
        sure = sure_moves(patched)
        for ax, band in zip(axes[1:], BANDS, strict=True):
            grid = np.stack([_row(patched.move, band, *row) for row in rows])
            image = ax.imshow(
                grid,
                aspect="auto",
                origin="lower",
                cmap="RdBu_r",
                vmin=-top,
                vmax=top,
                extent=(first - 0.5, last + 0.5, -0.5, len(rows) - 0.5),
            )
            known = np.isfinite(np.stack([_row(sure, band, *row) for row in rows]))
            at, column = np.nonzero(known)
            ax.plot(patched.layer.values[column], at, **DOT)
            labels = [f"{site.removesuffix('_out')} {window}" for site, window in rows]
            ax.set_yticks(range(len(rows)), labels if ax is axes[1] else [""] * len(rows))
            ax.set(xlabel="layer patched (dot: surely towards A)", title=f"B's {band} band to A")
        axes[1].set_ylabel("site, steps")
        whole_numbers(*(ax.xaxis for ax in axes))
        figure.colorbar(image, ax=axes[1:], label="share of the way", extend="both")
    return path


def _row(moved: xr.DataArray, band: str, site: str, window: str) -> np.ndarray:
    found: np.ndarray = moved.sel(band=band, site=site, window=window).values
    return found
