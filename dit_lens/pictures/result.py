"""A result: an `xarray.Dataset` whose `plot` also draws what it measured.

    result = measure_gap(model)
    ax = result.plot.profile("lens")           # matplotlib axes
    ax.figure.savefig("profile.pdf")           # or .png, .svg
    result.plot.commitment(ax=axes[1])         # into axes of yours

It stays an `xarray.Dataset` in everything else, xarray's own `plot.scatter` and others among it.
Which pictures a result has depends on what it holds: `dir(result.plot)` lists them.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import xarray as xr
from xarray.plot.accessor import DatasetPlotAccessor

from .. import arguments
from ..errors import InvalidValue
from . import notebook
from .attributes import draw_decided, steps_size
from .images import beside, show_grid
from .style import (
    HIGH,
    INK,
    LOW,
    SEQUENTIAL,
    axes_for,
    error_bars,
    legend,
    points,
    said,
    signed_map,
    whole_numbers,
    windows_up,
    zero,
)

NEEDS = {
    "profile": ("layer_gap", "log_ratio"),
    "commitment": ("band_commitment", "estimator"),
    "agreement": ("agreement_one_pass",),
    "spectrum": ("spectrum_commitment",),
    "cut": ("cut_gap",),
    "knob": ("gap", "sense", "parting"),
    "causes": ("effect", "layer"),
    "sweep": ("effect", "depth"),
    "map": ("effect", "layer", "window"),
    "change": ("effect", "power", "error"),
    "decided": ("commitment", "later"),
    "attributes": ("attribute", "commitment", "readable"),
    "twins": ("end", "release"),
    "lens": ("lens_image",),
}
"""The pictures by name, and the variables or axes by which a result is known to have them; a map
has no causes, which are drawn without windows.
"""
NO_CLONES = "not measured: clones were not run"


class Pictures(DatasetPlotAccessor):
    """What `result.plot` draws: every picture takes `ax=`, and gives matplotlib axes back.

    result = dit_lens.load_result("gap-digits/gap.nc")
    result.plot.names                          # the pictures that it has
    result.plot.agreement(ax=axes[0])
    """

    __slots__ = ()

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - NEEDS.keys() | {*self.names})

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refused: which picture has to be said."""
        raise InvalidValue(f"result.plot() draws nothing by itself; {self._expected}.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of what looks into objects, such as copy and notebooks
            raise AttributeError(name)
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise AttributeError(f"This result has no picture {name!r}; {self._expected}{hint}.")

    @property
    def _expected(self) -> str:
        known = ", ".join(self.names) or "none of ours"
        return f"expected one of: {known}, or xarray's own"

    @property
    def names(self) -> list[str]:
        """The pictures that this result has."""
        has = set(map(str, self._ds.variables)) | set(map(str, self._ds.dims))
        found = [name for name, needs in NEEDS.items() if has.issuperset(needs)]
        return [name for name in found if name != "causes" or "map" not in found]

    def _data(self, name: str) -> xr.Dataset:
        if name not in self.names:
            raise InvalidValue(f"This result has no picture {name!r}; {self._expected}.")
        found: xr.Dataset = self._ds
        return found

    def profile(self, view: str | None = None, ax: Any = None) -> Any:
        """Low against high over depth, with its interval, and its onset with the onset's interval.

        Args:
            view: such as "lens"; the first one by default.
            ax: where.
        """
        data = self._data("profile")
        views = [*data.view.values.tolist(), *data.energy.values.tolist()]
        view = views[0] if view is None else arguments.choice("view", view, views)
        steps = view in data.view.values
        one = data.sel(view=view) if steps else data.sel(energy=view)
        what = "layer_gap" if steps else "log_ratio"
        ax, layers = axes_for(ax), data.layer.values
        if "null_profile" in data and view in data.profile.values:
            for null in data.null_profile.sel(profile=view).values:
                ax.plot(layers, null, color=LOW, alpha=0.3, linewidth=0.5)
        for ends in (f"{what}_interval", f"{what}_together"):  # of each by itself, and of all
            if ends in one:
                shade = {"color": INK, "alpha": 0.15, "linewidth": 0}
                ax.fill_between(layers, *one[ends].values.T, **shade)
        ax.plot(layers, one[what], color=INK, marker="o", markersize=2.5, linewidth=1)
        if steps:
            zero(ax)
        onset(ax, data.attrs, view)
        unit = "gap, steps (high minus low)" if steps else "log low $-$ log high"
        wide = layers[0] - 0.5, layers[-1] + 0.5
        ax.set(xlabel="layer ($-$1: the embedding)", ylabel=unit, title=view, xlim=wide)
        whole_numbers(ax.xaxis)
        if not np.isfinite(one[what]).any():
            why = "no layer's bands are decided within the run"
            ax.set_yticks([])
            said(ax, NO_CLONES if view == "stream" and not data.sizes["release"] else why)
        return ax

    def commitment(self, ax: Any = None) -> Any:
        """When each band commits, by each estimator, with its interval.

        Args:
            ax: where.
        """
        data, ax = self._data("commitment"), axes_for(ax)
        # what was not run is not in the legend
        has = np.isfinite(data.band_commitment).any("band")
        n, estimators = data.sizes["band"], data.estimator.values[has.values].tolist()
        for i, name in enumerate(estimators):
            one, face = data.sel(estimator=name), INK if i == 0 else "white"
            points(
                ax,
                np.arange(n) + 0.12 * (2 * i - len(estimators) + 1),
                one.band_commitment,
                one.band_commitment_interval,
                fmt="os^"[i % 3],
                markersize=4,
                markerfacecolor=face,
                label=str(name).replace("_", " "),
            )
        aslant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor", "fontsize": 7}
        ax.set_xticks(range(n), data.band.values, **aslant)
        ax.set(xlabel=unit_of(data), ylabel="commitment step", xlim=(-0.5, n - 0.5))
        if estimators:
            legend(ax)
        else:
            said(ax, "no band is decided within the run")
        return ax

    def agreement(self, ax: Any = None) -> Any:
        """Agreement of the finished twins by release step: lines in one pass, points by clones.

        Args:
            ax: where.
        """
        import matplotlib

        data, ax = self._data("agreement"), axes_for(ax)
        colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 0.85, data.sizes["band"]))
        clones = data.get("agreement_clones")
        for band, colour in zip(data.band.values, colours, strict=True):
            ax.plot(data.step, data.agreement_one_pass.sel(band=band), color=colour, label=band)
            if clones is not None and clones.size:
                ax.plot(data.release, clones.sel(band=band), "o", color=colour, markersize=3.5)
        ax.plot([], [], color=INK, label="one pass")
        if clones is not None and clones.size:
            ax.plot([], [], "o", color=INK, markersize=3.5, label="clones")
        zero(ax, 0.5)
        ax.set(xlabel="release step (0 is the noisiest)", ylabel="agreement of the finished twins")
        whole_numbers(ax.xaxis)
        legend(ax, title=unit_of(data), title_fontsize=7)
        return ax

    def spectrum(self, ax: Any = None) -> Any:
        """When each frequency commits, in one pass, with its interval.

        Args:
            ax: where.
        """
        data, ax = self._data("spectrum"), axes_for(ax)
        tau = data.spectrum_commitment
        points(ax, data.frequency, tau, data.spectrum_commitment_interval)
        ax.set(xlabel=unit_of(data), ylabel="commitment step")
        return ax

    def cut(self, ax: Any = None) -> Any:
        """The gap against the cut between low and high, in one pass, with its interval.

        Args:
            ax: where.
        """
        data, ax = self._data("cut"), axes_for(ax)
        points(ax, data.cut, data.cut_gap, data.cut_gap_interval, fmt="o-")
        zero(ax)
        if data.attrs.get("bands") in ("radial", "dct"):  # of others the cut is rounded, or none
            ax.axvline(data.attrs["cut"], color=HIGH, linewidth=0.8, linestyle="--")
        unit = unit_of(data).removeprefix("frequency, ")
        ax.set(xlabel=f"cut, {unit}", ylabel="gap, steps (high minus low)")
        return ax

    def attributes(self, ax: Any = None) -> Any:
        """When each attribute is decided, and when the predicted x0 shows it, above the bands.

        Args:
            ax: where.
        """
        data = self._data("attributes")
        ax = axes_for(ax, steps_size(data))
        draw_decided(ax, data)
        return ax

    def twins(self, pairs: int = 4, ax: Any = None) -> Any:
        """What twins ended as, a row for each release step: what the two of a pair have in common
        was decided before they parted.

        Args:
            pairs: so many of them.
            ax: where.
        """
        data = self._data("twins")
        shown = min(arguments.whole("pairs", pairs, 1), data.sizes["shown"])
        ends = data.end.isel(shown=slice(shown)).transpose("twin", "release", "shown", ...)
        images = beside(*ends.values)
        high, wide = images.shape[-2:]
        rows = len(images)
        ax = axes_for(ax, (0.9 + 0.85 * shown * wide / high, 0.6 + 0.78 * rows))
        numbers = [f"twins {i + 1}" for i in range(shown)]
        show_grid(ax, images, data.release.values.tolist(), numbers)
        ax.xaxis.tick_top()
        ax.set(xlabel="A on the left, B on the right", ylabel="released at step")
        return ax

    def lens(self, ax: Any = None) -> Any:
        """What the stream after a layer reads as, at some steps: the first image's x0, by the final
        layer.

        Args:
            ax: where.
        """
        data = self._data("lens")
        images = data.lens_image.transpose("shown_layer", "shown_step", ...).values
        rows, columns, _, high, wide = images.shape
        ax = axes_for(ax, (0.9 + 0.85 * columns * wide / high, 0.7 + 0.85 * rows))
        layers = ["embedding" if i < 0 else str(i) for i in data.shown_layer.values]
        show_grid(ax, images, layers, data.shown_step.values.tolist())
        ax.set(xlabel="step (0: the noisiest)", ylabel="stream after layer")
        return ax

    def knob(self, sense: str = "agreement", ax: Any = None) -> Any:
        """The gap against the strength of the coupling, with its interval.

        Args:
            sense: of the gap.
            ax: where.
        """
        data, ax = self._data("knob"), axes_for(ax)
        arguments.choice("sense", sense, data.sense.values.tolist())
        one = data.sel(sense=sense)
        points(ax, data.g, one.gap, one.gap_interval, fmt="o-")
        zero(ax)
        unit = "log E low $-$ log E high" if sense == "size" else "gap, steps (high minus low)"
        ax.set(xlabel="coupling g", ylabel=unit, title=sense)
        return ax

    def causes(self, ax: Any = None) -> Any:
        """What each layer's knock-out, or its coupling, does to the gap, by way where there are
        several, with intervals for all at once.

        Args:
            ax: where.
        """
        data, ax = self._data("causes"), axes_for(ax, (5.4, 3.0))
        several = "how" in data.dims
        ways = data.how.values.tolist() if several else [data.attrs.get("how", "itself")]
        for i, way in enumerate(ways):
            one = data.sel(how=way) if several else data
            x = data.layer.values + (i - (len(ways) - 1) / 2) * 0.25
            colour = (INK, LOW, HIGH)[i % 3]
            points(ax, x, one.effect, one.effect_interval, colour, label=f"by {way}")
        zero(ax)
        if "gap" in data.attrs:
            options = {"color": HIGH, "linewidth": 0.8, "linestyle": "--"}
            ax.axhline(-float(data.attrs["gap"]), label="no gap left", **options)
        done = data.attrs.get("done", "knocked out")
        ax.set(xlabel=f"layer {done}", ylabel="change of the gap, steps")
        whole_numbers(ax.xaxis)
        legend(ax)
        return ax

    def sweep(self, ax: Any = None) -> Any:
        """The first and the last layers knocked out together, as many as the depth says.

        Args:
            ax: where.
        """
        data, ax = self._data("sweep"), axes_for(ax)
        for end, colour in (("first", LOW), ("last", HIGH)):
            one = data.sel(end=end)
            label = f"{end} layers"
            points(ax, one.depth, one.effect, one.effect_interval, colour, fmt="o-", label=label)
        zero(ax)
        ax.set(xlabel="layers knocked out together", ylabel="change of the gap, steps")
        whole_numbers(ax.xaxis)
        legend(ax)
        return ax

    def change(self, ax: Any = None) -> Any:
        """What a change to a model does to its finished images, by band, with intervals: how far
        it moves them, and their power and the unchanged model's error on them, as multiples.

        Args:
            ax: where.
        """
        data, ax = self._data("change"), axes_for(ax, (4.6, 2.4))
        ax.set_xscale("log", nonpositive="clip")
        rows = {"effect": "moved by", "power": "power", "error": "model's error"}
        for band, colour, up in zip(data.band.values, (LOW, HIGH), (0.13, -0.13), strict=True):
            for row, name in enumerate(rows):
                one, y = data.sel(band=band), len(rows) - 1 - row + up
                usual = {"fmt": "o", "markersize": 4, "linewidth": 0.9, "color": colour}
                bars = error_bars([one[name]], one[f"{name}_interval"].values[None])
                ax.errorbar(one[name], y, xerr=bars, label=band if row == 0 else None, **usual)
                if one[name] == 0:  # which has no place on a logarithmic axis
                    at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
                    ax.annotate(f"{band}: 0", (0.02, y), color=colour, **at)
        ax.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
        ax.set_yticks(range(len(rows))[::-1], rows.values())
        ax.set(ylim=(-0.5, len(rows) - 0.5), ylabel="what changes")
        ax.set_xlabel("1: a stranger's distance; the same power, the same error", fontsize=8)
        legend(ax)
        return ax

    def decided(self, ax: Any = None) -> Any:
        """When each band commits without and with a change to the model, with intervals.

        Args:
            ax: where.
        """
        data, ax = self._data("decided"), axes_for(ax, (3.2, 2.4))
        for model, face, aside in (("plain", INK, -0.08), ("changed", "white", 0.08)):
            one, x = data.sel(model=model), np.arange(data.sizes["band"]) + aside
            options: dict[str, Any] = {"markersize": 4, "markerfacecolor": face, "label": model}
            points(ax, x, one.commitment, one.commitment_interval, **options)
        names = [
            str(band) if np.isfinite(data.commitment.sel(band=band)).any() else f"{band}: none"
            for band in data.band.values
        ]
        ax.set_xticks(range(len(names)), names)
        ax.set(xlim=(-0.5, len(names) - 0.5), xlabel="band", ylabel="commitment step")
        legend(ax)
        return ax

    def map(self, ax: Any = None, **at: Any) -> Any:
        """Effects by layer and window of steps; signed ones with their colours centred on zero.

        Args:
            ax: where.
            **at: which site and band, the first ones by default.
        """
        data, ax = self._data("map"), axes_for(ax, (5.4, 3.0))
        effect, shown = data.effect, []
        for axis in [axis for axis in effect.dims if axis not in ("layer", "window")]:
            values = data[axis].values.tolist()
            chosen = arguments.choice(str(axis), at.pop(str(axis), values[0]), values)
            effect = effect.sel({axis: chosen})
            shown.append(str(chosen))
        if at:
            raise InvalidValue(
                f"{next(iter(at))!r} is no axis of the map; expected one of "
                f"{list(data.effect.dims)}."
            )
        values, layers = effect.transpose("window", "layer"), data.layer.values
        of_gap = "gap" in data.attrs  # a band that was chosen is no axis any more
        unit = "change of the gap, steps" if of_gap else "effect, 1 a stranger's distance"
        signed_map(ax, values, layers, unit)
        windows_up(ax, data.window.values)
        ax.set(xlabel="layer", ylabel="steps", title=", ".join(shown))
        whole_numbers(ax.xaxis)
        return ax


