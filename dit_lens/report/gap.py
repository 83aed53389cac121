"""What `dit-lens gap` shows: a table with a row a layer, a sentence, two pictures, and the stored
figures behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidValue

if TYPE_CHECKING:
    import xarray as xr

CAPTION = (
    "stream: the step at which the twins' difference in the layer's residual stream has reached "
    "half of what it ends at; "
    "lens: the same of the agreement between the layer's stream read by the last layer and the "
    "finished image."
)
VIEWS = {
    "divergence": "twins differ in the stream",
    "lens": "stream read by the last layer",
    "ratio": "normalised difference energies",
    "growth": "bare difference energies",
}
LOW, HIGH, INK = "#2166ac", "#b2182b", "#333333"


def write(results: xr.Dataset, folder: Path) -> None:
    """Print the table and the sentence; write gap.nc and three pictures into the folder."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=110, highlight=False)
    console.print(table(results))
    console.print(band_table(results))
    for line in sentences(results):
        console.print(line, soft_wrap=True)
    results.to_netcdf(folder / "gap.nc", engine="scipy")
    pictures = [
        draw_profile(results, folder / "layer_profile.png"),
        draw_frequencies(results, folder / "frequencies.png"),
        draw_spectrum(results, folder / "spectrum.png"),
    ]
    console.print(
        "[dim]pictures and figures: "
        f"{', '.join(str(p) for p in (*pictures, folder / 'gap.nc'))}[/dim]",
        soft_wrap=True,
    )


def read(path: Path) -> xr.Dataset:
    """Stored results. Raises ValueError for a file that is none."""
    import xarray as xr

    try:
        results = xr.load_dataset(path, engine="scipy")
    except Exception as error:  # scipy raises several kinds for files that are not netCDF
        raise InvalidValue(
            f"{str(path)!r} is not a result of `dit-lens gap` ({error}); expected its gap.nc."
        ) from None
    if "layer_gap" not in results:
        raise InvalidValue(
            f"{str(path)!r} is netCDF but not a result of `dit-lens gap`: it has no layer_gap."
        )
    return results


def table(results: xr.Dataset) -> Any:
    """One row a layer: when its low and its high band settle, and the gap, by both readings."""
    from rich.table import Table

    shown = Table(
        title=results.attrs["title"],
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
        padding=(0, 1),
    )
    shown.add_column("layer", justify="right")
    for view in ("stream", "lens"):
        shown.add_column(f"{view} low", justify="right", header_style=LOW, no_wrap=True)
        shown.add_column("high", justify="right", header_style=HIGH)
        shown.add_column("gap [95 %]", justify="right", no_wrap=True)
    for layer in results.layer.values[1:]:  # the first is the embedding
        cells = [str(layer)]
        for view in ("divergence", "lens"):
            one = results.sel(layer=layer, view=view)
            cells += [_number(one.layer_commitment.sel(split=name)) for name in ("low", "high")]
            cells.append(_with_interval(one.layer_gap, one.layer_gap_interval))
        shown.add_row(*cells)
    return shown


def band_table(results: xr.Dataset) -> Any:
    """One row a band: when it commits, by both estimators."""
    from rich.table import Table

    shown = Table(
        title="commitment of the finished image, in steps", title_justify="left", padding=(0, 1)
    )
    for column in ("band", "one pass [95 %]", "clones [95 %]"):
        shown.add_column(column, justify="right", no_wrap=True)
    for kind in ("band", "split"):
        for name in results[kind].values:
            one = results.sel({kind: name})
            pairs = zip(
                one[f"{kind}_commitment"].values,
                one[f"{kind}_commitment_interval"].values,
                strict=True,
            )
            shown.add_row(
                str(name), *(_with_interval(value, ends, sign="") for value, ends in pairs)
            )
    return shown


def sentences(results: xr.Dataset) -> list[str]:
    """The results in words."""
    step, snr = results.sel(quantity="step"), results.sel(quantity="log_snr", estimator="one_pass")
    others = {
        "in log SNR": (snr.split_gap, snr.split_gap_interval),
        "in steps on x_t": (step.x_t_gap, step.x_t_gap_interval),
        "on the image": (
            step.sel(estimator="one_pass").image_gap,
            step.sel(estimator="one_pass").image_gap_interval,
        ),
    }
    same = ", ".join(f"{words} {_with_interval(*gap, digits=2)}" for words, gap in others.items())
    cut = results.cut_gap.values[np.isfinite(results.cut_gap.values)]
    spread = (
        f"; from {cut.min():+.1f} to {cut.max():+.1f} steps, depending on the cut"
        if len(cut)
        else ""
    )
    lines = [
        results.attrs["headline"],
        f"The same gap {same}{spread}.",
        results.attrs["estimators"],
    ]
    return lines + [f"{words}: {results.attrs[f'onset_{view}']}" for view, words in VIEWS.items()]


