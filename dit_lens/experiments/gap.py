"""The measurement behind `dit-lens gap`: when each frequency and each layer commits, and the gap
between low and high.

One run of twins released at step 0 serves every question, each shown under its own name (design,
section 5):

- behaviour (`dit_lens.experiments.release`): at which step is a band of the finished image decided?
  Once for all steps in one pass, and again with clones, released where those curves rise; against
  the cut between low and high; on x_t, the predicted x0, the image, features of it;
- layers (`dit_lens.experiments.layer_profile`): in which layer do low and high come apart, by four
  readings.

All intervals are bootstraps over pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ..errors import InvalidValue
from ..measures.bands import CUT, Bands
from ..measures.commitment import FEWEST_PAIRS, Agreement, fit_commitment, resample
from ..measures.onset import Onset
from ..model.hooked import HookedDiT
from ..twinning.twins import Twins, paired_labels, twins
from .layer_profile import READING, profiles
from .release import Curves, difference, features, images, latents, one_pass, release_sweep

if TYPE_CHECKING:
    import xarray as xr

Kind = Literal["radial", "dct", "pooling", "eigen"]
RELEASES = 8
MOST_RINGS = 24


def measure(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    bands: Kind = "radial",
    feature: Callable[[Tensor], Tensor] | None = None,
    name: str = "model",
    resamples: int = 400,
    progress: bool = False,
) -> xr.Dataset:
    """The gap of one model, in behaviour and layer by layer, as one dataset; `dit_lens.report.gap`
    shows it.

    Args:
        cut: parts low from high, in cycles per pixel of the latents and in cycles per token of the
            stream.
        bands: the modes that are split: "radial" Fourier, "dct", "pooling" (the cut is rounded to a
            level), or "eigen", the eigenmodes of other twins' differences (low is the leading sixth
            of the modes, whatever the cut).
        feature: of images [n, channel, height, width] in [0, 1], such as a classifier; its
            commitment is reported beside the bands'.

    Raises:
        ValueError: for fewer than 16 pairs: the mean image of each class is taken off, which needs
            two or more pairs a class.

        gap.measure(dit_lens.load("digits"), pairs=16, steps=25).attrs["headline"]
    """
    import xarray as xr

    if pairs < 2 * FEWEST_PAIRS:
        raise InvalidValue(
            f"There are {pairs} pairs; intervals over pairs with class means removed need "
            f"{2 * FEWEST_PAIRS} or more."
        )
    if steps < 4:
        raise InvalidValue(
            f"steps={steps} is too short a run to see anything settle in; expected 4 or more."
        )
    # upward, by name: this file belongs to a command
    probes = importlib.import_module("dit_lens.probes")
    c = model.cfg
    labels = paired_labels(model, pairs)
    with _Progress(progress, pairs * 2 * steps * (2 if bands == "eigen" else 1)) as bar:
        pilot = (
            twins(
                model,
                pairs,
                labels,
                steps=steps,
                seed=seed + 1,
                progress=lambda done, total: bar(2 * pairs),
            )
            if bands == "eigen"
            else None
        )
        spectrum, fine, split = partition(
            bands, c.pixels, cut, pilot.a.latents[-1] - pilot.b.latents[-1] if pilot else None
        )
        token_spectrum, _, token_split = partition(
            bands, c.grid, cut, _stream_difference(pilot) if pilot else None
        )
        readings = [
            latents(spectrum, "spectrum"),
            latents(fine, "band"),
            latents(split, "split"),
            # without a VAE the grids are the same
            images(model, split if model.vae is None else None, "image", cut),
        ]
        readings += [features(model, feature)] if feature else []
        divergence, lens = probes.TwinDivergence(token_spectrum), probes.LayerLens(split)
        pair = twins(
            model,
            pairs,
            labels,
            steps=steps,
            seed=seed,
            probes=[divergence, lens],
            progress=lambda done, total: bar(2 * pairs),
        )
        curves = {"one_pass": one_pass(pair, readings)}
        bar.more(RELEASES * pairs * steps // 2)
        curves["clones"] = release_sweep(
            pair, readings[1:], min(RELEASES, steps - 1), seed=seed, progress=bar
        )

    x_t = one_pass(pair, readings[2:3], "x_t")
    result, sentence = _behaviour(curves, x_t, spectrum, resamples, seed)
    result["variance_ratio"] = (("step", "band"), _variance_ratio(curves["one_pass"]))
    behaviour = result["split_commitment"][1][0]
    known = behaviour[np.isfinite(behaviour)]
    # at step 0 the twins are one
    at = int(np.clip(np.round(known.mean() if len(known) else steps / 2), 1, steps - 1))
    counts = np.concatenate([np.ones((1, pairs)), resample(pairs, resamples, seed)])
    layered, onsets = profiles(
        divergence.result(),
        lens.result(pair.run.latents[-1]),
        token_split,
        token_spectrum,
        counts,
        at,
    )
    attrs: dict[str, Any] = {
        "model": name,
        "pairs": pairs,
        "steps": steps,
        "seed": seed,
        "cut": cut,
        "bands": bands,
        "reading": READING,
        "commitment_step": at,
        "estimators": sentence,
    }
    for view, found in onsets.items():
        attrs |= _told(view, found)
    dataset = xr.Dataset(
        result | layered,
        coords={
            "layer": np.arange(-1, c.n_layers),
            "step": np.arange(steps),
            "release": list(curves["clones"].releases),
            "band": list(fine.names),
            "split": ["low", "high"],
            "estimator": list(curves),
            "view": ["divergence", "lens"],
            "energy": ["ratio", "growth"],
            "bound": ["low", "high"],
            "reading": list(divergence.channels),
            "quantity": ["step", "time", "log_snr"],
            "frequency": list(_middles(spectrum)),
            "token_frequency": list(_middles(token_spectrum)),
            "cut": list(spectrum.edges[1:-1]),
        },
    )
    dataset.attrs = attrs
    sampler = {"ddim": "DDIM", "euler-flow": "Euler on a flow"}[pair.run.settings.scheduler]
    dataset.attrs["title"] = (
        f"{name}: {c.n_layers} layers, {pairs} pairs of twins, {steps} steps of {sampler} (eta 1); "
        "commitment in steps"
    )
    dataset.attrs["headline"] = headline(dataset)
    return dataset


def headline(results: Any) -> str:
    """The behavioural gap in one sentence, with its uncertainty."""
    name, steps = results.attrs["model"], results.attrs["steps"]

    def gap(kind: str, estimator: str) -> tuple[float, float, float]:
        one = results.sel(estimator=estimator, quantity="step")
        return float(one[f"{kind}_gap"]), *map(float, one[f"{kind}_gap_interval"].values)  # type: ignore[return-value]

    value, low, high = gap("split", "one_pass")
    if not np.isfinite(value):
        return f"On {name} no gap can be given: a band does not commit within the run (see the frequency picture)."
    if low > 0:
        verdict = "Low frequencies commit first"
    elif high < 0:
        verdict = "High frequencies commit first"
    else:
        needed = int(
            np.ceil(results.attrs["pairs"] * ((high - low) / 2 / max(abs(value), 1e-9)) ** 2)
        )  # a width falls as 1 / sqrt(pairs)
        enough = (
            f"; about {needed} would show one of this size"
            if needed < 100 * results.attrs["pairs"]
            else ""
        )
        verdict = f"With {results.attrs['pairs']} pairs no gap can be told from zero{enough}"
    taus = results.split_commitment.sel(estimator="one_pass").values
    words = {
        "clones": gap("split", "clones"),
        "lowest to highest of six bands": gap("band", "one_pass"),
    }
    others = "".join(
        f"; {what} {v:+.1f} [{a:+.1f}, {b:+.1f}]"
        for what, (v, a, b) in words.items()
        if np.isfinite(v)
    )
    return (
        f"{verdict}: on {name} low commits at step {taus[0]:.1f} and high at {taus[1]:.1f} of "
        f"{steps}, "
        f"a gap of {value:+.1f} steps [{low:+.1f}, {high:+.1f}] (95 %, one pass{others})."
    )


def partition(
    kind: Kind, grid: tuple[int, ...], cut: float, sample: Tensor | None = None
) -> tuple[Bands, Bands, Bands]:
    """The modes of a grid as finely as they can be told apart, in a few bands, and in "low" and
    "high".

    `sample` are differences of twins, images or [.., token, d], for kind "eigen". Raises ValueError
    for an unknown kind, a bad cut.

    >>> [b.n for b in partition("radial", (8, 8), 0.25)]
    [15, 6, 2]
    """
    if kind in ("radial", "dct"):
        make = Bands.radial if kind == "radial" else Bands.dct
        split, fine = make(grid, cut=cut), make(grid)
        return make(grid, edges=_ring_edges(split, cut)), fine, split
    if kind == "pooling":
        fine = Bands.pooling(grid)
        sides = [
            grid[0] >> (fine.n - 1 - level) for level in range(fine.n)
        ]  # a level of k cells holds waves up to k / 2
        return (
            fine,
            fine,
            fine.split(min(max(1, sum(side <= 2 * cut * grid[0] for side in sides)), fine.n - 1)),
        )
    if kind == "eigen":
        assert sample is not None
        fine = Bands.eigen(sample, grid, n=6)
        return fine, fine, fine.split(1)
    raise InvalidValue(
        f"bands={kind!r} is no partition of modes; expected 'radial', 'dct', 'pooling' or 'eigen'."
    )


def _ring_edges(split: Bands, cut: float) -> list[float]:
    """Edges between the distinct frequencies, the cut's among them; every k-th if there are many,
    for a band needs modes to fit.
    """
    distinct = sorted({round(float(f), 9) for f in split.frequency})
    every = -(-len(distinct) // MOST_RINGS)
    kept = {*range(every - 1, len(distinct) - 1, every), sum(f < cut - 1e-9 for f in distinct) - 1}
    return [(distinct[i] + distinct[i + 1]) / 2 for i in sorted(kept)]


def _stream_difference(pilot: Twins) -> Tensor:
    """What twins differ by in the last layer's stream, two thirds through the run, [pair, token,
    d_model].
    """
    run = pilot.run
    stream = run.activations(
        "resid_post", run.model.cfg.n_layers - 1, step=2 * run.settings.steps // 3
    )
    return stream[: pilot.pairs] - stream[pilot.pairs :]


def _behaviour(
    curves: dict[str, Curves], x_t: Curves, spectrum: Bands, resamples: int, seed: int
) -> tuple[dict[str, Any], str]:
    """Agreement, commitment and gap by both estimators: variables of the dataset, and what the
    estimators' difference says.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    result: dict[str, Any] = {
        "agreement_one_pass": (("step", "band"), curves["one_pass"].agreement("band")),
        "agreement_clones": (("release", "band"), curves["clones"].agreement("band")),
        "log_snr": ("step", curves["one_pass"].log_snr),
    }
    seen = list(
        curves["clones"].stats
    )  # the spectrum is read in one pass only: its rings are too noisy to steer clones by
    fits = {(e, r): c.commitment(r, **options) for e, c in curves.items() for r in seen}
    for reading in seen:
        both = [fits[e, reading] for e in curves]
        kind = {"image": "split", "features": "what"}.get(reading, reading)
        for value, extra in (("commitment", ()), ("commitment_interval", ("bound",))):
            stacked = np.stack([fit[value].sel(quantity="step").values for fit in both])
            if reading == "features":
                stacked, dims = stacked[:, 0], ("estimator", *extra)
            else:
                dims = ("estimator", kind, *extra)
            result[f"{reading}_{value}"] = (dims, stacked)
        if reading != "features":
            result[f"{reading}_gap"] = (
                ("estimator", "quantity"),
                np.stack([fit.gap.values for fit in both]),
            )
            result[f"{reading}_gap_interval"] = (
                ("estimator", "quantity", "bound"),
                np.stack([fit.gap_interval.values for fit in both]),
            )
    fit = x_t.commitment("split", **options)
    result["x_t_gap"], result["x_t_gap_interval"] = (
        ("quantity", fit.gap.values),
        (("quantity", "bound"), fit.gap_interval.values),
    )
    fit = curves["one_pass"].commitment("spectrum", **options).sel(quantity="step")
    result["spectrum_commitment"] = ("frequency", fit.commitment.values)
    result["spectrum_commitment_interval"] = (
        ("frequency", "bound"),
        fit.commitment_interval.values,
    )
    by_cut = [_at_cut(curves["one_pass"], k, options) for k in range(1, spectrum.n)]
    result["cut_gap"], result["cut_gap_interval"] = (
        ("cut", [gap for gap, _ in by_cut]),
        (("cut", "bound"), [ends for _, ends in by_cut]),
    )
    apart = difference(curves["one_pass"], curves["clones"], "split", **options)
    result["estimator_difference"] = ("split", apart.commitment.values)
    result["estimator_difference_interval"] = (("split", "bound"), apart.commitment_interval.values)
    return result, apart.attrs["sentence"]


