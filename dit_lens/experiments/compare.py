"""What a change to a model does: for the same seeds, another model (an adapter loaded, other
weights, another type of numbers) or a reuse plan beside the model as it was.

Users ask of every cache and quantisation whether what comes out is a different sample or a worse
one. How far the finished image moves says only the first. For the second the unchanged model is the
judge: finished images are noised again and it predicts them. Images that it would itself have drawn
it predicts with the error that it has on its own; worse ones, with a larger error, unless they are
smoother, which the power in the bands shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import Agreement, Places, agreement, not_alone
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, interval, simultaneous
from ..measures.commitment import commitment_draws
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..model.noise_schedule import clips, predict_x0, signal_and_noise
from ..patching.measure import energy
from ..pieces import Engine, enough, measured
from ..plans.plan import Plan
from ..plans.runner import reuse
from ..sampling.kept import kept_run
from ..sampling.loop import model_output, prepared
from ..sampling.noise import generators
from ..sampling.run import Run, require_finite
from ..sampling.sample import sample
from ..sampling.schedulers import default_name
from ..sampling.settings import Settings, checked_settings
from .reuse_plan import require_other_samples
from .spread import Spread, item_labels, log_interval

SAME = 0.01
"""A finished image that moves by less than this share of a stranger's distance is the same one."""
LEVELS = (0.25, 0.5, 0.75)
"""Where in the run finished images are noised to, to be judged."""


