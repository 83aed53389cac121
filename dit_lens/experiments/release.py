"""What twins still agree on at the end, as a function of the step at which they parted.

The same curve is estimated in three ways, and all are a `Curves`:

- `release_sweep`: part twins at chosen steps and run each of them to its end. With the noise tie
  these are clones; with the attention tie both twins run on alone from where they were when the
  coupling ended. Needs nothing of the model, costs a run for each release.
- `one_pass`: corr²(x0 predicted at a step, finished image) over ordinary runs. Clones released at
  x_t are independent draws from one posterior, so the covariance of the finished clones is
  Var(E[x0 | x_t]), whatever the data; an exact denoiser predicts that expectation, so this is the
  clones' curve. Costs nothing beyond the run, and gives every step.
- `there_and_back` (in a file of its own): noise finished images again up to a step and denoise
  them. Needs no noise of the sampler's, so it is there for deterministic ones and flows too.

What is compared is an `Outcome` of the finished latents (`dit_lens.experiments.outcomes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import Agreement, Contrasts, curve
from ..measures.bootstrap import draws, interval
from ..measures.commitment import commitment_draws, fit_commitment
from ..measures.estimate import Estimate
from ..pieces import Piece, results
from ..sampling.run import Run
from ..twinning.twins import Twins
from .outcomes import Outcome, Sides, compared, once, side, statistics
from .released import Released

SLACK = 0.01
"""A share of the run's steps: what the fitted logistic can make of nothing. A smaller difference of
two estimators is none of the model's (`tests/checks.py`, part `coverage`: exact curves differ by at
most 0.5 % of the steps).
"""
AT_ONCE = 10
"""So many steps of one pass are a piece of the measurement."""
RELEASES = 8
"""How many releases clones get where nobody says."""
MISFIT = 0.05
"""How far from 1/2 the predicted x0's share of the finished variance must surely be, at the step
where finished twins agree by 1/2, for the denoiser to be called wrong by it. An exact one's is 1/2
in any number of steps (on Gaussian data).
"""


@dataclass(frozen=True)
class Curves:
    """Agreement of finished twins by release step, for every outcome; what `one_pass`,
    `release_sweep` and `there_and_back` give.

    Attributes:
        estimator: "one_pass", "clones", "coupled" or "there_and_back".
        releases: [release], steps.
        log_snr: [step], of the whole run.
        stats: for each outcome's name its statistics [release, pair, band].
        bands: for each outcome's name its band names.
        model: the transformer that they come from.
        source: a digest of the finished latents, by which curves of the same runs are known.
        quantity: what one pass compared with the finished image.
        squared: whether it is the squared correlation that is the agreement.

    >>> import dit_lens
    >>> pair = dit_lens.twins(dit_lens.load("digits"), 8, [3] * 8, steps=4)
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> curves = one_pass(pair, [low_high])
    >>> curves.estimator, curves.releases, curves.bands
    ('one_pass', (0, 1, 2, 3), {'latents': ('low', 'high')})
    """

    estimator: str
    releases: tuple[int, ...]
    log_snr: Array
    stats: Mapping[str, Agreement]
    bands: Mapping[str, tuple[str, ...]]
    model: Any
    source: str
    quantity: Literal["x0", "x_t"] = "x0"
    squared: bool = False

    @classmethod
    def of(
        cls,
        estimator: str,
        releases: tuple[int, ...],
        run: Run,
        outcomes: Sequence[Outcome],
        stats: Mapping[str, Agreement],
        squared: bool = False,
    ) -> Curves:
        """From the statistics found.

        Args:
            estimator: "one_pass", "clones", "coupled" or "there_and_back".
            releases: steps.
            run: the twins' run.
            outcomes: what was compared.
            stats: by outcome, [release, pair, band].
            squared: whether it is the squared correlation that is the agreement.
        """
        return cls(
            estimator,
            releases,
            run.log_snr.numpy().astype(np.float64),
            stats,
            {o.name: o.band_names for o in outcomes},
            run.model.transformer,
            hashlib.sha256(run.latents[-1].float().cpu().numpy().tobytes()).hexdigest(),
            squared=squared,
        )

    def agreement(self, outcome: str) -> Array:
        """The agreement of the finished twins.

        Args:
            outcome: the name of one, such as "latents".

        Returns:
            Array: [release, band], from 0 (nothing shared beyond the label) to 1.

        Raises:
            InvalidValue: for an outcome that was not compared.
        """
        return curve(self.statistics(outcome), squared=self.squared)

    def commitment(
        self, outcome: str, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> xr.Dataset:
        """The commitment of every band and the gap, with intervals.

        Args:
            outcome: the name of one, such as "latents".
            resamples: of the pairs.
            seed: of the resamples.
            level: of the intervals.

        Returns:
            xr.Dataset: `commitment` [band, quantity], `gap` [quantity] and their `_interval`; all
                variables stand at `dit_lens.measures.commitment.fit_commitment`.

        Raises:
            InvalidValue: for an outcome that was not compared, or fewer than 8 pairs.
        """
        return fit_commitment(
            self.statistics(outcome),
            self.releases,
            self.log_snr,
            names=self.bands[outcome],
            squared=self.squared,
            resamples=resamples,
            seed=seed,
            level=level,
        )

    def statistics(self, outcome: str) -> Agreement:
        """The statistics of the finished twins.

        Args:
            outcome: the name of one, such as "latents".

        Returns:
            Agreement: [release, pair, band].

        Raises:
            InvalidValue: for an outcome that was not compared.
        """
        return self.stats[arguments.choice("outcome", outcome, self.stats)]


def one_pass(
    twins: Twins,
    outcomes: Sequence[Outcome],
    quantity: Literal["x0", "x_t"] = "x0",
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Curves:
    """corr²(`quantity` at step s, finished image) at every step s, from runs that were never tied.

    Both twins of a pair count; the pair is the unit that intervals resample.

    Args:
        twins: with release=0.
        outcomes: what to compare.
        quantity: "x0", the predicted clean image, which shows a decision earlier, or x_t itself.
        progress: called with (done, total) steps.

    Returns:
        Curves: a release at every step.

    Raises:
        InvalidValue: for twins that were tied, whose runs are not independent.

    >>> import dit_lens
    >>> pair = dit_lens.twins(dit_lens.load("digits"), 8, [3] * 8, steps=4)
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> one_pass(pair, [low_high]).agreement("latents").shape  # [step, band]
    (4, 2)
    """
    arguments.instance("twins", twins, Twins, "what dit_lens.twins gave")
    outcomes = compared(outcomes)
    arguments.choice("quantity", quantity, ["x0", "x_t"])
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    if twins.release:
        raise InvalidValue(
            f"These twins were tied up to step {twins.release}; one pass needs independent runs, "
            "release=0."
        )
    run = twins.run
    seen = run.x0 if quantity == "x0" else run.latents[:-1]
    contrasts = Contrasts(run.labels.tolist(), len(run.labels))
    with once():
        end: Sides = {}  # made once it is asked for

        def part(steps: range) -> dict[str, NDArray[Any]]:
            nonlocal end
            end = end or side(outcomes, run.latents[-1], contrasts)
            found: dict[str, list[Tensor]] = {o.name: [] for o in outcomes}
            for step in steps:
                x = seen[step]
                if step + 1 == len(seen) and torch.equal(x, run.latents[-1]):
                    x = run.latents[-1]  # decoded already
                for name, stats in statistics(outcomes, x, end, contrasts).items():
                    # both twins of a pair add up
                    found[name].append(stats.unflatten(1, (2, -1)).sum(1))
                if progress is not None:
                    progress(step + 1, len(seen))
            return {name: torch.stack(each, 1).cpu().numpy() for name, each in found.items()}

        spans = [range(s, min(s + AT_ONCE, len(seen))) for s in range(0, len(seen), AT_ONCE)]
        what = f"one pass on {quantity}, {', '.join(o.name for o in outcomes)}"
        parts = results([Piece(f"{what}, from step {s.start}", partial(part, s)) for s in spans])
    stacked = {
        o.name: Agreement(*np.concatenate([part[o.name] for part in parts], 1)) for o in outcomes
    }
    steps = tuple(range(run.settings.steps))
    curves = Curves.of("one_pass", steps, run, outcomes, stacked, squared=True)
    return replace(curves, quantity=quantity)


def release_sweep(
    twins: Twins,
    outcomes: Sequence[Outcome],
    releases: int | Sequence[int] = RELEASES,
    *,
    by: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    batch: int | None = None,
    each: Callable[[int, Tensor, Tensor], object] | None = None,
    first: int | None = None,
) -> Curves:
    """Agreement of finished twins for each of several releases of one tied run.

    Args:
        twins: with the noise tie, any release: twin A's run is the shared past. With the attention
            tie, twins that were never released, `twins(..., tie="attention", g=0.5,
            release=steps)`: from each release on, both run alone.
        outcomes: what to compare.
        releases: steps, or how many of them; a number is spent where the curves rise most steeply,
            by bisection.
        by: the names of the outcomes whose curves say where that is; by default all. With the same
            ones the same releases are chosen, whatever else is compared.
        seed: of the noise after the release.
        progress: called with (done, total) releases.
        batch: images that go through the model at once; None is all. Branches of different releases
            go together where it allows.
        each: called with (release, A, B), the finished latents of both twins.
        first: so many pairs are given to `each`, and kept with the pieces; None is all.

    Returns:
        Curves: the releases in increasing order.

    Raises:
        InvalidValue: for releases outside the run, fewer than 3, or twins that can't be released
            any more.

    >>> import dit_lens
    >>> tied = dit_lens.twins(
    ...     dit_lens.load("digits"), 8, [3] * 8, tie="attention", g=0.5, eta=1, steps=4, release=4
    ... )
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> release_sweep(tied, [low_high], [1, 2, 3]).agreement("latents").shape  # [release, band]
    (3, 2)
    """
    arguments.instance("twins", twins, Twins, "what dit_lens.twins gave")
    outcomes, seed = compared(outcomes), arguments.seed("seed", seed)
    names = [o.name for o in outcomes]
    steering = names if by is None else arguments.listed("by", by, "names of the outcomes")
    for name in steering:
        arguments.choice("by", name, names)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    arguments.optional(arguments.function, "each", each, "each(release, a, b)")
    steps = twins.run.settings.steps
    if twins.tie == "attention" and twins.release != steps:
        raise InvalidValue(
            f"These twins were released at step {twins.release}; a sweep needs them coupled "
            f"throughout, release={steps}."
        )
    planned = planned_releases(releases, steps)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    first = arguments.optional(arguments.whole, "first", first, 1)
    kept = 0 if each is None else twins.pairs if first is None else min(first, twins.pairs)
    released = Released(twins, outcomes, seed, batch, kept)
    found: dict[int, dict[str, Agreement]] = {}
    total = len(planned) if planned else arguments.whole("releases", releases)
    with once():
        released.check()

        def part_at(chosen: Sequence[int]) -> None:
            for release, stats, finished in released.at(chosen):
                found[release] = stats
                if each is not None:
                    each(release, *finished)
                if progress is not None:
                    progress(len(found), total)

        if planned:
            part_at(planned)
        while len(found) < total:
            seen = {
                r: np.concatenate([curve(of[name]) for name in steering]) for r, of in found.items()
            }
            part_at([steepest(seen, steps)])
    order = tuple(sorted(found))
    estimator = "clones" if released.clones else "coupled"
    stacked = {o.name: Agreement.stack([found[r][o.name] for r in order]) for o in outcomes}
    return Curves.of(estimator, order, twins.run, outcomes, stacked)


def planned_releases(releases: int | Sequence[int], steps: int) -> list[int]:
    """The releases that were asked for by step; none if only their number was.

    Args:
        releases: steps, or how many of them.
        steps: of the run.
    """
    if arguments.is_whole(releases):
        many = arguments.whole("releases", releases, 3, steps, "as many as a curve needs")
        return list(range(steps)) if many == steps else []
    planned = arguments.wholes("releases", releases, 0, steps - 1, fewest=3, why="steps of the run")
    return arguments.unlike("releases", planned)


def steepest(curves: Mapping[int, Array], steps: int) -> int:
    """The middle of the interval between releases over which some curve rises most; 0 and 1 are
    taken for the run's ends.

    Args:
        curves: by release, those that are known.
        steps: of the run.
    """
    ends = {-1: 0.0, steps: 1.0}
    known = sorted([*curves, *ends])
    rise = {}
    for left, right in zip(known, known[1:], strict=False):
        if right - left > 1:
            here, there = (curves.get(r, ends.get(r)) for r in (left, right))
            rise[(left + right) // 2] = float(
                np.nanmax(np.abs(np.asarray(there) - np.asarray(here)), initial=0.0)
            )
    return max(rise, key=lambda r: rise[r])


def commitment_difference(
    one: Curves, other: Curves, outcome: str, *, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How much later `one` puts the commitment of every band, and the gap, than `other`, in steps.

    One pass and clones estimate the same curve if the denoiser is exact, so a difference between
    them is an error of the model (or of a coarse sampler), never of the data. Where they share
    their runs the same pairs are resampled in both, so that what moves them together cancels.

    Two wrong estimates can agree, so the denoiser is also judged by Var(predicted x0) /
    Var(finished image) where the clones commit: the agreement itself, 1/2, if it predicts
    E[x0 | x_t].

    Args:
        one: curves of one estimator.
        other: of another, from runs of the same model and the same steps.
        outcome: the name of one that both have.
        resamples: of the pairs.
        seed: of the resamples.

    Returns:
        xr.Dataset: `commitment` [band], `gap`, in steps, and, of one pass on x0 less clones,
            `variance` [band], that ratio, each with its `_interval` [..., bound], 95 %;
            attrs["sentence"] says what they mean, attrs["paired"] whether the runs are shared.

    Raises:
        InvalidValue: for curves of different models, or of runs with other steps.

    >>> import dit_lens
    >>> pair = dit_lens.twins(dit_lens.load("digits"), 8, [3] * 8, steps=4)
    >>> low_high = [dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))]
    >>> curves = one_pass(pair, low_high), release_sweep(pair, low_high, 3)
    >>> commitment_difference(*curves, "latents", resamples=100).commitment.sizes["band"]
    2
    """
    for name, curves in (("one", one), ("other", other)):
        arguments.instance(name, curves, Curves, "what one_pass or release_sweep gave")
        arguments.choice("outcome", outcome, curves.stats)
    if one.model is not other.model:
        raise InvalidValue("The curves come from different models; compare curves of one.")
    if not np.array_equal(one.log_snr, other.log_snr):
        raise InvalidValue(
            f"The curves come from runs of {len(one.log_snr)} and {len(other.log_snr)} steps; "
            "expected the same steps."
        )
    paired = one.source == other.source
    steps = [
        commitment_draws(
            c.statistics(outcome),
            c.releases,
            c.log_snr,
            squared=c.squared,
            resamples=resamples,
            seed=seed if paired else seed + number,
        )
        for number, c in enumerate((one, other))
    ]

    # [1 + resample, band], and the gap behind the bands
    apart = steps[0] - steps[1]
    apart = np.concatenate([apart, apart[:, -1:] - apart[:, :1]], 1)
    rows = min(c.statistics(outcome).xy.shape[1] for c in (one, other))
    ends = interval(apart, rows)
    parts: dict[str, Any] = {
        "commitment": ("band", apart[0, :-1]),
        "commitment_interval": (("band", "bound"), ends[:-1]),
        "gap": ((), apart[0, -1]),
        "gap_interval": ("bound", ends[-1]),
    }
    if (one.estimator, one.quantity, other.estimator) == ("one_pass", "x0", "clones"):
        share = _variance_at(one.statistics(outcome), steps[1], resamples, seed)
        parts["variance"] = ("band", share[0])
        # a share has no end below 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.exp(interval(np.log(share), rows))
        parts["variance_interval"] = (("band", "bound"), ends)
    result = xr.Dataset(parts, {"band": list(one.bands[outcome]), "bound": ["low", "high"]})
    result.attrs |= {
        "paired": int(paired),
        "steps": len(one.log_snr),
        "pairs": one.statistics(outcome).xy.shape[1],
        "of": f"{one.estimator.replace('_', ' ')} less {other.estimator.replace('_', ' ')}",
    }
    result.attrs["sentence"] = difference_sentence(result)
    return result


