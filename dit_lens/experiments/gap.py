"""The measurement behind `dit-lens gap`: when each frequency and each layer commits, and the gap
between low and high.

One run of twins released at step 0 serves every question, each shown under its own name:

- behaviour (`dit_lens.experiments.release`): at which step is a band of the finished image decided?
  By clones, released where their curves rise, which is the measurement; and once for all steps in
  one pass, which costs nothing and differs where the denoiser is not an exact one; one pass also
  against the cut between low and high, and on x_t;
- data (`dit_lens.experiments.data_gap`): how much of the gap does the data's spectrum make?
- layers (`dit_lens.experiments.layer_profile`): in which layer do low and high come apart, in four
  views, held against the same layers in another order (`dit_lens.experiments.null_profiles`).

All intervals are bootstraps over pairs (`dit_lens.measures.bootstrap`, and for commitments
`dit_lens.measures.commitment`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xarray as xr
from torch import Tensor

from dit_lens.probes import LayerLens, TwinDivergence

from .. import arguments
from ..errors import InvalidValue
from ..groundtruth.nulls import shuffled_order
from ..measures import Array
from ..measures.agreement import Agreement
from ..measures.bands import CUT
from ..measures.bootstrap import FEWEST_PAIRS, draws
from ..measures.commitment import commitment_draws, fit_commitment
from ..measures.estimate import Estimate
from ..measures.onset import Onset
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pictures.result import Result
from ..pieces import Engine, Piece, enough, flat, measured, results, whole
from ..sampling.kept import arrays_of, run_of
from ..twinning.twins import Twins, chosen_labels, twins
from .data_gap import as_latents, data_gap, data_sentence
from .gap_sentences import ESTIMATORS, NO_DEPTH, TITLES, headline
from .kept_twins import kept_twins
from .layer_profile import CHANNELS, VIEWS, Streams, last_layers, profile_values, profiles
from .modes import BandKind, Modes
from .null_profiles import PAIRS, STEPS, checked_nulls, depth_sentence, null_profiles
from .null_profiles import RELEASES as NULL_RELEASES
from .outcomes import Outcome, features, latents, once
from .outcomes import images as images_of
from .release import RELEASES, Curves, commitment_difference, one_pass, release_sweep
from .shown import SHOWN, lens_images, pictures

CLASS_MEANS = "for intervals over pairs with class means removed"
ONE_PASS = (
    "Read in one pass only (clones were not run): these commitments are right as far as the "
    "denoiser is the exact one, which only clones can test."
)
SAMPLERS = {"ddim": "DDIM", "euler-flow": "Euler on a flow"}


@measured
def measure_gap(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    bands: BandKind = "radial",
    feature: Callable[[Tensor], Tensor] | None = None,
    null: int = 0,
    images: Tensor | None = None,
    image_labels: Sequence[int] | None = None,
    name: str = "model",
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
    batch: int | None = None,
    clones: bool = True,
    labels: Labels | None = None,
    *,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
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
        null: how many null models, with the same layers in another order, the profiles over depth
            are held against; 19 or more, or 0 for no claim about depth.
        images: of the data, [n, channel, height, width] in [0, 1], whose spectrum is taken in place
            of the model's own samples'.
        image_labels: [n], the label of each, whose mean is taken off; by default they have one.
        name: of the model, for the sentences.
        resamples: of the pairs.
        progress: called with (done, total) images that have gone through the model once, those of
            clones estimated.
        batch: images that go through the model, or its VAE, at once; None is all.
        clones: whether the behaviour is also measured with clones; without them it is read in one
            pass only, and what is said of clones is NaN.
        labels: one a pair, each two times or more; by default classes or prompts in turn, from the
            first on, as many as leave two pairs or more to each.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

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
            `estimator_difference` [split], commitment by one pass less clones, in steps,
            `estimator_gap_difference` [], the same of the gap, and `estimator_band_difference` [],
            of the gap between the last band and the first, each with its `_interval`;
            `band_variance` [band] and `split_variance` [split], Var(predicted x0) / Var(finished
            image) where the clones commit, 1/2 for an exact denoiser, with `_interval`;
            `variance_ratio` [step, band], the same at every step, equal to the agreement for an
            exact denoiser.

            Data: `data_commitment` [split] and `data_gap` [], in steps, of an exact denoiser of the
            data's spectrum, and `beyond_data` [], the clones' gap less that, each with its
            `_interval`.

            Layers: `layer_commitment` [view, layer, split] and `layer_gap` [view, layer], in steps,
            the gap with `_interval`; `log_ratio` [energy, layer], log low less log high at the
            commitment step, with `_interval`; `layer_gap_together` [view, layer, bound] and
            `log_ratio_together` [energy, layer, bound], intervals that hold for all layers at
            once; `difference_energy` [channels, layer, step, split]
            and, at the commitment step, `difference_spectrum` [layer, token_frequency], the
            difference of twins as a share of their energy.

            Images, at most 128 pixels a side: `lens_image` [shown_layer, shown_step, channel, row,
            column], what the first image reads as in some layers at some steps; `end` [release,
            twin, shown, channel, row, column], the finished images of the first pairs of clones.

            With null models: `null_profile` [profile, null, layer], the same views of these;
            `late_share` [profile], what the last layers change as a share of the range over depth,
            of the model measured as its nulls are, and `null_late_share` [profile, null];
            `null_p` [profile], the share of models that have as much.

            Coordinates: `layer`, from -1, the embedding; `step`, 0 the noisiest; `release`, the
            clones' steps; `shown_layer` and `shown_step`, those of `lens_image`; `twin`, A and B;
            `band`, six or so, low to high; `split`, low and high; `estimator`, one_pass and clones;
            `view`, stream and lens; `energy`, ratio and growth; `profile`, all four; `null`, the
            null models; `channels`, how `dit_lens.probes.TwinDivergence` weighs channels;
            `quantity`, step, time (step / steps) and log_snr; `frequency` and `cut`, cycles per
            pixel; `token_frequency`, cycles per token (pooling: levels, eigen: ranks); `bound`, low
            and high.

            Attributes: `model`, `pairs`, `steps`, `seed`, `cut`, `bands`, as given; `labels`, of
            each pair, by number; `channels`, the weighing that the views use; `commitment_step`, of
            `log_ratio`; `vae`, whether one decodes the images; `spectrum_of`, whose spectrum
            `data_gap` is of; `null_pairs` and `null_steps`, with null models; for each of the four
            views `onset_{view}`, a sentence, `onset_layer_{view}`, -1 for none, and
            `onset_verdict_{view}`, "unclaimed" unless null models rarely change so late; the
            sentences `title`, `headline`, `estimators` and `data`, and `notes`, a line for each
            commitment that is missing or whose interval is cut off.

    Raises:
        InvalidValue: for too few pairs, steps or null models, unknown bands, a cut with no mode
            below or above it, or images that are not the model's.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = measure_gap(model, pairs=16, steps=4, resamples=50, name="digits")
    >>> found.layer_gap.sizes["layer"], "on digits low commits at step" in found.headline
    (29, True)
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
    steps = arguments.whole("steps", steps, 4, why="to see anything settle in")
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    arguments.choice("bands", bands, get_args(BandKind))
    arguments.optional(arguments.function, "feature", feature, "of images in [0, 1]")
    arguments.text("name", name)
    if nulls := checked_nulls(arguments.whole("null", null, 0)):
        # or it says why there is none, before anything is run
        shuffled_order(model.transformer, seed, model.family.blocks)
    known = None if images is None else as_latents(model, images)
    groups = _image_labels(image_labels, known)
    resamples = arguments.whole("resamples", resamples, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    releases = min(RELEASES, steps - 1) if arguments.flag("clones", clones) else 0
    chosen = chosen_labels(model, pairs, labels)
    runs = 4 if bands == "eigen" else 2
    # a clone's run is half as long as a twin's on average; so are the null models'
    each = PAIRS * (2 + NULL_RELEASES // 2) * min(steps, STEPS)
    count = _counting(
        pairs * steps * runs + releases * (pairs * steps // 2) + bool(nulls) * (nulls + 1) * each,
        progress,
    )

    # the modes of latents and stream; eigenmodes are those of other twins
    pilot = None
    if bands == "eigen":
        pilot = kept_twins(
            "other twins",
            model,
            pairs,
            chosen,
            steps=steps,
            seed=seed + 1,
            batch=batch,
            progress=lambda *_: count(2 * pairs),
        )
    modes = Modes.of(model, bands, cut, pilot)

    # one run of twins, seen by the probes, and clones of it
    outcomes = _outcomes(model, modes, cut, feature, batch)
    pair, seen, lensed, strip = _observed(
        model,
        modes,
        pairs,
        chosen,
        steps=steps,
        seed=seed,
        batch=batch,
        progress=lambda *_: count(2 * pairs),
    )
    ends: dict[int, list[Tensor]] = {}
    with once():
        # the spectrum is read in one pass only: its rings are too noisy to steer clones by
        one, sweep = one_pass(pair, outcomes), None
        if clones:
            sweep = release_sweep(
                pair,
                [*outcomes[1:], Streams.of_twins(pair, modes.token_split, batch)],
                releases,
                by=[outcome.name for outcome in outcomes[1:]],
                seed=seed,
                batch=batch,
                progress=lambda *_: count(pairs * steps // 2),
                each=lambda release, *both: ends.update({release: list(both)}),
                first=SHOWN,
            )

    x_t = one_pass(pair, [o for o in outcomes if o.name == "split"], "x_t")
    of_nulls = (
        [
            null_profiles(
                model,
                nulls,
                modes,
                labels=labels,
                steps=steps,
                seed=seed,
                batch=batch,
                progress=lambda _: count(each),
            )
        ]
        if nulls
        else []
    )
    enough()

    # when the finished image is decided, and how much of it the data's spectrum explains
    options = {"resamples": resamples, "seed": seed}
    behaviour = _behaviour(one, sweep, x_t, modes, options)
    of_data = data_gap(pair, sweep or one, modes.split, "split", known, groups, **options)
    decided = behaviour.split_commitment.sel(estimator="clones" if clones else "one_pass").values
    decided = decided[np.isfinite(decided)]
    # at step 0 the twins are one
    at = int(np.clip(np.round(decided.mean() if len(decided) else steps / 2), 1, steps - 1))

    # and in which layers
    commits = np.full((1 + resamples, modes.token_split.n * (model.cfg.n_layers + 1)), np.nan)
    if sweep is not None:
        commits = commitment_draws(
            sweep.stats["stream"], sweep.releases, sweep.log_snr, resamples=resamples, seed=seed
        )
    token_modes = modes.token_split, modes.token_spectrum
    values = profile_values(
        seen,
        lensed,
        commits,
        *token_modes,
        draws(pairs, resamples, seed),
        at,
    )
    layers, onsets = profiles(values, seen, *token_modes, pairs, steps, at)
    parts = [behaviour, of_data, layers, *of_nulls, pictures(model, strip, ends, batch)]
    sampler = SAMPLERS[pair.run.settings.scheduler]
    result = xr.merge(parts, combine_attrs="drop_conflicts").assign_attrs(
        model=name,
        pairs=pairs,
        steps=steps,
        seed=seed,
        cut=cut,
        bands=bands,
        channels=CHANNELS,
        commitment_step=at,
        labels=np.array(chosen),
        vae=int(model.vae is not None),
        spectrum_of="its own samples" if known is None else f"the {len(known)} images given",
        title=f"{name}: {model.cfg.n_layers} layers, {pairs} pairs of twins, {steps} steps of "
        f"{sampler} (eta 1); commitment in steps",
    )
    for view, found in onsets.items():
        result.attrs |= _onset_attrs(view, found)
    for view in VIEWS:
        _hold_against_null(result, view)
    result.attrs["headline"] = headline(result)
    result.attrs["data"] = data_sentence(result)
    return Result.of(result)


def _observed(
    model: HookedDiT, modes: Modes, pairs: int, chosen: Sequence[int], **settings: Any
) -> tuple[Twins, xr.Dataset, xr.Dataset, dict[str, Array]]:
    """Twins, how they differ in every layer, how every layer's stream reads, and that in images."""
    divergence = TwinDivergence(modes.token_split, fine=modes.token_spectrum)
    lens = LayerLens(modes.split)
    made: list[Twins] = []

    def run() -> dict[str, Array]:
        made.append(twins(model, pairs, chosen, probes=[divergence, lens], **settings))
        run = made[0].run
        seen, lensed = divergence.result(), lens.result(run.finished)
        strip = {f"strip {key}": value for key, value in lens_images(lens, run.batch).items()}
        return arrays_of(run) | flat(seen, "divergence") | flat(lensed, "lens") | strip

    (found,) = results([Piece("twins under observation", run)])
    pair = made[0] if made else Twins(run_of(found, model), pairs, 0, "noise", 0.0)
    strip = {key: found[f"strip {key}"] for key in ("images", "layers", "steps")}
    return pair, whole(found, "divergence"), whole(found, "lens"), strip


