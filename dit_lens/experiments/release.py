"""What twins still agree on at the end, as a function of the step at which they parted.

The same curve is estimated in two ways (design, section 5), and both are a `Curves`:

- `release_sweep`: part twins at chosen steps and run each of them to its end. With the noise tie
  these are clones; with the attention tie both twins run on alone from where they were when the
  coupling ended. Needs nothing of the model, costs a run for each release.
- `one_pass`: corr²(x0 predicted at a step, finished image) over ordinary runs. For an exact
  denoiser it is the clones' curve, since clones released at x_t are independent draws from one
  posterior. Costs nothing beyond the run, and gives every step.

What is compared is a `Reading` of the finished latents: the latents themselves by band, the images,
or features of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue
from ..measures.bands import CUT, Bands
from ..measures.commitment import Agreement, agreement, curve, fit_commitment
from ..model.hooked import HookedDiT
from ..sampling.run import Run, decode
from ..twinning.twins import Twins, twin_seeds

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]
SLACK = 0.5
"""Steps.

What the sampler's finite steps and the fitted logistic can make of nothing; a smaller difference is
none of the model's.
"""


@dataclass(frozen=True, eq=False)
class Reading:
    """What of finished twins is compared: `of` maps latents [n, c, h, w] to fields or features,
    `bands` splits the fields.

    Make one with `latents`, `images` or `features`; without `bands`, features of any shape count as
    one band.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    bands: Bands | None

    @property
    def band_names(self) -> tuple[str, ...]:
        return self.bands.names if self.bands else (self.name,)

    def compare(self, a: Tensor, b: Tensor, groups: Sequence[int]) -> Agreement:
        """Agreement statistics of finished latents a and b, [pair, band], without each group's
        mean.
        """
        return agreement(self.of(a), self.of(b), self.bands, groups)


def latents(bands: Bands, name: str = "latents") -> Reading:
    """The latents as they are, by band of their pixel grid."""
    return Reading(name, lambda x: x, bands)


def images(
    model: HookedDiT, bands: Bands | None = None, name: str = "images", cut: float = CUT
) -> Reading:
    """The images that the latents decode to (through the VAE where there is one), by band.

    By default low and high, parted at `cut` cycles per pixel of the latents, so that the same waves
    are low in both.
    """

    def of(x: Tensor) -> Tensor:
        return decode(model, x)

    if bands is None:
        side = of(torch.zeros(1, *model.cfg.latent_shape)).shape[-1]
        bands = Bands.radial((side, side), cut=cut * model.cfg.pixels[0] / side)
    return Reading(name, of, bands)


def features(
    model: HookedDiT, function: Callable[[Tensor], Tensor], name: str = "features"
) -> Reading:
    """What `function` (a classifier, DINO) makes of the images [n, channel, height, width] in [0,
    1]: [n, ...], one band.

    Raises:
        ValueError: when read, if it gives anything but n rows of finite numbers.
    """

    def of(x: Tensor) -> Tensor:
        with torch.no_grad():
            found = function(decode(model, x))
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            got = (
                f"shape {list(found.shape)}"
                if isinstance(found, Tensor)
                else f"a {type(found).__name__}"
            )
            raise InvalidValue(
                f"The feature function gave {got} for {len(x)} images; expected a tensor "
                f"[{len(x)}, feature]."
            )
        if not found.isfinite().all():
            raise InvalidValue(
                f"The feature function gave values that are not finite for {len(x)} images."
            )
        return found.flatten(1)

    return Reading(name, of, None)