def _variance_at(stats: Agreement, at: Array, resamples: int, seed: int) -> Array:
    """Var(predicted x0) / Var(finished image) at each draw's own step `at`, between steps
    interpolated, [1 + resample, band]; NaN where there is no step.
    """
    counts = draws(stats.xy.shape[1], resamples, seed)
    found = np.full_like(at, np.nan)
    for band in range(at.shape[1]):
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (counts @ stats.xx[..., band].T) / (counts @ stats.yy[..., band].T)
        steps = np.arange(ratio.shape[1])
        for draw in np.flatnonzero(np.isfinite(at[:, band])):
            found[draw, band] = np.interp(at[draw, band], steps, ratio[draw])
    return found


def difference_sentence(result: xr.Dataset) -> str:
    """What two estimators' difference says of the denoiser.

    Args:
        result: of `commitment_difference`.
    """

    def of(name: str) -> dict[str, Estimate]:
        return {
            str(band): Estimate.of(value, ends)
            for band, value, ends in zip(
                result.band.values,
                result[name].values,
                result[f"{name}_interval"].values,
                strict=True,
            )
        }

    found, slack = of("commitment"), SLACK * result.attrs["steps"]
    shares = of("variance") if "variance" in result else {}
    gap = Estimate.of(result.gap, result.gap_interval)
    compared = found | {"the gap": gap}
    differing = [name for name, e in compared.items() if e.sign and abs(e.value) > slack]
    wrong = [b for b, e in shares.items() if e.low > 0.5 + MISFIT or e.high < 0.5 - MISFIT]
    known = [e for e in found.values() if e.known]

    # the difference is evidence against exactness, and never for it
    judged = "measurably not the exact one"
    if not known:
        verdict = (
            "no band has both with an interval, so this difference says nothing about the denoiser"
        )
    elif differing:
        verdict = (
            f"they differ in {', '.join(differing)} (0 is outside the interval and the "
            f"estimate beyond {slack:g} steps, 1 % of the run): the denoiser is {judged} there"
        )
    elif len(known) < len(found):
        verdict = "some bands can't be compared; in the others no difference can be told"
    else:
        reach = max(max(abs(e.low), abs(e.high)) for e in found.values())
        verdict = (
            f"no difference above {slack:g} steps (1 % of the run) can be told with "
            f"{result.attrs['pairs']} pairs, and one of up to "
            f"{reach:.1f} steps is not excluded"
        )
    share = ", ".join(f"{b} {e:.2f}" for b, e in shares.items() if e.known)
    if share:
        verdict += (
            f". Where clones commit, the predicted x0 has this share of the finished image's "
            f"variance: {share}; an exact denoiser's has 0.50"
        )
    if wrong:
        verdict += (
            f", so by this the denoiser is {judged} in {', '.join(wrong)} (the interval lies more "
            f"than {MISFIT:g} from 0.50)"
        )
    bands = ", ".join(f"{band} {e:+.1f}" for band, e in found.items())
    return f"Commitment by {result.attrs['of']}, in steps: {bands}, the gap {gap:+.1f}; {verdict}."