def unit_of(data: xr.Dataset) -> str:
    """What the frequencies of a result are, for an axis.

    Args:
        data: of `dit_lens.experiments.measure_gap`.
    """
    units = {"pooling": "level", "eigen": "rank of the mode"}
    return units.get(data.attrs.get("bands", ""), "frequency, cycles/pixel")


def onset(ax: Any, attrs: Any, view: str) -> None:
    """A profile's onset, if one is named, with its interval.

    Args:
        ax: where.
        attrs: of the result.
        view: of the profile.
    """
    layer = int(attrs.get(f"onset_layer_{view}", -1))
    if layer < 0:
        return
    ends = attrs.get(f"onset_interval_{view}")
    if ends is not None:
        ax.axvspan(*ends, color=HIGH, alpha=0.2, linewidth=0)
    ax.axvline(layer, color=HIGH, linewidth=0.8, linestyle="--")
    named = f"onset {layer}" + ("" if ends is None else f" [{int(ends[0])}, {int(ends[1])}]")
    late = layer > sum(ax.get_xlim()) / 2  # to its left, or it would leave the axes
    ax.annotate(
        named,
        (layer, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if late else 3, -10),
        textcoords="offset points",
        ha="right" if late else "left",
        color=INK,
        fontsize=8,
    )


class Result(xr.Dataset):
    """A dataset whose `plot` has pictures of ours.

    Args:
        values: what makes a dataset: variables, coordinates, attributes.

    >>> import numpy as np
    >>> ends = np.array([[0.5, 1.5], [1.5, 2.5]])
    >>> found = Result({"cut_gap": ("cut", [1.0, 2.0]), "cut_gap_interval": (("cut", "b"), ends)})
    >>> found.plot.names
    ['cut']
    """

    __slots__ = ()

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Result:
        """A dataset as a result; its variables are shared.

        Args:
            dataset: any.
        """
        found = cls(dataset.data_vars, dataset.coords, dict(dataset.attrs))
        found.encoding = dict(dataset.encoding)
        return found

    def _repr_html_(self) -> str:
        """For notebooks: what it says in sentences, above xarray's view of the variables."""
        said = [str(v) for k, v in self.attrs.items() if k.startswith(("headline", "sentence"))]
        below = super()._repr_html_()
        return notebook.shown("\n".join(said), below) if said else below

    @property
    def plot(self) -> Pictures:  # type: ignore[override]
        """Draws; see `Pictures`."""
        return Pictures(self)