def _hold_against_null(found: xr.Dataset, view: str) -> None:
    """An onset is named only among the last layers, and where null models rarely change there."""
    attrs, claimed = found.attrs, False
    if "null_p" in found:
        layers = found.sizes["layer"] - 1  # beside the embedding
        rare = bool(found.null_p.sel(profile=view) <= 0.05)
        claimed = rare and attrs[f"onset_layer_{view}"] >= layers - last_layers(layers)
        attrs[f"onset_{view}"] = depth_sentence(view, TITLES[view], found)
    else:
        attrs[f"onset_{view}"] = NO_DEPTH
    if not claimed:
        attrs |= {f"onset_layer_{view}": -1, f"onset_verdict_{view}": "unclaimed"}


def _image_labels(labels: Sequence[int] | None, images: Tensor | None) -> list[int] | None:
    if labels is None:
        return None
    if images is None:
        raise InvalidValue("image_labels are given without images; expected both.")
    given = arguments.wholes("image_labels", labels, 0, 2**31)
    if len(given) != len(images):
        raise InvalidValue(
            f"There are {len(given)} image_labels for {len(images)} images; expected one each."
        )
    return given


def _counting(total: int, progress: Callable[[int, int], object] | None) -> Callable[[int], None]:
    """A function that adds to what is done, and tells `progress`."""
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    return count


