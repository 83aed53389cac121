"""What `dit-lens gap` shows: a table with a row a layer, a sentence, two pictures, and the stored
figures behind them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..experiments.gap_sentences import TITLES, bands_sentence, gap_of
from ..measures import Array
from ..measures.estimate import Estimate, number
from ..pictures.result import Result, unit_of
from ..pictures.style import HIGH, LOW, whole_numbers
from ..storage import save_dataset
from .style import beside, files, picture, plain_console

CAPTION = (
    "stream: the release at which finished clones agree by half in the layer's residual stream; "
    "lens: the step at which the agreement between the layer's stream read by the last layer and "
    "the finished image has reached half of what it ends at."
)
NULLS = " null: the same of layers in another order, lowest to highest."
QUALITY = (
    "Var(x0) share: Var(predicted x0) / Var(finished image) where the clones commit; an exact "
    "denoiser's is 0.50."
)
IMAGES = ("twins", "lens")
"""Pictures of images, which a result may be without."""
VIEWS = {view: title[0].lower() + title[1:] for view, title in TITLES.items()}


def write(results: xr.Dataset, folder: Path) -> None:
    """Store gap.nc; then print the tables and the sentences, and draw the pictures.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        folder: for the files; it is made if need be.
    """
    stored = save_dataset(folder / "gap.nc", "gap.nc", results)
    for name in IMAGES:
        if name not in Result.of(results).plot.names:  # one that lies there is of an earlier result
            (folder / f"{name}.png").unlink(missing_ok=True)
    show(results, stored)


def show(results: xr.Dataset, stored: Path) -> None:
    """Print the tables and the sentences, and draw pictures beside the stored result.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        stored: the file that holds them.
    """
    console = plain_console(130 if "null_profile" in results else 110)
    console.print(table(results))
    console.print(band_table(results))
    for line in sentences(results):
        console.print(line, soft_wrap=True)
    pictures = [
        draw_profile(results, beside(stored, "gap.nc", "layer_profile.png")),
        draw_frequencies(results, beside(stored, "gap.nc", "frequencies.png")),
        draw_spectrum(results, beside(stored, "gap.nc", "spectrum.png")),
    ]
    pictures += [
        draw_images(results, beside(stored, "gap.nc", f"{name}.png"), name)
        for name in IMAGES
        if name in Result.of(results).plot.names  # older files have none
    ]
    files(console, [*pictures, stored])


def table(results: xr.Dataset) -> Table:
    """One row a layer: when its low and its high band settle, and the gap, in both views in steps.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
    """
    nulls = "null_profile" in results
    shown = Table(
        title=results.attrs["title"],
        title_justify="left",
        caption=CAPTION + NULLS * nulls,
        caption_justify="left",
        padding=(0, 1),
    )
    shown.add_column("layer", justify="right", no_wrap=True)
    for view in ("stream", "lens"):
        shown.add_column(f"{view} low", justify="right", header_style=LOW, no_wrap=True)
        shown.add_column("high", justify="right", header_style=HIGH, no_wrap=True)
        shown.add_column("gap [95 %]", justify="right", no_wrap=True)
        if nulls:
            shown.add_column("null", justify="right", no_wrap=True)
    for layer in results.layer.values[1:]:  # the first is the embedding
        cells = [str(layer)]
        for view in ("stream", "lens"):
            one = results.sel(layer=layer, view=view)
            cells += [number(one.layer_commitment.sel(split=name)) for name in ("low", "high")]
            cells.append(f"{Estimate.of(one.layer_gap, one.layer_gap_interval):+.1f}")
            if nulls:
                known = one.null_profile.sel(profile=view).values
                known = known[np.isfinite(known)]
                ends = (known.min(), known.max()) if len(known) else (np.nan, np.nan)
                cells.append(" to ".join(number(end, "+.1f") for end in ends))
        shown.add_row(*cells)
    return shown


def band_table(results: xr.Dataset) -> Table:
    """One row a band: when it commits, by both estimators, and how good the denoiser is there.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
    """
    shown = Table(
        title="commitment of the finished image, in steps",
        title_justify="left",
        caption=QUALITY,
        caption_justify="left",
        padding=(0, 1),
    )
    for column in ("band", "clones [95 %]", "one pass [95 %]", "Var(x0) share [95 %]"):
        shown.add_column(column, justify="right", no_wrap=True)
    for kind in ("band", "split"):
        for name in results[kind].values:
            one = results.sel({kind: name})
            cells = []
            for estimator in ("clones", "one_pass"):
                part = one.sel(estimator=estimator)
                ends = part[f"{kind}_commitment_interval"]
                cells.append(f"{Estimate.of(part[f'{kind}_commitment'], ends):.1f}")
            share = Estimate.of(one[f"{kind}_variance"], one[f"{kind}_variance_interval"])
            shown.add_row(str(name), *cells, f"{share:.2f}")
    return shown


def sentences(results: xr.Dataset) -> list[str]:
    """The results as sentences.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
    """
    estimator = "clones" if results.sizes["release"] else "one_pass"
    snr = results.sel(quantity="log_snr", estimator=estimator)
    others = {
        "in log SNR": Estimate.of(snr.split_gap, snr.split_gap_interval),
        "in steps on x_t, one pass": Estimate.of(
            *(results.sel(quantity="step")[name] for name in ("x_t_gap", "x_t_gap_interval"))
        ),
    }
    if results.attrs.get("vae"):  # without one the image is the latents, shifted
        others["on the image"] = gap_of(results, "image", estimator)
    same = ", ".join(f"{where} {gap:+.2f}" for where, gap in others.items() if gap.known)
    cut = results.cut_gap.values[np.isfinite(results.cut_gap.values)]
    lines = [
        results.attrs["headline"],
        bands_sentence(results),
        f"The same gap {same}." if same else "",
        f"By one pass it is {cut.min():+.1f} to {cut.max():+.1f} steps, depending on the cut."
        if len(cut)
        else "",
        f"Steps are those of this sampler in {results.attrs['steps']} steps, which decides a band "
        "a little earlier than endlessly many would; `dit_lens.experiments.step_doubling` says by "
        "how much.",
        results.attrs["estimators"],
        results.attrs["data"],
        *results.attrs["notes"].splitlines(),
    ]
    if (np.abs(results.layer_gap_interval.values) > results.attrs["steps"]).any():
        lines.append(
            f"A layer's interval that reaches beyond {results.attrs['steps']} steps is longer than "
            "the run: it says that nothing is known there."
        )
    depth = [str(results.attrs[f"onset_{view}"]) for view in VIEWS]
    if "null_profile" in results:
        pairs, steps = (int(results.attrs[f"null_{what}"]) for what in ("pairs", "steps"))
        depth.insert(
            0,
            f"Depth is held against {results.sizes['null']} null models, each view by itself, "
            f"measured in {pairs} pairs and {steps} steps as they are.",
        )
    # without null models one sentence stands for all views
    return [line for line in [*lines, *dict.fromkeys(depth)] if line]


def onsets(results: xr.Dataset) -> dict[str, int]:
    """The layer at which each view has its onset, -1 for none; empty where no claim about depth is
    made, without null models.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
    """
    if "null_profile" not in results:
        return {}
    return {view: int(results.attrs[f"onset_layer_{view}"]) for view in VIEWS}


def draw_profile(results: xr.Dataset, path: Path) -> Path:
    """Low against high over depth in four views, each under its own name, with its interval and its
    onset.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
    """
    at, plot = int(results.attrs["commitment_step"]), Result.of(results).plot
    shown = [view for view in VIEWS if view != "stream" or results.sizes["release"]]
    rows, size = (2, (8.6, 5.0)) if len(shown) == len(VIEWS) else (1, (11, 2.8))
    with picture(path, size, nrows=rows, ncols=len(shown) // rows, sharex=True) as (_, axes):
        for ax, view in zip(axes.flat, shown, strict=True):
            step = f", step {at}" if view in results.energy.values else ""
            plot.profile(view, ax=ax).set(title=VIEWS[view] + step)
            if ax not in np.atleast_2d(axes)[-1]:
                ax.set_xlabel("")
    return path


def draw_spectrum(results: xr.Dataset, path: Path) -> Path:
    """The gap against the cut, the commitment of every frequency, and what twins differ by in every
    layer and frequency.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
    """
    at, plot = int(results.attrs["commitment_step"]), Result.of(results).plot
    with picture(path, (11, 3.1), ncols=3) as (figure, (gap, taus, layers)):
        plot.cut(ax=gap).set(title="gap against the cut (one pass)")
        plot.spectrum(ax=taus).set(title="commitment of each frequency (one pass)")

        # what twins differ by; frequencies are not evenly spaced
        energy = np.log10(np.maximum(results.difference_spectrum.values.T, 1e-12))
        image = layers.pcolormesh(
            edges(results.layer.values), edges(results.token_frequency.values), energy, cmap="magma"
        )
        layers.set(
            xlabel="layer ($-$1: the embedding)",
            ylabel=unit_of(results).replace("pixel", "token"),
            title=f"what twins differ by, step {at}",
        )
        whole_numbers(layers.xaxis)
        figure.colorbar(image, ax=layers, label="log$_{10}$ normalised energy")
    return path


def edges(centres: Array) -> Array:
    """Where cells around rising numbers begin and end.

    >>> edges(np.array([0.0, 1.0, 3.0])).tolist()
    [-0.5, 0.5, 2.0, 4.0]
    """
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - between[0], 2 * centres[-1] - between[-1]
    return np.array([first, *between, last])


def draw_frequencies(results: xr.Dataset, path: Path) -> Path:
    """When each frequency is decided: agreement of the finished twins by release step, by clones
    and in one pass; and when each band commits.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
    """
    plot = Result.of(results).plot
    with picture(path, (8.6, 3.3), ncols=2, width_ratios=(3, 2)) as (_, (lines, taus)):
        plot.agreement(ax=lines)
        plot.commitment(ax=taus)
    return path


def draw_images(results: xr.Dataset, path: Path, name: str) -> Path:
    """Images in rows and columns, as `result.plot` has them: "twins" or "lens".

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
        name: which.
    """
    with picture(path, (4, 4)) as (figure, ax):
        getattr(Result.of(results).plot, name)(ax=ax)
        high, wide, _ = ax.images[0].get_array().shape
        inches = 0.75 / results.sizes["row"]
        figure.set_size_inches(0.9 + inches * wide, 0.7 + inches * high)
    return path
