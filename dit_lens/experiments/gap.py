"""The measurement behind `dit-lens gap`: when each frequency and each layer commits, and the gap
between low and high.

One run of twins released at step 0 serves every question, each shown under its own name:

- behaviour (`dit_lens.experiments.release`): at which step is a band of the finished image decided?
  Once for all steps in one pass, and again with clones, released where those curves rise; against
  the cut between low and high; on x_t, the predicted x0, the image, features of it;
- layers (`dit_lens.experiments.layer_profile`): in which layer do low and high come apart, in four
  views.

All intervals are bootstraps over pairs (`dit_lens.measures.bootstrap`, and for commitments
`dit_lens.measures.commitment`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr
from torch import Tensor

from dit_lens.probes import LayerLens, TwinDivergence

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import Agreement
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws
from ..measures.commitment import fit_commitment
from ..measures.estimate import Estimate
from ..measures.onset import Onset
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..twinning.twins import Twins, chosen_labels, twins
from .layer_profile import CHANNELS, profiles
from .outcomes import Outcome, features, images, latents, once
from .release import Curves, commitment_difference, one_pass, release_sweep

BandKind = Literal["radial", "dct", "pooling", "eigen"]
RELEASES = 8
MOST_RINGS = 24
CLASS_MEANS = "for intervals over pairs with class means removed"
ESTIMATORS = {"one_pass": "One pass", "clones": "Clones"}
ONE_PASS = (
    "Read in one pass only (clones were not run): these commitments are right as far as the "
    "denoiser is the exact one, which only clones can test."
)
SAMPLERS = {"ddim": "DDIM", "euler-flow": "Euler on a flow"}


def measure_gap(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    bands: BandKind = "radial",
    feature: Callable[[Tensor], Tensor] | None = None,
    name: str = "model",
    resamples: int = 400,
    progress: Callable[[int, int], object] | None = None,
    batch: int | None = None,
    clones: bool = True,
    labels: Labels | None = None,
) -> xr.Dataset:
    """The gap of one model, in behaviour and layer by layer; `dit_lens.report.gap` shows it.

    Args:
        model: the opened model, with a scheduler.
        pairs: of twins, 16 or more: the mean image of each class is taken off, which needs two or
            more pairs a class.
        steps: of denoising, 4 or more.
        seed: of the twins and of the bootstrap.
        cut: parts low from high, in cycles per pixel of the latents and in cycles per token of the
            stream.
        bands: the modes that are split: "radial" Fourier, "dct", "pooling" (the cut is rounded to a
            level), or "eigen", the eigenmodes of other twins' differences (low is the leading sixth
            of the modes, whatever the cut).
        feature: of images [n, channel, height, width] in [0, 1], such as a classifier; its
            commitment is reported as the bands' is.
        name: of the model, for the sentences.
        resamples: of the pairs.
        progress: called with (done, total) images that have gone through the model once, those of
            clones estimated.
        batch: images that go through the model, or its VAE, at once; None is all.
        clones: whether the behaviour is also measured with clones; without them it is read in one
            pass only, and what is said of clones is NaN.
        labels: one a pair, each two times or more; by default classes or prompts in turn.

    Returns:
        xr.Dataset: intervals are 95 %. "Commits" is when the agreement of finished twins passes
            1/2; a gap is the high (or last) band's commitment less the low (or first) one's.

            Behaviour: `agreement_one_pass` [step, band] and `agreement_clones` [release, band], 0
            to 1; `log_snr` [step]; `band_commitment` [estimator, band], `split_commitment` and
            `image_commitment` [estimator, split] and, with a feature, `features_commitment`
            [estimator], in steps, each with its `_interval` [..., bound]; `band_gap`, `split_gap`
            and `image_gap` [estimator, quantity], with `_interval`; `x_t_gap` [quantity], the
            split's read on x_t, with `_interval`; `spectrum_commitment` [frequency], in steps by
            one pass, with `_interval`; `cut_gap` [cut], in steps by one pass, with `_interval`;
            `estimator_difference` [split], commitment by one pass less clones, in steps, and
            `estimator_gap_difference` [], the same of the gap, each with `_interval`;
            `calibration` [split], the slope of the finished image on the predicted x0 at the
            commitment step, 1 for an exact denoiser, with `_interval`; `variance_ratio` [step,
            band], Var(predicted x0) / Var(finished image), equal to the agreement for an exact
            denoiser.

            Layers: `layer_commitment` [view, layer, split] and `layer_gap` [view, layer], in steps,
            the gap with `_interval`; `log_ratio` [energy, layer], log low less log high at the
            commitment step, with `_interval`; `layer_gap_together` [view, layer, bound] and
            `log_ratio_together` [energy, layer, bound], intervals that hold for all layers at
            once; `difference_energy` [channels, layer, step, split]
            and, at the commitment step, `difference_spectrum` [layer, token_frequency], the
            difference of twins as a share of their energy.

            Coordinates: `layer`, from -1, the embedding; `step`, 0 the noisiest; `release`, the
            clones' steps; `band`, six or so, low to high; `split`, low and high; `estimator`,
            one_pass and clones; `view`, divergence and lens; `energy`, ratio and growth;
            `channels`, how `dit_lens.probes.TwinDivergence` weighs channels; `quantity`, step, time
            (step / steps) and log_snr; `frequency` and `cut`, cycles per pixel; `token_frequency`,
            cycles per token (pooling: levels, eigen: ranks); `bound`, low and high.

            Attributes: `model`, `pairs`, `steps`, `seed`, `cut`, `bands`, as given; `channels`, the
            weighing that the views use; `commitment_step`, of `log_ratio`; `vae`, whether one
            decodes the images; for each of the four views `onset_{view}`, a sentence,
            `onset_layer_{view}`, -1 for none, and `onset_verdict_{view}`; the sentences `title`,
            `headline` and `estimators`, and `notes`, a line for each commitment that is missing
            or whose interval is cut off.

    Raises:
        InvalidValue: for too few pairs or steps, unknown bands, or a cut with no mode below or
            above it.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = measure_gap(model, pairs=16, steps=6, resamples=50, name="digits")
    >>> found.layer_gap.sizes["layer"], "on digits low commits at step" in found.headline
    (29, True)
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
    steps = arguments.whole("steps", steps, 4, why="to see anything settle in")
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    arguments.choice("bands", bands, get_args(BandKind))
    arguments.optional(arguments.function, "feature", feature, "of images in [0, 1]")
    arguments.text("name", name)
    resamples = arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    arguments.optional(arguments.whole, "batch", batch, 1)
    releases = min(RELEASES, steps - 1) if arguments.flag("clones", clones) else 0
    chosen = chosen_labels(model, pairs, labels)
    runs = 4 if bands == "eigen" else 2
    # a clone's run is half as long as a twin's on average
    count = _counting(pairs * steps * runs + releases * (pairs * steps // 2), progress)

    # the modes of latents and stream; eigenmodes are those of other twins
    pilot = None
    if bands == "eigen":
        pilot = twins(
            model,
            pairs,
            chosen,
            steps=steps,
            seed=seed + 1,
            batch=batch,
            progress=lambda *_: count(2 * pairs),
        )
    modes = _Modes.of(model, bands, cut, pilot)

    # one run of twins, seen by the probes, and clones of it
    outcomes = _outcomes(model, modes, cut, feature, batch)
    divergence, lens = (
        TwinDivergence(modes.token_split, fine=modes.token_spectrum),
        LayerLens(modes.split),
    )
    pair = twins(
        model,
        pairs,
        chosen,
        steps=steps,
        seed=seed,
        batch=batch,
        probes=[divergence, lens],
        progress=lambda *_: count(2 * pairs),
    )
    curves = {}
    with once():
        curves["one_pass"] = one_pass(pair, outcomes)
        # the spectrum is read in one pass only: its rings are too noisy to steer clones by
        if clones:
            curves["clones"] = release_sweep(
                pair,
                outcomes[1:],
                releases,
                seed=seed,
                batch=batch,
                progress=lambda *_: count(pairs * steps // 2),
            )

    # when the finished image is decided
    options = {"resamples": resamples, "seed": seed}
    x_t = one_pass(pair, [o for o in outcomes if o.name == "split"], "x_t")
    behaviour = _behaviour(curves, x_t, modes, options)
    decided = behaviour.split_commitment.sel(estimator="one_pass").values
    known = decided[np.isfinite(decided)]
    # at step 0 the twins are one
    at = int(np.clip(np.round(known.mean() if len(known) else steps / 2), 1, steps - 1))

    # and in which layers
    layers, onsets = profiles(
        divergence.result(),
        lens.result(pair.run.latents[-1]),
        modes.token_split,
        modes.token_spectrum,
        draws(pairs, resamples, seed),
        at,
    )
    sampler = SAMPLERS[pair.run.settings.scheduler]
    result = behaviour.merge(layers).assign_attrs(
        model=name,
        pairs=pairs,
        steps=steps,
        seed=seed,
        cut=cut,
        bands=bands,
        channels=CHANNELS,
        commitment_step=at,
        vae=int(model.vae is not None),
        title=f"{name}: {model.cfg.n_layers} layers, {pairs} pairs of twins, {steps} steps of "
        f"{sampler} (eta 1); commitment in steps",
    )
    for view, found in onsets.items():
        result.attrs |= _onset_attrs(view, found)
    result.attrs["headline"] = headline(result)
    return result


def headline(results: xr.Dataset) -> str:
    """The behavioural gap in one sentence, with its uncertainty.

    Args:
        results: of `measure_gap`.
    """
    name, steps, pairs = (results.attrs[key] for key in ("model", "steps", "pairs"))

    def gap(kind: str, estimator: str) -> Estimate:
        one = results.sel(estimator=estimator, quantity="step")
        return Estimate.of(one[f"{kind}_gap"], one[f"{kind}_gap_interval"])

    found = gap("split", "one_pass")
    if not np.isfinite(found.value):
        return (
            f"On {name} no gap can be given: a band does not commit within the run (see the "
            "frequency picture)."
        )
    if not found.known:
        verdict = f"With {pairs} pairs the gap has no interval"
    elif found.sign:
        verdict = f"{'Low' if found.sign > 0 else 'High'} frequencies commit first"
    else:
        # a width falls as 1 / sqrt(pairs)
        width = (found.high - found.low) / 2
        needed = int(np.ceil(pairs * (width / max(abs(found.value), 1e-9)) ** 2))
        enough = f"; about {needed} would show one of this size" if needed < 100 * pairs else ""
        verdict = f"With {pairs} pairs no gap can be told from zero{enough}"
    n = results.sizes["band"]
    number = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}.get(n, str(n))
    others = {
        "clones": gap("split", "clones"),
        f"lowest to highest of {number} bands": gap("band", "one_pass"),
    }
    compared = "".join(
        f"; {what} {other:+.1f}" for what, other in others.items() if np.isfinite(other.value)
    )
    low, high = results.split_commitment.sel(estimator="one_pass").values
    return (
        f"{verdict}: on {name} low commits at step {low:.1f} and high at {high:.1f} of {steps}, "
        f"a gap of {found:+.1f steps} (95 %, one pass{compared})."
    )


def _counting(total: int, progress: Callable[[int, int], object] | None) -> Callable[[int], None]:
    """A function that adds to what is done, and tells `progress`."""
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    return count


# The modes


class _Modes(NamedTuple):
    """Partitions of the latents' pixel grid, and of the stream's token grid."""

    spectrum: Bands
    fine: Bands
    split: Bands
    token_spectrum: Bands
    token_split: Bands

    @classmethod
    def of(cls, model: HookedDiT, kind: BandKind, cut: float, pilot: Twins | None) -> _Modes:
        """By the kind of bands; eigenmodes are learnt from what the pilot's twins differ by."""
        finished = pilot.a.latents[-1] - pilot.b.latents[-1] if pilot else None
        stream = _stream_difference(pilot) if pilot else None
        pixels = partition(kind, model.cfg.pixels, cut, finished)
        token_spectrum, _, token_split = partition(kind, model.cfg.grid, cut, stream)
        return cls(*pixels, token_spectrum, token_split)


def _stream_difference(pilot: Twins) -> Tensor:
    """What twins differ by in the last layer's stream, two thirds through the run, [pair, token,
    d_model].
    """
    run = pilot.run
    stream = run.activations(
        "resid_post", run.model.cfg.n_layers - 1, step=2 * run.settings.steps // 3
    )
    return stream[: pilot.pairs] - stream[pilot.pairs :]


def partition(
    kind: BandKind, grid: tuple[int, ...], cut: float, sample: Tensor | None = None
) -> tuple[Bands, Bands, Bands]:
    """The modes of a grid as finely as they can be told apart, in a few bands, and in "low" and
    "high".

    Args:
        kind: "radial", "dct", "pooling" or "eigen".
        grid: height and width, or a video's frames, height and width.
        cut: between low and high, in cycles per place of the grid.
        sample: differences of twins, images or [..., token, d], for kind "eigen".

    Raises:
        InvalidValue: for an unknown kind, or a cut with no mode below or above it.

    >>> [b.n for b in partition("radial", (8, 8), 0.25)]
    [15, 6, 2]
    """
    if kind in ("radial", "dct"):
        make = Bands.radial if kind == "radial" else Bands.dct
        split, fine = make(grid, cut=cut), make(grid)
        return make(grid, edges=_ring_edges(split, cut)), fine, split
    if kind == "pooling":
        fine = Bands.pooling(grid)
        # a level of k cells holds waves up to k / 2
        sides = [grid[0] >> (fine.n - 1 - level) for level in range(fine.n)]
        below = sum(side <= 2 * cut * grid[0] for side in sides)
        return fine, fine, fine.split(min(max(1, below), fine.n - 1))
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


# Behaviour


def _outcomes(
    model: HookedDiT,
    modes: _Modes,
    cut: float,
    feature: Callable[[Tensor], Tensor] | None,
    batch: int | None,
) -> list[Outcome]:
    """What of the finished twins is compared; the spectrum first."""
    return [
        latents(modes.spectrum, "spectrum"),
        latents(modes.fine, "band"),
        latents(modes.split, "split"),
        # without a VAE the grids are the same
        images(model, modes.split if model.vae is None else None, "image", cut, batch),
        *([features(model, feature, batch=batch)] if feature else []),
    ]


def _behaviour(
    curves: dict[str, Curves], x_t: Curves, modes: _Modes, options: dict[str, Any]
) -> xr.Dataset:
    """Agreement, commitment and gap by both estimators; their difference's sentence and notes as
    attributes.
    """
    one, clones = curves["one_pass"], curves.get("clones")
    variables: dict[str, Any] = {
        "agreement_one_pass": (("step", "band"), one.agreement("band")),
        "agreement_clones": (
            ("release", "band"),
            clones.agreement("band") if clones else np.empty((0, modes.fine.n)),
        ),
        "log_snr": ("step", one.log_snr),
        "variance_ratio": (("step", "band"), _variance_ratio(one)),
    }

    # commitment and gap of each outcome by both estimators
    notes: list[str] = []
    for outcome in (name for name in one.stats if name != "spectrum"):
        fits = [c.commitment(outcome, **options) for c in curves.values()]
        if clones is None:  # not known
            fits += [xr.full_like(fits[0].drop_vars("reason"), np.nan)]
        if outcome in ("band", "split"):
            for estimator, fit in zip(curves, fits, strict=False):
                said = (str(reason) for reason in fit.reason.values)
                notes += [f"{ESTIMATORS[estimator]}: {line}" for line in said if line]
        dims = {"band": ("band",), "features": ()}.get(outcome, ("split",))
        for value, ends in (("commitment", ()), ("commitment_interval", ("bound",))):
            found = np.stack([fit[value].sel(quantity="step").values for fit in fits])
            if outcome == "features":  # one band
                found = found[:, 0]
            variables[f"{outcome}_{value}"] = (("estimator", *dims, *ends), found)
        if outcome != "features":
            for value, ends in (("gap", ()), ("gap_interval", ("bound",))):
                found = np.stack([fit[value].values for fit in fits])
                variables[f"{outcome}_{value}"] = (("estimator", "quantity", *ends), found)

    # on x_t, by frequency, and against the cut
    fit = x_t.commitment("split", **options)
    variables["x_t_gap"] = ("quantity", fit.gap.values)
    variables["x_t_gap_interval"] = (("quantity", "bound"), fit.gap_interval.values)
    fit = one.commitment("spectrum", **options).sel(quantity="step")
    variables["spectrum_commitment"] = ("frequency", fit.commitment.values)
    variables["spectrum_commitment_interval"] = (
        ("frequency", "bound"),
        fit.commitment_interval.values,
    )
    by_cut = [_at_cut(one, k, options) for k in range(1, modes.spectrum.n)]
    variables["cut_gap"] = ("cut", [e.value for e in by_cut])
    variables["cut_gap_interval"] = (("cut", "bound"), [[e.low, e.high] for e in by_cut])

    # one pass less clones; of one pass alone there is the slope
    apart = commitment_difference(one, clones or one, "split", **options)
    if clones is None:
        unknown = ["commitment", "commitment_interval", "gap", "gap_interval"]
        apart = apart.assign({v: xr.full_like(apart[v], np.nan) for v in unknown})
        apart.attrs["sentence"] = ONE_PASS
    for name, of in (("estimator_difference", "commitment"), ("calibration", "calibration")):
        variables[name] = ("split", apart[of].values)
        variables[f"{name}_interval"] = (("split", "bound"), apart[f"{of}_interval"].values)
    for end in ("", "_interval"):
        dims = ("bound",) if end else ()
        variables[f"estimator_gap_difference{end}"] = (dims, apart[f"gap{end}"].values)
    coords = {
        "step": np.arange(len(one.log_snr)),
        "release": list(clones.releases) if clones else [],
        "band": list(modes.fine.names),
        "split": list(modes.split.names),
        "estimator": list(ESTIMATORS),
        "quantity": ["step", "time", "log_snr"],
        "bound": ["low", "high"],
        "frequency": modes.spectrum.middles(),
        "cut": list(modes.spectrum.edges[1:-1]),
    }
    attrs = {"estimators": apart.attrs["sentence"], "notes": "\n".join(notes)}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _at_cut(curves: Curves, k: int, options: dict[str, Any]) -> Estimate:
    """The gap in steps if the first k bands of the spectrum are low and the others high."""
    stats = Agreement(
        *(
            np.stack([part[..., :k].sum(-1), part[..., k:].sum(-1)], -1)
            for part in curves.stats["spectrum"]
        )
    )
    fit = fit_commitment(stats, curves.releases, curves.log_snr, squared=True, **options).sel(
        quantity="step"
    )
    return Estimate.of(fit.gap, fit.gap_interval)


def _variance_ratio(curves: Curves) -> Array:
    """Var(predicted x0) / Var(finished image) in each band: equal to the agreement for an exact
    denoiser, [step, band].
    """
    _, xx, yy = (part.sum(-2) for part in curves.stats["band"])
    return np.asarray(xx / yy)


def _onset_attrs(view: str, found: Onset | str) -> dict[str, Any]:
    """An onset, or why there can be none, as attributes of a dataset."""
    if isinstance(found, str):
        message, layer, verdict = f"No onset can be named: {found}", None, "cannot tell"
    else:
        message, layer, verdict = found.message, found.layer, found.verdict
    return {
        f"onset_{view}": message,
        f"onset_layer_{view}": -1 if layer is None else layer,
        f"onset_verdict_{view}": verdict,
    }