# Behaviour


def _outcomes(
    model: HookedDiT,
    modes: Modes,
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
        images_of(model, modes.split if model.vae is None else None, "image", cut, batch),
        *([features(model, feature, batch=batch)] if feature else []),
    ]


def _behaviour(
    one: Curves, clones: Curves | None, x_t: Curves, modes: Modes, options: dict[str, Any]
) -> xr.Dataset:
    """Agreement, commitment and gap by both estimators; their difference's sentence and notes as
    attributes.
    """
    curves = {"one_pass": one} | ({} if clones is None else {"clones": clones})
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
                notes += [f"{ESTIMATORS[estimator].capitalize()}: {line}" for line in said if line]
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

    # one pass less clones, and the denoiser's quality; not known of one pass alone
    apart = {
        kind: commitment_difference(one, clones or one, kind, **options)
        for kind in ("split", "band")
    }
    if clones is None:
        for kind, alone in apart.items():
            alone["variance"], alone["variance_interval"] = (
                alone.commitment,
                alone.commitment_interval,
            )
            apart[kind] = (alone * np.nan).assign_attrs(sentence=ONE_PASS)
    for end, dims in (("", ()), ("_interval", ("bound",))):
        variables[f"estimator_difference{end}"] = (
            ("split", *dims),
            apart["split"][f"commitment{end}"].values,
        )
        variables[f"estimator_gap_difference{end}"] = (dims, apart["split"][f"gap{end}"].values)
        variables[f"estimator_band_difference{end}"] = (dims, apart["band"][f"gap{end}"].values)
        for kind, compared in apart.items():
            variables[f"{kind}_variance{end}"] = ((kind, *dims), compared[f"variance{end}"].values)
    coords = {
        "step": np.arange(len(one.log_snr)),
        "release": np.array(clones.releases if clones else [], dtype=np.int64),
        "band": list(modes.fine.names),
        "split": list(modes.split.names),
        "estimator": list(ESTIMATORS),
        "quantity": ["step", "time", "log_snr"],
        "bound": ["low", "high"],
        "frequency": modes.spectrum.middles(),
        "cut": list(modes.spectrum.edges[1:-1]),
    }
    attrs = {"estimators": apart["split"].attrs["sentence"], "notes": "\n".join(notes)}
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
    known = None if isinstance(found, str) or layer is None else found.interval
    ends = {} if known is None else {f"onset_interval_{view}": np.array(known)}
    return ends | {
        f"onset_{view}": message,
        f"onset_layer_{view}": -1 if layer is None else layer,
        f"onset_verdict_{view}": verdict,
    }
