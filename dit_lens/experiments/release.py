"""What twins still agree on at the end, as a function of the step at which they parted.

The same curve is estimated in two ways, and both are a `Curves`:

- `release_sweep`: part twins at chosen steps and run each of them to its end. With the noise tie
  these are clones; with the attention tie both twins run on alone from where they were when the
  coupling ended. Needs nothing of the model, costs a run for each release.
- `one_pass`: corr²(x0 predicted at a step, finished image) over ordinary runs. Clones released at
  x_t are independent draws from one posterior, so the covariance of the finished clones is
  Var(E[x0 | x_t]), whatever the data; an exact denoiser predicts that expectation, so this is the
  clones' curve. Costs nothing beyond the run, and gives every step.

What is compared is an `Outcome` of the finished latents (`dit_lens.experiments.outcomes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.agreement import Agreement, curve
from ..measures.commitment import fit_commitment
from ..measures.estimate import Estimate
from ..sampling.run import Run
from ..twinning.twins import Twins, twin_seeds
from .outcomes import Outcome, compared

SLACK = 0.5
"""Steps: what the sampler's finite steps and the fitted logistic can make of nothing. A smaller
difference is none of the model's.
"""


@dataclass(frozen=True)
class Curves:
    """Agreement of finished twins by release step, for every outcome; what `one_pass` and
    `release_sweep` give.

    Attributes:
        estimator: "one_pass", "clones" or "coupled".
        releases: [release], steps.
        log_snr: [step], of the whole run.
        stats: for each outcome's name its statistics [release, pair, band].
        bands: for each outcome's name its band names.
        groups: how many labels' means were taken off.
        model: the transformer that they come from.

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
    groups: int
    model: Any

    @classmethod
    def of(
        cls,
        estimator: str,
        releases: tuple[int, ...],
        run: Run,
        outcomes: Sequence[Outcome],
        found: Sequence[Mapping[str, Agreement]],
    ) -> Curves:
        """From the statistics found at each release.

        Args:
            estimator: "one_pass", "clones" or "coupled".
            releases: steps.
            run: the twins' run.
            outcomes: what was compared.
            found: for each release its statistics [pair, band] by outcome.
        """
        return cls(
            estimator,
            releases,
            run.log_snr.numpy().astype(np.float64),
            {o.name: Agreement.stack([stats[o.name] for stats in found]) for o in outcomes},
            {o.name: o.band_names for o in outcomes},
            len(set(run.labels.tolist())),
            run.model.transformer,
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
        return curve(self._stats(outcome), squared=self.estimator == "one_pass")

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
            self._stats(outcome),
            self.releases,
            self.log_snr,
            names=self.bands[outcome],
            groups=self.groups,
            squared=self.estimator == "one_pass",
            resamples=resamples,
            seed=seed,
            level=level,
        )

    def _stats(self, outcome: str) -> Agreement:
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
    >>> pair = dit_lens.twins(dit_lens.load("digits"), 8, [3] * 8, steps=6)
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> one_pass(pair, [low_high]).agreement("latents").shape  # [step, band]
    (6, 2)
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
    run, groups = twins.run, twins.run.labels.tolist()
    seen = run.x0 if quantity == "x0" else run.latents[:-1]
    found = []
    for done, x in enumerate(seen, start=1):
        found.append({o.name: _by_pair(o.compare(x, run.latents[-1], groups)) for o in outcomes})
        if progress is not None:
            progress(done, len(seen))
    return Curves.of("one_pass", tuple(range(run.settings.steps)), run, outcomes, found)


