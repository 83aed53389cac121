"""The measurement behind `dit-lens gap`: when each frequency and each layer commits, and the gap between low and high.

One run of twins released at step 0 serves three questions, each shown under its own name (design, section 5):

- behaviour: when is a band of the finished image decided? Once for all steps in one pass, from corr²(x0 predicted at a step, finished
  image), and again with clones, released at the steps where those curves bend;
- divergence: when has the difference of the twins in layer l, band b, reached half of what it ends at?
- lens: when has what layer l predicts, read by the last layer, reached half of its final agreement with the finished image?

All intervals are bootstraps over pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bands import CUT, Bands
from .commitment import FEWEST_PAIRS, Agreement, agreement, curve, fit_commitment, half_crossing, resample
from .model import HookedDiT
from .onset import onset
from .twinning import Twins, twin_seeds, twins

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]
READING = "standardised"
RELEASES = 8


def measure(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    name: str = "model",
    resamples: int = 400,
    progress: bool = False,
) -> xr.Dataset:
    """The gap of one model, in behaviour and layer by layer, as one dataset; `dit_lens.gap_report` shows it.

    `cut` parts low from high, in cycles per pixel of the latents and in cycles per token of the stream.
    Raises ValueError for fewer than 16 pairs: the mean image of each class is taken off, which needs two or more pairs a class.
    """
    import xarray as xr

    if pairs < 2 * FEWEST_PAIRS:
        raise ValueError(
            f"There are {pairs} pairs; intervals over pairs with class means removed need {2 * FEWEST_PAIRS} or more."
        )
    if steps < 4:
        raise ValueError(f"steps={steps} is too short a run to see anything settle in; expected 4 or more.")
    probes = importlib.import_module("dit_lens.probes")  # upward, by name: this file belongs to a command
    c = model.cfg
    latent_grid = (c.sample_size, c.sample_size)
    fine, split = Bands.radial(latent_grid), Bands.radial(latent_grid, cut=cut)
    labels = [i % max(1, min(c.n_classes, pairs // 2)) for i in range(pairs)]

    with _Progress(progress, pairs * 2 * steps) as bar:
        divergence, lens = probes.TwinDivergence(Bands.radial(c.grid, cut=cut)), probes.LayerLens(split)
        pair = twins(
            model, pairs, labels, steps=steps, seed=seed, probes=[divergence, lens], progress=lambda s: bar(2 * pairs)
        )
        log_snr = pair.run.log_snr.numpy()
        both = np.array(labels * 2)
        final = pair.run.latents[-1]

        one_pass = {
            b: Agreement.stack([_by_pair(agreement(x0, final, b, both)) for x0 in pair.run.x0]) for b in (fine, split)
        }
        releases = _where_it_bends(curve(one_pass[fine], squared=True), steps)
        bar.more(sum(pairs * (steps - r) for r in releases))
        clones = _clones(pair, releases, seed, (fine, split), labels, bar)

    fits: dict[tuple[str, str], Any] = {}
    for kind, bands in (("band", fine), ("split", split)):
        options: dict[str, Any] = {
            "names": bands.names,
            "seed": seed,
            "resamples": resamples,
            "groups": len(set(labels)),
        }
        fits["one_pass", kind] = fit_commitment(one_pass[bands], range(steps), log_snr, squared=True, **options)
        fits["clones", kind] = fit_commitment(clones[bands], releases, log_snr, **options)

    methods = ["one_pass", "clones"]
    result: dict[str, Any] = {
        "agreement_one_pass": (("step", "band"), curve(one_pass[fine], squared=True)),
        "agreement_clones": (("release", "band"), curve(clones[fine])),
        "log_snr": ("step", log_snr),
    }
    for kind in ("band", "split"):
        for value, extra in (("commitment", ()), ("commitment_interval", ("bound",))):
            stacked = np.stack([fits[m, kind][value].sel(quantity="step").values for m in methods])
            result[f"{kind}_{value}"] = (("estimator", kind, *extra), stacked)
        dims = ("estimator", "quantity")
        result[f"{kind}_gap"] = (dims, np.stack([fits[m, kind].gap.values for m in methods]))
        result[f"{kind}_gap_interval"] = (
            (*dims, "bound"),
            np.stack([fits[m, kind].gap_interval.values for m in methods]),
        )

    counts = np.concatenate([np.ones((1, pairs)), resample(pairs, resamples, seed)])
    seen, lensed = divergence.result(), lens.result(final)
    energies = _energies(seen, counts)
    views = {"divergence": energies, "lens": _lens_curves(lensed, counts)}
    attrs: dict[str, Any] = {
        "model": name,
        "pairs": pairs,
        "steps": steps,
        "seed": seed,
        "cut": cut,
        "reading": READING,
    }
    taus, gaps, ends = [], [], []
    for view, curves in views.items():  # [resample, layer, band, step]
        tau = half_crossing(curves)
        gap = tau[..., -1] - tau[..., 0]
        taus.append(tau[0])
        gaps.append(gap[0])
        ends.append(_percentiles(gap[1:]))
        attrs |= _onset(view, gap, pairs)
    result["layer_commitment"] = (("view", "layer", "split"), np.stack(taus))
    result["layer_gap"] = (("view", "layer"), np.stack(gaps))
    result["layer_gap_interval"] = (("view", "layer", "bound"), np.stack(ends))

    behaviour = result["split_commitment"][1][0]
    known = behaviour[np.isfinite(behaviour)]
    at = int(np.clip(np.round(known.mean() if len(known) else steps / 2), 0, steps - 1))
    ratio = np.log(energies[:, :, 0, at]) - np.log(energies[:, :, -1, at])  # [resample, layer]
    result["log_ratio"], result["log_ratio_interval"] = (
        ("layer", ratio[0]),
        (("layer", "bound"), _percentiles(ratio[1:])),
    )
    result["difference_energy"] = (("reading", "layer", "step", "split"), seen.energy.values)
    attrs["commitment_step"] = at
    dataset = xr.Dataset(
        result,
        coords={
            "layer": np.arange(c.n_layers), "step": np.arange(steps), "release": releases, "band": list(fine.names),
            "split": ["low", "high"], "estimator": methods, "view": list(views), "bound": ["low", "high"],
            "reading": list(seen.reading.values), "quantity": ["step", "time", "log_snr"],
        },
        attrs=attrs,
    )  # fmt: skip
    dataset.attrs["title"] = (
        f"{name}: {c.n_layers} layers, {pairs} pairs of twins, {steps} DDIM steps (eta 1); commitment in steps"
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
        verdict = "With this many pairs no gap can be told from zero"
    taus = results.split_commitment.sel(estimator="one_pass").values
    words = {"clones": gap("split", "clones"), "lowest to highest of six bands": gap("band", "one_pass")}
    others = "".join(f"; {what} {v:+.1f} [{a:+.1f}, {b:+.1f}]" for what, (v, a, b) in words.items() if np.isfinite(v))
    return (
        f"{verdict}: on {name} low commits at step {taus[0]:.1f} and high at {taus[1]:.1f} of {steps}, "
        f"a gap of {value:+.1f} steps [{low:+.1f}, {high:+.1f}] (95 %, one pass{others})."
    )


def _clones(pair: Twins, releases: list[int], seed: int, partitions: tuple[Bands, ...], labels: list[int],
            bar: Callable[[int], None]) -> dict[Bands, Agreement]:  # fmt: skip
    """Twin A's run again from each release with other noise: the finished pair's agreement, [release, pair, band]."""
    base, own = pair.a, pair.a.latents[-1]
    found: dict[Bands, list[Agreement]] = {b: [] for b in partitions}
    for release in releases:
        _, fresh = twin_seeds(seed + 1_000_003 * (release + 1), pair.pairs)
        clone = base.replay(from_step=release, seeds=fresh).latents[-1]
        for bands in partitions:
            found[bands].append(agreement(own, clone, bands, np.array(labels)))
        bar(pair.pairs * (pair.run.settings.steps - release))
    return {bands: Agreement.stack(parts) for bands, parts in found.items()}


def _where_it_bends(curves: Array, steps: int) -> list[int]:
    """Release steps spread over the part of the run in which some band's agreement is between 0.1 and 0.9."""
    bending = np.flatnonzero(((curves > 0.1) & (curves < 0.9)).any(-1))
    first, last = (bending[0], bending[-1]) if len(bending) >= 3 else (0, steps - 1)
    return sorted({int(s) for s in np.linspace(first, last, RELEASES).round()})