@dataclass(frozen=True)
class Curves:
    """Agreement of finished twins by release step, for every reading.

    Attributes:
        estimator: "one_pass", "clones" or "coupled".
        releases: [release], steps.
        log_snr: [step], of the whole run.
        stats: for each reading's name its statistics [release, pair, band].
        bands: its band names.
        groups: how many labels' means were taken off.
        model: the transformer that they come from.
    """

    estimator: str
    releases: tuple[int, ...]
    log_snr: Array
    stats: Mapping[str, Agreement]
    bands: Mapping[str, tuple[str, ...]]
    groups: int
    model: Any

    def agreement(self, reading: str) -> Array:
        """The curve, [release, band], from 0 (nothing shared beyond the label) to 1."""
        return curve(self._stats(reading), squared=self.estimator == "one_pass")

    def commitment(
        self, reading: str, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> xr.Dataset:
        """Commitment and gap with intervals; see `dit_lens.measures.commitment.fit_commitment`."""
        return fit_commitment(
            self._stats(reading),
            self.releases,
            self.log_snr,
            names=self.bands[reading],
            groups=self.groups,
            squared=self.estimator == "one_pass",
            resamples=resamples,
            seed=seed,
            level=level,
        )

    def _stats(self, reading: str) -> Agreement:
        if reading not in self.stats:
            raise InvalidValue(
                f"There is no reading {reading!r} here; these curves have {list(self.stats)}."
            )
        return self.stats[reading]


def one_pass(
    twins: Twins,
    readings: Sequence[Reading],
    quantity: Literal["x0", "x_t"] = "x0",
) -> Curves:
    """corr²(`quantity` at step s, finished image) at every step s, from runs that were never tied:
    `twins(..., release=0)`.

    `quantity` is the predicted clean image, which shows a decision earlier, or x_t itself. Both
    twins of a pair count; the pair is the unit that intervals resample. Raises ValueError for twins
    that were tied, whose runs are not independent.

        pair = dit_lens.twins(model, pairs=32)
        one_pass(pair, [latents(Bands.radial((16, 16)))]).agreement("latents")       # [step, band]
    """
    if twins.release:
        raise InvalidValue(
            f"These twins were tied up to step {twins.release}; one pass needs independent runs, "
            "release=0."
        )
    run, groups = twins.run, twins.run.labels.tolist()
    seen = run.x0 if quantity == "x0" else run.latents[:-1]
    stats = {
        r.name: Agreement.stack([_by_pair(r.compare(x, run.latents[-1], groups)) for x in seen])
        for r in readings
    }
    return Curves("one_pass", tuple(range(run.settings.steps)), *_about(run, readings, stats))


def release_sweep(
    twins: Twins,
    readings: Sequence[Reading],
    releases: int | Sequence[int] = 8,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Curves:
    """Agreement of finished twins for each of several releases of one tied run.

    Args:
        twins: with the noise tie, any release: twin A's run is the shared past. With the attention
            tie, twins that were never released, `twins(..., tie="attention", release=steps)`: from
            each release on, both run alone.
        releases: steps, or how many of them; a number is spent where the curves rise most steeply,
            by bisection.
        seed: of the noise after the release.
        progress: called with the forwards (images) that each run took.

    Raises:
        ValueError: for releases outside the run, fewer than 3, or twins that can't be released any
            more.

        tied = dit_lens.twins(model, pairs=32, tie="attention", g=0.5, eta=1.0, release=50, steps=50)
        release_sweep(tied, [latents(Bands.radial((16, 16), cut=0.25))]).commitment("latents").gap
    """
    steps = twins.run.settings.steps
    if twins.tie == "attention" and twins.release != steps:
        raise InvalidValue(
            f"These twins were released at step {twins.release}; a sweep needs them coupled "
            f"throughout, release={steps}."
        )
    wanted = [releases] if isinstance(releases, int) else list(releases)
    if isinstance(releases, int):
        if not 3 <= releases <= steps:
            raise InvalidValue(
                f"releases={releases}; a curve needs from 3 releases to {steps}, the run's steps."
            )
    elif (
        len(set(wanted)) != len(wanted)
        or len(wanted) < 3
        or not all(0 <= r < steps for r in wanted)
    ):
        raise InvalidValue(
            f"releases is {wanted}; expected 3 or more different steps from 0 to {steps - 1}."
        )
    a, b = twins.a, twins.b
    labels = a.labels.tolist()
    found: dict[int, dict[str, Agreement]] = {}

    def measure(release: int) -> None:
        own, fresh = (
            a.seeds_at(steps - 1),
            twin_seeds(seed + 1_000_003 * (release + 1), twins.pairs)[1],
        )
        if twins.tie == "noise":  # twin A's future is already there
            ends = a.latents[-1], a.replay(release, seeds=fresh).latents[-1]
        else:
            ends = (
                a.replay(release, seeds=own, released=True).latents[-1],
                b.replay(release, seeds=fresh, released=True).latents[-1],
            )
        found[release] = {r.name: r.compare(*ends, labels) for r in readings}
        if progress is not None:
            progress(twins.pairs * (steps - release) * (1 if twins.tie == "noise" else 2))

    if isinstance(releases, int):
        while len(found) < releases:
            measure(
                _steepest(
                    {r: np.concatenate([curve(s) for s in of.values()]) for r, of in found.items()},
                    steps,
                )
            )
    else:
        for release in wanted:
            measure(release)
    order = tuple(sorted(found))
    stats = {
        r.name: Agreement.stack([found[release][r.name] for release in order]) for r in readings
    }
    return Curves(
        "clones" if twins.tie == "noise" else "coupled", order, *_about(twins.run, readings, stats)
    )


def _steepest(curves: dict[int, Array], steps: int) -> int:
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


def _about(run: Run, readings: Sequence[Reading], stats: dict[str, Agreement]) -> Any:
    bands = {r.name: r.band_names for r in readings}
    return (
        run.log_snr.numpy().astype(np.float64),
        stats,
        bands,
        len(set(run.labels.tolist())),
        run.model.transformer,
    )


def difference(
    one: Curves, other: Curves, reading: str, *, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How much later `one` puts the commitment of every band, and the gap, than `other`, in steps,
    with 95 % intervals.

    `commitment` [band], `gap` and their `_interval`, made as if the two were independent: where
    they share runs they move together, and the intervals are too wide. attrs["sentence"] says what
    it means for one pass against clones: both estimate one curve if the denoiser is exact, so a
    difference is an error of the model (or of a coarse sampler), never of the data.

    Raises:
        ValueError: for curves of different models or of runs with other steps.
    """
    import xarray as xr

    if one.model is not other.model:
        raise InvalidValue("The curves come from different models; compare curves of one.")
    if not np.array_equal(one.log_snr, other.log_snr):
        raise InvalidValue(
            f"The curves come from runs of {len(one.log_snr)} and {len(other.log_snr)} steps; "
            "expected the same steps."
        )
    fits = [
        c.commitment(reading, resamples=resamples, seed=seed).sel(quantity="step")
        for c in (one, other)
    ]
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
    low, high = result.commitment_interval.values.T
    values = result.commitment.values
    apart = [
        str(b)
        for b, v, lo, hi in zip(result.band.values, values, low, high, strict=True)
        if abs(v) > SLACK and lo * hi > 0
    ]
    if not np.isfinite(low).any():
        said = "no band commits in both estimates, so nothing can be said about the denoiser."
    elif apart:
        said = f"they differ in {', '.join(apart)}: the denoiser is measurably not the exact one there."
    else:
        pairs = one.stats[reading].xy.shape[1]
        said = f"no band differs: by this measure, with {pairs} pairs, the denoiser can't be told from an exact one."
    rows = zip(result.band.values, values, low, high, strict=True)
    words = ", ".join(f"{b} {v:+.1f} [{lo:+.1f}, {hi:+.1f}]" for b, v, lo, hi in rows)
    what = f"Commitment by {one.estimator.replace('_', ' ')} less {other.estimator}"
    result.attrs["sentence"] = f"{what}, in steps: {words}; {said}"
    return result