def draw_profile(results: xr.Dataset, path: Path) -> Path:
    """Low against high over depth by four readings, each under its own name, with its interval and
    its onset.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(8.6, 5.0), layout="constrained", sharex=True)
    layers, at = results.layer.values, int(results.attrs["commitment_step"])
    for ax, (view, words) in zip(axes.flat, VIEWS.items(), strict=True):
        if view in results.view.values:
            one, unit = results.sel(view=view), "gap, steps (high minus low)"
            value, ends = one.layer_gap, one.layer_gap_interval
        else:
            one, unit = results.sel(energy=view), "log low $-$ log high"
            value, ends = one.log_ratio, one.log_ratio_interval
            words = f"{words}, step {at}"
        ax.fill_between(layers, *ends.values.T, color=INK, alpha=0.15, linewidth=0)
        ax.plot(layers, value, color=INK, marker="o", markersize=2.5, linewidth=1)
        ax.set_title(words)
        ax.set_ylabel(unit)
        if (onset := int(results.attrs[f"onset_layer_{view}"])) >= 0:
            ax.axvline(onset, color=HIGH, linewidth=0.8, linestyle="--")
            ax.annotate(
                f"onset {onset}",
                (onset, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -10),
                textcoords="offset points",
                color=HIGH,
                fontsize=8,
            )
        if view in results.view.values:
            ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
        ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    for ax in axes[1]:
        ax.set_xlabel("layer ($-$1: the embedding)")
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path


def draw_spectrum(results: xr.Dataset, path: Path) -> Path:
    """The gap against the cut, the commitment of every frequency, and what twins differ by in every
    layer and frequency.
    """
    plt = _pyplot()
    kind, at = results.attrs["bands"], int(results.attrs["commitment_step"])
    axis = {"pooling": "level", "eigen": "rank of the mode"}.get(kind, "frequency, cycles/pixel")
    figure, (gap, taus, layers) = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
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
    tau = results.spectrum_commitment
    spread = np.abs(results.spectrum_commitment_interval.values.T - tau.values)
    taus.errorbar(
        results.frequency,
        tau,
        yerr=spread,
        fmt="o",
        color=INK,
        markersize=3,
        linewidth=0.8,
        capsize=1.5,
    )
    taus.set(xlabel=axis, ylabel="commitment step", title="commitment of each frequency (one pass)")
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
    figure.colorbar(image, ax=layers, label="log$_{10}$ normalised energy")
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path


def draw_frequencies(results: xr.Dataset, path: Path) -> Path:
    """When each frequency is decided: agreement of the finished twins by release step, clones
    beside the one-pass estimate.
    """
    plt = _pyplot()
    import matplotlib

    figure, (lines, taus) = plt.subplots(
        1, 2, figsize=(8.6, 3.3), layout="constrained", width_ratios=(3, 2)
    )
    bands = results.band.values
    colours = matplotlib.colormaps["coolwarm"](np.linspace(0, 1, len(bands)))
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
    lines.legend(
        title="frequency, cycles/pixel",
        fontsize=7,
        title_fontsize=7,
        frameon=False,
        loc="upper left",
    )
    lines.annotate(
        "lines: one pass   points: clones",
        (0.99, 0.02),
        xycoords="axes fraction",
        ha="right",
        fontsize=7,
        color=INK,
    )
    for method, marker, words in (("one_pass", "o", "one pass"), ("clones", "s", "clones")):
        tau = results.band_commitment.sel(estimator=method)
        ends = results.band_commitment_interval.sel(estimator=method)
        spread = np.abs(ends.values.T - tau.values)
        shift = -0.12 if method == "one_pass" else 0.12
        taus.errorbar(
            np.arange(len(bands)) + shift,
            tau,
            yerr=spread,
            fmt=marker,
            color=INK,
            markersize=4,
            linewidth=0.8,
            capsize=2,
            label=words,
            markerfacecolor=INK if method == "one_pass" else "white",
        )
    taus.set_xticks(range(len(bands)), bands, rotation=30, fontsize=7)
    taus.set(xlabel="frequency, cycles/pixel", ylabel="commitment step")
    taus.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    return plt


def _number(value: Any) -> str:
    return f"{float(value):.1f}" if np.isfinite(value) else "-"


def _with_interval(value: Any, interval: Any, sign: str = "+", digits: int = 1) -> str:
    low, high = (float(v) for v in interval)
    form = f"{sign}.{digits}f"
    return f"{float(value):{form}} [{low:{form}}, {high:{form}}]" if np.isfinite(value) else "-"
