"""What `dit-lens gap` shows: a table with a row a layer, a sentence, two pictures, and the stored
figures behind them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from rich.table import Table

from ..experiments.gap_sentences import TITLES, bands_sentence, gap_of
from ..measures.estimate import Estimate, number
from ..pictures.result import Result, onset
from ..pictures.style import HIGH, INK, LOW, error_bars, legend, whole_numbers
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
VIEWS = {view: title[0].lower() + title[1:] for view, title in TITLES.items()}


def write(results: xr.Dataset, folder: Path) -> None:
    """Store gap.nc; then print the tables and the sentences, and draw the pictures.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        folder: for the files; it is made if need be.
    """
    stored = save_dataset(folder / "gap.nc", "gap.nc", results)
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
        for name in ("twins", "lens")
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
    layers, at = results.layer.values, int(results.attrs["commitment_step"])
    with picture(path, (8.6, 5.0), nrows=2, ncols=2, sharex=True) as (_, axes):
        for ax, (view, title) in zip(axes.flat, VIEWS.items(), strict=True):
            if view in results.view.values:
                one, unit = results.sel(view=view), "gap, steps (high minus low)"
                value, ends, together = (
                    one[f"layer_gap{end}"] for end in ("", "_interval", "_together")
                )
                ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
            else:
                one, unit = results.sel(energy=view), "log low $-$ log high"
                value, ends, together = (
                    one[f"log_ratio{end}"] for end in ("", "_interval", "_together")
                )
                title = f"{title}, step {at}"
            if "null_profile" in results:
                for null in results.null_profile.sel(profile=view).values:
                    ax.plot(layers, null, color=LOW, alpha=0.3, linewidth=0.5)
            # of each layer by itself, and of all at once
            for shown in (ends, together):
                ax.fill_between(layers, *shown.values.T, color=INK, alpha=0.12, linewidth=0)
            ax.plot(layers, value, color=INK, marker="o", markersize=2.5, linewidth=1)
            ax.set(title=title, ylabel=unit, xlim=(layers[0] - 0.5, layers[-1] + 0.5))
            onset(ax, results.attrs, view)
            whole_numbers(ax.xaxis)
        for ax in axes[1]:
            ax.set_xlabel("layer ($-$1: the embedding)")
    return path


def draw_spectrum(results: xr.Dataset, path: Path) -> Path:
    """The gap against the cut, the commitment of every frequency, and what twins differ by in every
    layer and frequency.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
    """
    kind, at = results.attrs["bands"], int(results.attrs["commitment_step"])
    axis = {"pooling": "level", "eigen": "rank of the mode"}.get(kind, "frequency, cycles/pixel")
    with picture(path, (11, 3.1), ncols=3) as (figure, (gap, taus, layers)):
        # the gap against the cut
        gap.fill_between(
            results.cut, *results.cut_gap_interval.values.T, color=INK, alpha=0.15, linewidth=0
        )
        gap.plot(results.cut, results.cut_gap, color=INK, marker="o", markersize=2.5, linewidth=1)
        gap.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        if kind in ("radial", "dct"):
            gap.axvline(results.attrs["cut"], color=HIGH, linewidth=0.8, linestyle="--")
        gap.set(
            xlabel="cut, " + axis.removeprefix("frequency, "),
            ylabel="gap, steps",
            title="gap against the cut (one pass)",
        )

        # when each frequency commits
        tau = results.spectrum_commitment
        taus.errorbar(
            results.frequency,
            tau,
            yerr=error_bars(tau, results.spectrum_commitment_interval),
            fmt="o",
            color=INK,
            markersize=3,
            linewidth=0.8,
            capsize=1.5,
        )
        taus.set(
            xlabel=axis, ylabel="commitment step", title="commitment of each frequency (one pass)"
        )

        # what twins differ by
        energy = np.log10(np.maximum(results.difference_spectrum.values.T, 1e-12))
        image = layers.imshow(
            energy,
            aspect="auto",
            origin="lower",
            cmap="magma",
            extent=(-1.5, int(results.layer[-1]) + 0.5, -0.5, len(energy) - 0.5),
        )
        ticks = np.linspace(0, len(energy) - 1, min(6, len(energy))).round().astype(int)
        layers.set_yticks(ticks, [f"{results.token_frequency.values[i]:.2f}" for i in ticks])
        layers.set(
            xlabel="layer ($-$1: the embedding)",
            ylabel=axis.replace("pixel", "token"),
            title=f"what twins differ by, step {at}",
        )
        whole_numbers(layers.xaxis, taus.yaxis)
        figure.colorbar(image, ax=layers, label="log$_{10}$ normalised energy")
    return path


def draw_frequencies(results: xr.Dataset, path: Path) -> Path:
    """When each frequency is decided: agreement of the finished twins by release step, by clones
    and in one pass.

    Args:
        results: of `dit_lens.experiments.measure_gap`.
        path: of the picture.
    """
    import matplotlib

    bands = results.band.values
    colours = matplotlib.colormaps["coolwarm"](np.linspace(0, 1, len(bands)))
    with picture(path, (8.6, 3.3), ncols=2, width_ratios=(3, 2)) as (_, (lines, taus)):
        # agreement by release step
        for band, colour in zip(bands, colours, strict=True):
            lines.plot(
                results.step,
                results.agreement_one_pass.sel(band=band),
                color=colour,
                linewidth=1.4,
                label=band,
            )
            lines.plot(
                results.release,
                results.agreement_clones.sel(band=band),
                color=colour,
                marker="o",
                markersize=3.5,
                linestyle="none",
            )
        lines.axhline(0.5, color=INK, linewidth=0.6, linestyle=":")
        lines.set(
            xlabel="release step (0 is the noisiest)",
            ylabel="agreement of the finished twins",
            ylim=(-0.1, 1.02),
        )
        legend(lines, title="frequency, cycles/pixel", title_fontsize=7, loc="upper left")
        lines.annotate(
            "lines: one pass   points: clones",
            (0.99, 0.02),
            xycoords="axes fraction",
            ha="right",
            fontsize=7,
            color=INK,
        )

        # commitment of each band
        for estimator, marker, face, shift in (
            ("one_pass", "o", INK, -0.12),
            ("clones", "s", "white", 0.12),
        ):
            tau = results.band_commitment.sel(estimator=estimator)
            taus.errorbar(
                np.arange(len(bands)) + shift,
                tau,
                yerr=error_bars(tau, results.band_commitment_interval.sel(estimator=estimator)),
                fmt=marker,
                color=INK,
                markersize=4,
                linewidth=0.8,
                capsize=2,
                label=estimator.replace("_", " "),
                markerfacecolor=face,
            )
        taus.set_xticks(range(len(bands)), bands, rotation=30, fontsize=7)
        taus.set(xlabel="frequency, cycles/pixel", ylabel="commitment step")
        legend(taus)
        whole_numbers(lines.xaxis, taus.yaxis)
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
