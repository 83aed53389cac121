"""The interactive figures of each stored result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from ..experiments.effects import FEWEST_MOVE
from ..measures.estimate import Estimate
from ..pictures.attributes import order
from .figure import HIGH, INK, LOW, Figure, escape, hook, limits_of, plain
from .gap import VIEWS

STEPS = "gap, steps (high minus low)"
NULL_LINE = {"color": LOW, "width": 0.5}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def gap(results: xr.Dataset) -> list[Figure]:
    """Of gap.nc: profiles over depth, commitment by band, frequency and cut, and what twins differ
    by.

    Args:
        results: the stored result.
    """
    layers = results.layer.values
    names = [hook(int(layer), "resid_post") for layer in layers]
    found = []
    for view, title in VIEWS.items():
        steps = view in results.view.values
        one = results.sel(view=view) if steps else results.sel(energy=view)
        what, unit = ("layer_gap", STEPS) if steps else ("log_ratio", "log low − log high")
        at = int(results.attrs["commitment_step"])
        title = title[0].upper() + title[1:]
        figure = Figure(title if steps else f"{title}, step {at}")
        if "null_profile" in results:
            for null in results.null_profile.sel(profile=view).values:
                quiet = {"hoverinfo": "skip", "showlegend": False, "opacity": 0.4}
                line = {"type": "scatter", "mode": "lines", "line": NULL_LINE} | quiet
                figure.traces.append(line | {"x": layers.tolist(), "y": plain(null)})
        figure.points(
            "",
            layers,
            one[what],
            one[f"{what}_interval"],
            at="layer",
            hooks=names,
            lines=True,
            ribbon=one[f"{what}_together"],
        )
        figure.axes("layer (−1: the embedding)", unit)
        if steps:
            figure.zero()
        onset = int(results.attrs[f"onset_layer_{view}"])
        if onset >= 0:
            figure.onset(onset, results.attrs.get(f"onset_interval_{view}"))
        found.append(figure)

    decided = Figure(
        "When each frequency (cycles/pixel) is decided; lines: one pass, points: clones"
    )
    for i, band in enumerate(results.band.values):
        shade = f"var(--band-{i % 8})"
        one = results.sel(band=band)
        decided.points(
            str(band),
            results.step,
            one.agreement_one_pass,
            color=shade,
            form=".2f",
            at="step",
            mode="lines",
            legendgroup=str(i),
            line={"color": shade, "width": 2, "dash": DASHES[i % len(DASHES)]},
        )
        if results.sizes["release"]:
            clones = one.agreement_clones
            decided.points(
                f"{band}, clones",
                results.release,
                clones,
                color=shade,
                form=".2f",
                at="released at step",
                legendgroup=str(i),
                showlegend=False,
            )
    decided.axes("release step (0 is the noisiest)", "agreement of the finished twins").zero(0.5)

    bands = Figure("When each band commits")
    named = [str(band) for band in results.band.values]
    for shift, name, symbol in ((-0.1, "one_pass", "circle"), (0.1, "clones", "square-open")):
        if (
            name in results.estimator.values
            and np.isfinite(results.band_commitment.sel(estimator=name).values).any()
        ):
            one = results.sel(estimator=name)
            bands.points(
                name.replace("_", " "),
                np.arange(len(named)) + shift,
                one.band_commitment,
                one.band_commitment_interval,
                form=".1f",
                said=named,
                marker={"symbol": symbol, "size": 8, "color": INK},
            )
    bands.axes("frequency, cycles/pixel", "commitment step")
    bands.layout["xaxis"] |= {
        "tickvals": list(range(len(named))),
        "ticktext": [escape(band) for band in named],
    }

    spectrum = Figure("Commitment of each frequency (one pass)").points(
        "",
        results.frequency,
        results.spectrum_commitment,
        results.spectrum_commitment_interval,
        form=".1f",
        at="frequency",
    )
    kind = results.attrs["bands"]
    axis = {"pooling": "level", "eigen": "rank of the mode"}.get(kind, "frequency, cycles/pixel")
    spectrum.axes(axis, "commitment step")
    cut = Figure("The gap against the cut (one pass)").points(
        "", results.cut, results.cut_gap, results.cut_gap_interval, at="cut", lines=True
    )
    cut.axes(f"cut, {axis.removeprefix('frequency, ')}", STEPS).zero()

    energy = np.log10(np.maximum(results.difference_spectrum.values.T, 1e-12))
    rows = [f"{f:.3g}" for f in results.token_frequency.values]
    texts = [[f"10^{v:.2f}" for v in line] for line in energy]
    differ = Figure(f"What twins differ by, step {int(results.attrs['commitment_step'])}")
    differ.heat(layers, rows, energy, texts, [names] * len(rows), "log10 energy", limits_of(energy))
    differ.axes("layer (−1: the embedding)", axis.replace("pixel", "token"))
    return [*found, decided, bands, spectrum, cut, differ]


def attributes(results: xr.Dataset) -> list[Figure]:
    """Of attributes.nc: when each attribute is decided and when it can be read, beside the bands.

    Args:
        results: the stored result.
    """
    names, step = order(results), results.sel(quantity="step")
    figure, one = Figure("When each attribute is decided"), step.sel(attribute=names)
    rows = [name.replace("_", " ") for name in names]
    for variable, said, symbol, color, shift in (
        ("commitment", "decided (clones)", "circle", INK, 0.0),
        ("readable", "readable (predicted x0)", "diamond-open", "var(--agree)", 0.3),
    ):
        figure.points(
            said,
            np.arange(len(names)) + shift,
            one[variable],
            one[f"{variable}_interval"],
            color=color,
            form=".1f",
            said=rows[: len(names)],
            across=True,
            marker={"symbol": symbol, "color": color, "size": 8},
        )
    for axis, said, color in (
        ("split", "low and high", HIGH),
        ("band", "bands, cycles/pixel", "var(--nothing)"),
    ):
        own = [str(name) for name in results[axis].values]
        figure.points(
            said,
            len(rows) + np.arange(len(own)),
            step[f"{axis}_commitment"],
            step[f"{axis}_commitment_interval"],
            color=color,
            form=".1f",
            said=own,
            across=True,
            marker={"symbol": "square", "color": color, "size": 8},
        )
        rows += own
    steps = int(results.attrs["steps"])
    figure.axes(f"step of {steps} (0 is the noisiest)", "")
    figure.layout["xaxis"]["range"] = [0, steps]
    figure.layout["yaxis"] |= {
        "tickvals": list(range(len(rows))),
        "ticktext": [escape(row) for row in rows],
        "range": [len(rows) - 0.4, -0.6],
    }
    figure.layout["height"] = 160 + 24 * len(rows)
    return [figure]


def knock_outs(results: xr.Dataset) -> list[Figure]:
    """Of knock_outs.nc: what each layer's knock-out does to the gap.

    Args:
        results: the stored result.
    """
    gap_of = float(results.attrs["gap"])
    figure = Figure(f"Knocked out one by one; the gap is {gap_of:+.2f} steps, by one pass")
    ways = [str(way) for way in results.how.values]
    layers = results.layer.values
    for i, way in enumerate(ways):
        one, color = results.sel(how=way), (INK, LOW, "var(--third)")[i % 3]
        shift = (i - (len(ways) - 1) / 2) * 0.2
        figure.points(
            f"by {way}",
            layers + shift,
            one.effect,
            one.effect_interval,
            color=color,
            at="layer",
            said=[str(layer) for layer in layers],
            hooks=[hook(int(layer), "resid_post") for layer in layers],
            marker={"color": color, "size": 6, "symbol": ("circle", "square", "diamond")[i % 3]},
        )
    figure.axes("layer knocked out", "change of the gap, steps").zero()
    return [figure.line(HIGH, "dash", y=-gap_of)]


def coupling_sweep(results: xr.Dataset) -> list[Figure]:
    """Of coupling_sweep.nc: the gap in three senses and the images' energy, by the coupling.

    Args:
        results: the stored result.
    """
    titles = {
        "agreement": ("When they commit", STEPS),
        "parting": ("When they part", STEPS),
        "size": ("What they end up differing by", "log E low − log E high"),
    }
    found = []
    for sense, (title, unit) in titles.items():
        one = results.sel(sense=sense)
        figure = Figure(title).points("", results.g, one.gap, one.gap_interval, at="g")
        found.append(figure.axes("coupling g", unit).zero())
    images = Figure("The finished images")
    for band, color, symbol in zip(
        results.band.values, (LOW, HIGH), ("circle", "square"), strict=True
    ):
        one, look = results.sel(band=band), {"symbol": symbol, "color": color, "size": 7}
        images.points(
            f"{band} energy",
            results.g,
            one.energy,
            one.energy_interval,
            color=color,
            form=".2f",
            at="g",
            marker=look,
        )
    images.points("read", results.g, results["read"], results.read_interval, form=".2f", at="g")
    found.append(images.axes("coupling g", "energy, share of the first; read").zero(1.0))
    for part, law in (("routing", "rho"), ("pattern", "xi")):
        figure = Figure(f"{part.capitalize()}, step {int(results.attrs['step'])}")
        mean = results[part].mean("layer")
        figure.points("mean of layers", results.g, mean, color=LOW, at="g", lines=True)
        dashed = {"color": HIGH, "width": 1.5, "dash": "dash"}
        figure.points(law, results.g, results[law], color=HIGH, at="g", mode="lines", line=dashed)
        found.append(figure.axes("coupling g", "difference left by attention").zero())
    return found


def patches(results: xr.Dataset) -> list[Figure]:
    """Of patches.nc: how far each patch moves twin B's bands to A, by layer, site and window.

    Args:
        results: the stored result.
    """
    found = []
    top = max(float(np.nan_to_num(np.abs(results.move.values)).max()), FEWEST_MOVE)
    for band in results.band.values:
        one = results.sel(band=band)
        rows = [(str(s), str(w)) for s in one.site.values for w in one.window.values]
        cells = [one.sel(site=s, window=w) for s, w in rows]
        figure = Figure(f"B's {band} band moved to A by a patch, share of the way")
        figure.heat(
            one.layer,
            [f"{s.removesuffix('_out')} {w}" for s, w in rows],
            np.stack([cell.move.values for cell in cells]),
            [_estimates(c.move.values, c.move_together.values, "+.1%") for c in cells],
            [[hook(int(layer), s) for layer in one.layer.values] for s, _ in rows],
            "share",
            (-top, top),
            "diverging",
        )
        found.append(figure.axes("layer patched", "site, steps"))
    return found


def cause_map(results: xr.Dataset) -> list[Figure]:
    """Of cause_map.nc: the effect by layer and window of steps, for each site and band.

    Args:
        results: the stored result.
    """
    found = []
    positive = results.effect.values[results.effect.values > 0]
    # a few cells lie far below the rest, and would take all the colours
    least = float(np.quantile(positive, 0.02)) if positive.size else 1e-12
    limits = limits_of(
        np.log10(np.maximum(positive, least)) if positive.size else [np.log10(least)]
    )
    for site in map(str, results.site.values):
        for band in results.band.values:
            one = results.sel(site=site, band=band).transpose("window", "layer", ...)
            effect = one.effect.values
            named = "resid_post" if site == "block" else f"{site}_out"
            kind = str(results.attrs["kind"])
            figure = Figure(f"{kind}: {site}, {band} band (1: a stranger's distance)")
            figure.heat(
                one.layer,
                [f"steps {w}" for w in one.window.values],
                np.log10(np.maximum(effect, least)),
                [
                    _estimates(row, ends, ".2e")
                    for row, ends in zip(effect, one.effect_interval.values, strict=True)
                ],
                [
                    # a layer without such a part has no effect and no hook
                    [
                        hook(int(layer), named) if np.isfinite(value) else ""
                        for layer, value in zip(one.layer.values, row, strict=True)
                    ]
                    for row in effect
                ],
                "log10 effect",
                limits,
            )
            found.append(figure.axes("layer", "steps"))
    return found


def _estimates(values: Any, ends: Any, form: str) -> list[str]:
    return [format(Estimate.of(*pair), form) for pair in zip(values, ends, strict=True)]


FIGURES: dict[str, Callable[[xr.Dataset], list[Figure]]] = {
    "gap.nc": gap,
    "attributes.nc": attributes,
    "coupling_sweep.nc": coupling_sweep,
    "knock_outs.nc": knock_outs,
    "patches.nc": patches,
    "cause_map.nc": cause_map,
}
"""The results with figures of this kind; the others have their picture."""