def release_sweep(
    twins: Twins,
    outcomes: Sequence[Outcome],
    releases: int | Sequence[int] = 8,
    *,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Curves:
    """Agreement of finished twins for each of several releases of one tied run.

    Args:
        twins: with the noise tie, any release: twin A's run is the shared past. With the attention
            tie, twins that were never released, `twins(..., tie="attention", release=steps)`: from
            each release on, both run alone.
        outcomes: what to compare.
        releases: steps, or how many of them; a number is spent where the curves rise most steeply,
            by bisection.
        seed: of the noise after the release.
        progress: called with (done, total) releases.

    Returns:
        Curves: the releases in increasing order.

    Raises:
        InvalidValue: for releases outside the run, fewer than 3, or twins that can't be released
            any more.

    >>> import dit_lens
    >>> tied = dit_lens.twins(
    ...     dit_lens.load("digits"), 8, [3] * 8, tie="attention", g=0.5, eta=1, steps=6, release=6
    ... )
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> release_sweep(tied, [low_high], [1, 3, 5]).agreement("latents").shape  # [release, band]
    (3, 2)
    """
    arguments.instance("twins", twins, Twins, "what dit_lens.twins gave")
    outcomes, seed = compared(outcomes), arguments.seed("seed", seed)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    steps = twins.run.settings.steps
    if twins.tie == "attention" and twins.release != steps:
        raise InvalidValue(
            f"These twins were released at step {twins.release}; a sweep needs them coupled "
            f"throughout, release={steps}."
        )
    planned = _planned(releases, steps)
    a, b = twins.a, twins.b
    labels = a.labels.tolist()
    for each in outcomes:  # bands of another grid are refused before anything is run
        each.compare(a.latents[-1], b.latents[-1], labels)
    found: dict[int, dict[str, Agreement]] = {}

    def part_at(release: int) -> None:
        own = a.seeds_at(steps - 1)
        fresh = twin_seeds(seed + 1_000_003 * (release + 1), twins.pairs)[1]
        if twins.tie == "noise":  # twin A's future is already there
            ends = a.latents[-1], a.replay(release, seeds=fresh).latents[-1]
        else:
            ends = (
                a.replay(release, seeds=own, released=True).latents[-1],
                b.replay(release, seeds=fresh, released=True).latents[-1],
            )
        found[release] = {o.name: o.compare(*ends, labels) for o in outcomes}

    total = len(planned) if planned else arguments.whole("releases", releases)
    while len(found) < total:
        if planned:
            part_at(planned[len(found)])
        else:
            seen = {r: np.concatenate([curve(s) for s in of.values()]) for r, of in found.items()}
            part_at(_steepest(seen, steps))
        if progress is not None:
            progress(len(found), total)
    order = tuple(sorted(found))
    estimator = "clones" if twins.tie == "noise" else "coupled"
    return Curves.of(estimator, order, twins.run, outcomes, [found[r] for r in order])


def _planned(releases: int | Sequence[int], steps: int) -> list[int]:
    """The releases that were asked for by step; none if only their number was."""
    if arguments.is_whole(releases):
        arguments.whole("releases", releases, 3, steps, "as many as a curve needs")
        return []
    planned = arguments.wholes("releases", releases, 0, steps - 1, fewest=3, why="steps of the run")
    return arguments.unlike("releases", planned)


def _steepest(curves: Mapping[int, Array], steps: int) -> int:
    """The middle of the interval between releases over which some curve rises most; 0 and 1 are
    taken for the run's ends.
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


def _by_pair(stats: Agreement) -> Agreement:
    """Both twins' statistics added up: [A | B, band] -> [pair, band]."""
    return Agreement(*(part.reshape(2, -1, part.shape[-1]).sum(0) for part in stats))


def commitment_difference(
    one: Curves, other: Curves, outcome: str, *, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How much later `one` puts the commitment of every band, and the gap, than `other`, in steps.

    One pass and clones estimate the same curve if the denoiser is exact, so a difference between
    them is an error of the model (or of a coarse sampler), never of the data. The intervals are
    made as if the two were independent: where they share runs they move together, and the intervals
    are too wide.

    Args:
        one: curves of one estimator.
        other: of another, from runs of the same model and the same steps.
        outcome: the name of one that both have.
        resamples: of the pairs.
        seed: of the resamples.

    Returns:
        xr.Dataset: `commitment` [band], `gap`, and their `_interval` [..., bound], 95 %;
            attrs["sentence"] says what they mean.

    Raises:
        InvalidValue: for curves of different models, or of runs with other steps.

    >>> import dit_lens
    >>> pair = dit_lens.twins(dit_lens.load("digits"), 8, [3] * 8, steps=6)
    >>> low_high = [dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))]
    >>> curves = one_pass(pair, low_high), release_sweep(pair, low_high, 4)
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
    fits = [
        c.commitment(outcome, resamples=resamples, seed=seed).sel(quantity="step")
        for c in (one, other)
    ]

    # the bounds of a difference from those of its terms
    parts: dict[str, Any] = {}
    for name in ("commitment", "gap"):
        dims = fits[0][name].dims
        value = fits[0][name].values - fits[1][name].values
        down, up = (
            np.abs(
                np.stack([f[f"{name}_interval"].values[..., side] - f[name].values for f in fits])
            )
            for side in (0, 1)
        )
        ends = np.stack([value - np.hypot(down[0], up[1]), value + np.hypot(up[0], down[1])], -1)
        parts[name], parts[f"{name}_interval"] = (dims, value), ((*dims, "bound"), ends)
    result = xr.Dataset(parts, coords={"band": fits[0].band.values, "bound": ["low", "high"]})

    # the sentence
    found = {
        str(band): Estimate.of(value, ends)
        for band, value, ends in zip(
            result.band.values,
            result.commitment.values,
            result.commitment_interval.values,
            strict=True,
        )
    }
    apart = [band for band, e in found.items() if abs(e.value) > SLACK and e.sign]
    if not any(e.known for e in found.values()):
        verdict = "no band commits in both estimates, so nothing can be said about the denoiser."
    elif apart:
        verdict = (
            f"they differ in {', '.join(apart)}: the denoiser is measurably not the exact one "
            "there."
        )
    else:
        verdict = (
            f"no band differs: by this measure, with {one.stats[outcome].xy.shape[1]} pairs, the "
            "denoiser can't be told from an exact one."
        )
    bands = ", ".join(f"{band} {e:+.1f}" for band, e in found.items())
    what = f"Commitment by {one.estimator.replace('_', ' ')} less {other.estimator}"
    result.attrs["sentence"] = f"{what}, in steps: {bands}; {verdict}"
    return result