@measured
def compare(
    model: HookedDiT,
    changed: HookedDiT | Plan,
    *,
    items: int = 64,
    labels: Labels | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    cut: float = CUT,
    seed: int = 0,
    resamples: int = 1000,
    batch: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> xr.Dataset:
    """What a change does to the finished images, to commitment and to the gap, for the same seeds.

    Args:
        model: the model as it was, with a scheduler.
        changed: the changed model, of the same latents and conditions; or a plan that it is run
            under.
        items: samples, at least 8 more than labels.
        labels: one an item; by default the model's conditions in turn.
        steps: of denoising; those of a plan must be its own.
        guidance: strength of classifier-free guidance.
        scheduler: as for `dit_lens.sample`.
        eta: as for `dit_lens.sample`.
        cut: between low and high, in cycles per pixel of the latents.
        seed: of the samples and the bootstrap; a plan must not have been made from these samples.
        resamples: of the items.
        batch: images that go through the model at once; None is all.
        progress: called with the steps done, and in all.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `effect` [band], E_b of `cause_map`; `power` [band], the energy of the finished
            latents over what it was; `error` [band], the unchanged model's error in predicting them
            from noise over that on its own; `commitment` [model, band] in steps and `later` [band],
            by how many steps the change puts it off; `gap` [model] and `gap_moved`, in steps; each
            with its `_interval` [..., bound], 95 %, those of `power` and `error` for all at once.
            attrs["verdict"] is "same", "different" or "worse" and attrs["sentence"] says why;
            attrs["alone"] counts items whose label no other has, which commitment and the gap leave
            out, since a label's mean is taken off.

    Raises:
        InvalidValue: for a changed model of other latents or conditions, a plan of another model or
            of other steps, too few items, or latents that are not finite.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> times = dit_lens.sample(model, [1], steps=4).timesteps
    >>> plan = dit_lens.experiments.Plan.of(model, times, [])
    >>> compare(model, plan, items=10, steps=4, resamples=50).attrs["verdict"]
    'same'
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    arguments.instance("changed", changed, (HookedDiT, Plan), "a HookedDiT or a Plan")
    items = arguments.whole("items", items, FEWEST_PAIRS, why="for an interval")
    steps = arguments.whole("steps", steps, 2)
    seed, resamples = arguments.seed("seed", seed), arguments.whole("resamples", resamples, 1)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    if isinstance(changed, HookedDiT):
        for what in ("latent_shape", "n_classes"):
            ours, theirs = getattr(model.cfg, what), getattr(changed.cfg, what)
            if ours != theirs:
                raise InvalidValue(
                    f"The changed model's {what} is {theirs}, this one's {ours}; expected a change "
                    "of the same model."
                )
    if isinstance(changed, Plan):
        require_other_samples(changed, seed, items)
    own = item_labels(model, items, labels)
    kinds = len(set(own))
    if items - kinds < FEWEST_PAIRS:
        raise InvalidValue(
            f"items={items} of {kinds} labels leave {items - kinds} to compare within labels; "
            f"expected {FEWEST_PAIRS + kinds} or more, for an interval."
        )
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    tell = None if progress is None else lambda done, _: progress(done, 2 * steps)
    also = None if progress is None else lambda done, _: progress(steps + done, 2 * steps)
    name = default_name(model.scheduler) if scheduler is None else scheduler
    settings = (own, seed, steps, guidance, name, eta)
    if isinstance(changed, HookedDiT):
        _require_same_noise(model, changed, checked_settings(steps, guidance, "all", name, eta))

    def as_it_was() -> Run:
        return sample(model, *settings, progress=tell, batch=batch)

    def with_the_change() -> Run:
        if isinstance(changed, Plan):
            with reuse(model, changed):
                return sample(model, *settings, progress=also, batch=batch)
        words = model.conditions.words(own)
        return sample(changed, words, *settings[1:], progress=also, batch=batch)

    of = model if isinstance(changed, Plan) else changed
    plain = kept_run("the model as it was", as_it_was, model, name)
    other = kept_run("with the change", with_the_change, of, name)
    enough()
    require_finite(plain, "the model as it was")
    require_finite(other, "the changed model")
    result = compared_runs(plain, other, bands, seed, resamples)
    result.attrs |= {"items": items, "steps": steps, "seed": seed, "cut": cut, "level": 0.95}
    return result


def _require_same_noise(model: HookedDiT, changed: HookedDiT, settings: Settings) -> None:
    """Raise InvalidValue where the changed model is sampled at other noise levels, or clipped."""
    schedulers = [prepared(each, settings) for each in (model, changed)]
    ours, other = map(clips, schedulers)
    if ours != other:
        raise InvalidValue(
            f"{'Only this' if ours else 'Only the changed'} model's scheduler clips the predicted "
            "x0; expected one scheduler for both: "
            "HookedDiT(transformer, scheduler=model.scheduler)."
        )
    own, theirs = (scheduler.levels for scheduler in schedulers)
    if not np.allclose(own, theirs):
        raise InvalidValue(
            f"The changed model's noise levels are others: log SNR goes from {theirs[0]:.2f} to "
            f"{theirs[-1]:.2f}, this one's from {own[0]:.2f} to {own[-1]:.2f}; expected one "
            "scheduler for both: HookedDiT(transformer, scheduler=model.scheduler)."
        )


def compared_runs(
    plain: Run, other: Run, bands: Bands, seed: int = 0, resamples: int = 1000
) -> xr.Dataset:
    """The same of two runs: what the second is beside the first, whose model is the judge.

    Args:
        plain: of the unchanged model.
        other: item by item what became of it.
        bands: of the latents' grid.
        seed: of the noise and the bootstrap.
        resamples: of the items.
    """
    items, labels = len(plain.labels), plain.labels.cpu().numpy()
    kept = not_alone(labels)
    counts = draws(items, resamples, seed)
    apart = (other.finished - plain.finished).double()
    spread = Spread(plain, bands, counts)
    effect = spread.relative(energy(apart, bands)[None])[:, 0]

    # What the images are like: their power, and the unchanged model's error on them.
    ratios = []
    for measure in (_power, _error):
        of_plain, of_other = (measure(plain, each.finished, bands, seed) for each in (plain, other))
        ratios.append((counts @ of_other) / (counts @ of_plain))
    with np.errstate(divide="ignore"):
        logs = np.log(np.concatenate(ratios, 1))  # [1 + resample, power and error by band]
    together = np.exp(simultaneous(logs, items)).reshape(2, bands.n, 2)

    # When each band is decided, item by item the same.
    commitment = np.stack(
        [_commitment(run, bands, labels, kept, resamples, seed) for run in (plain, other)]
    )  # [model, 1 + resample, band]
    rows = len(kept) - len(np.unique(labels[kept]))
    moved = commitment[1] - commitment[0]
    gaps = commitment[..., -1] - commitment[..., 0]

    ends = ("bound",)
    result = xr.Dataset(
        {
            "effect": ("band", effect[0]),
            "effect_interval": (("band", *ends), log_interval(effect, items)),
            "power": ("band", ratios[0][0]),
            "power_interval": (("band", *ends), together[0]),
            "error": ("band", ratios[1][0]),
            "error_interval": (("band", *ends), together[1]),
            "commitment": (("model", "band"), commitment[:, 0]),
            "commitment_interval": (
                ("model", "band", *ends),
                np.stack([interval(each, rows) for each in commitment]),
            ),
            "later": ("band", moved[0]),
            "later_interval": (("band", *ends), interval(moved, rows)),
            "gap": ("model", gaps[:, 0]),
            "gap_interval": (("model", *ends), np.stack([interval(each, rows) for each in gaps])),
            "gap_moved": ((), gaps[1, 0] - gaps[0, 0]),
            "gap_moved_interval": (ends, interval(gaps[1] - gaps[0], rows)),
        },
        coords={
            "band": list(bands.names),
            "model": ["plain", "changed"],
            "bound": ["low", "high"],
        },
    )
    result.attrs |= {"verdict": _verdict(result), "alone": items - len(kept)}
    result.attrs["sentence"] = "\n".join(sentences(result))
    return result


def _power(_: Run, finished: Tensor, bands: Bands, __: int) -> Array:
    """The energy in each band, [item, band]."""
    return energy(finished, bands)


def _error(judge: Run, finished: Tensor, bands: Bands, seed: int) -> Array:
    """The squared error of the judge's predictions of finished latents from noise, [item, band], a
    sum over levels of noise; the noise of an item is the same for all that is judged.
    """
    model, steps = judge.model, judge.settings.steps
    found: Array = np.zeros((len(finished), bands.n))
    for level in LEVELS:
        step = min(steps - 1, round(level * steps))
        drawn = [
            torch.randn(finished.shape[1:], generator=generators([seed], 1000 * step + item)[0])
            for item in range(len(finished))
        ]
        scheduler = judge.fresh_scheduler()
        t = judge.timesteps[step]
        signal, noise = (float(f) for f in signal_and_noise(scheduler, t.reshape(1)))
        x = signal * finished + noise * torch.stack(drawn).to(finished)
        outputs, at_once = [], max(1, (judge.batch or len(x) * judge.passes) // judge.passes)
        with torch.no_grad():
            for part, labels in zip(x.split(at_once), judge.labels.split(at_once), strict=True):
                outputs.append(model_output(model, part, step, labels, judge.settings, scheduler))
        output = torch.cat(outputs)
        x0 = predict_x0(scheduler, x, model.without_variance(output), t)
        found += energy(x0 - finished, bands)
    return found


def _commitment(
    run: Run, bands: Bands, labels: Array, kept: Places, resamples: int, seed: int
) -> Array:
    """When each band of the kept items is decided, [1 + resample, band], in steps, by one pass."""
    final = run.finished[kept]
    stats = [agreement(x0[kept], final, bands, labels[kept]) for x0 in map(run.here, run.x0)]
    return commitment_draws(
        Agreement.stack(stats).independent(),
        range(run.settings.steps),
        run.log_snr.numpy(),
        squared=True,
        resamples=resamples,
        seed=seed,
    )


def _verdict(result: xr.Dataset) -> str:
    """ "same", "different" or "worse"."""
    if (result.effect_interval.sel(bound="high") < SAME).all():
        return "same"
    low, high = (result.error_interval.sel(bound=end) for end in ("low", "high"))
    power_low, power_high = (result.power_interval.sel(bound=end) for end in ("low", "high"))
    worse = (low > 1).any() or (power_low > 1).any() or (power_high < 1).any()
    return "worse" if worse else "different"


VERDICTS = {
    "same": "The same images",
    "different": "Different images, and none the worse as far as can be told",
    "worse": "Different images, and worse ones as the unchanged model judges",
}


def sentences(result: xr.Dataset) -> list[str]:
    """Whether it is the same image, a different one or a worse one, and why; and what became of
    commitment and the gap.

    Args:
        result: of `compare`.
    """

    def each(name: str, form: str, known: bool = False) -> str:
        bands = [
            (band, Estimate.of(result[name][b], result[f"{name}_interval"][b]))
            for b, band in enumerate(result.band.values)
        ]
        return ", ".join(f"{band} {e:{form}}" for band, e in bands if e.known or not known)

    verdict = VERDICTS[str(result.attrs["verdict"])]
    gap = Estimate.of(result.gap_moved, result.gap_moved_interval)
    found = [
        f"{verdict}: they move by {each('effect', '.2g')} (1: a stranger's distance); their power "
        f"is {each('power', '.3g')} times what it was, and the unchanged model's error in "
        f"predicting them {each('error', '.3g')} times that on its own (95 % for all at once).",
    ]
    if later := each("later", ".2f", known=True):
        found.append(f"Bands are decided later by {later} steps.")
    if gap.known:
        way = ["stays, as far as can be told", "grows", "shrinks"][gap.sign]
        found.append(
            f"The gap {way}: {Estimate.of(result.gap[0], result.gap_interval[0]):.1f} steps, and "
            f"{Estimate.of(result.gap[1], result.gap_interval[1]):.1f} with the change, "
            f"{gap:+.2f steps} more."
        )
    if alone := int(result.attrs["alone"]):
        found.append(f"{alone} of the items, alone with their label, say nothing of these steps.")
    return found