def _at_cut(curves: Curves, k: int, options: dict[str, Any]) -> tuple[float, list[float]]:
    """The gap in steps, with its interval, if the first k bands of the spectrum are low and the
    others high.
    """
    stats = Agreement(
        *(
            np.stack([part[..., :k].sum(-1), part[..., k:].sum(-1)], -1)
            for part in curves.stats["spectrum"]
        )
    )
    fit = fit_commitment(
        stats, curves.releases, curves.log_snr, squared=True, groups=curves.groups, **options
    ).sel(quantity="step")
    return float(fit.gap), fit.gap_interval.values.tolist()


def _variance_ratio(curves: Curves) -> np.ndarray[Any, Any]:
    """Var(predicted x0) / Var(finished image) in each band: equal to the agreement for an exact
    denoiser, [step, band].
    """
    _, xx, yy = (part.sum(-2) for part in curves.stats["band"])
    return np.asarray(xx / yy)


def _middles(bands: Bands) -> np.ndarray[Any, Any]:
    """A frequency (or level, or rank) to draw each band at: the mean of its modes."""
    return np.array(
        [float(bands.frequency[bands.index == b].double().mean()) for b in range(bands.n)]
    )


def _told(view: str, found: Onset | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {
            f"onset_{view}": f"No onset can be named: {found}",
            f"onset_layer_{view}": -1,
            f"onset_verdict_{view}": "cannot tell",
        }
    layer = -1 if found.layer is None else found.layer
    return {
        f"onset_{view}": found.message,
        f"onset_layer_{view}": layer,
        f"onset_verdict_{view}": found.verdict,
    }


class _Progress:
    """A live bar counting forwards, or nothing."""

    def __init__(self, shown: bool, total: int) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("twins"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} forwards"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
            transient=True,
        )
        self.task = self.bar.add_task("twins", total=total)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, forwards: int) -> None:
        self.bar.advance(self.task, forwards)

    def more(self, forwards: int) -> None:
        self.bar.update(self.task, total=(self.bar.tasks[0].total or 0) + forwards)