def _by_pair(stats: Agreement) -> Agreement:
    """Both twins' statistics added up: [A | B, band] -> [pair, band]."""
    return Agreement(*(part.reshape(2, -1, part.shape[-1]).sum(0) for part in stats))


def _energies(seen: Any, counts: Array) -> Array:
    """Pooled normalised difference energies of every resample, [resample, layer, band, step]."""
    one = seen.sel(reading=READING)
    pooled = [
        np.einsum("rp,lspb->rlbs", counts, part.transpose("layer", "step", "pair", "band").values.astype(np.float64))
        for part in (one.difference, one.common)
    ]
    return pooled[0] / pooled[1]


def _lens_curves(lensed: Any, counts: Array) -> Array:
    """corr² of each layer's x0 with the finished image, of every resample, [resample, layer, band, step]."""
    sums = []
    for name in ("xy", "xx", "yy"):
        value = lensed[name].transpose("layer", "step", "batch", "band").values
        by_pair = value.reshape(*value.shape[:2], 2, -1, value.shape[-1]).sum(2)
        sums.append(np.einsum("rp,lspb->rlbs", counts, by_pair))
    return sums[0] ** 2 / (sums[1] * sums[2])


def _percentiles(draws: Array) -> Array:
    """95 % percentile interval over the resamples, [..., bound]; NaN where every resample is."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-NaN slices say so by NaN
        return np.moveaxis(np.nanquantile(draws, [0.025, 0.975], axis=0), 0, -1)


def _onset(view: str, gap: Array, pairs: int) -> dict[str, Any]:
    try:
        found = onset(gap[0], gap[1:], pairs)
    except ValueError as error:  # a band that does not cross half its final value in some layer
        return {
            f"onset_{view}": f"No onset can be named: {error}",
            f"onset_layer_{view}": -1,
            f"onset_verdict_{view}": "cannot tell",
        }
    layer = -1 if found.layer is None else found.layer
    return {f"onset_{view}": found.message, f"onset_layer_{view}": layer, f"onset_verdict_{view}": found.verdict}


class _Progress:
    """A live bar counting forwards, or nothing."""

    def __init__(self, shown: bool, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(TextColumn("twins"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} forwards"),
                            TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown, transient=True)  # fmt: skip
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
