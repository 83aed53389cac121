"""Onset: the layer at which a profile over depth leaves the early layers' level for good.

For each k the departures d[k, j] = p[j] - mean(p[:k]), j >= k, are divided by their own bootstrap
standard errors, so noise that layers share (they see the same pairs) cancels where it should. The
first k with |t[k, k]| above a critical value ends the early layers; their mean is the early level;
the onset is the first layer that is off it by as much and after which none comes back (for a step
or a ramp, k itself). To name a layer too early, or any layer of a flat profile, |t[k, k]| must
exceed the critical value at a k that is still level; so that is the 95 % quantile of max_k |t[k,
k]| under the centred bootstrap, which holds both errors to 5 % whatever comes after the onset. (The
least-squares step would put a ramp's onset in its middle; testing each layer by itself would be
wrong far more often than 5 %.) Standard errors from n pairs are uncertain themselves, so the
quantile is carried from a normal to Student's t with n - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .. import arguments
from ..errors import InvalidValue
from .arrays import Array
from .bootstrap import FEWEST_PAIRS, checked_level
from .estimate import Estimate


@dataclass(frozen=True)
class Onset:
    """Where a profile leaves its early level, as `onset(profile, boot)` gives it.

        found = onset(profile, boot, pairs=64)
        found.layer, found.interval, found.message

    Attributes:
        verdict: "found"; "none", no departure of the size that matters stays; "cannot tell" with
            this many pairs.
        layer: the first layer that has left, or None.
        interval: (low, high) layers, from bootstrap refits, or None.
        share_last: the change over the last five layers, as a share of that from the early level to
            the last layer (NaN unless found).
        share_interval: its bootstrap interval.
        pairs_needed: about how many pairs would settle it, when it cannot tell and that is known.
        message: all this in a sentence.
    """

    verdict: str
    layer: int | None
    interval: tuple[int, int] | None
    share_last: float
    share_interval: tuple[float, float]
    pairs_needed: int | None
    message: str

    def __str__(self) -> str:
        return self.message


_ABSENT = Onset("none", None, None, math.nan, (math.nan, math.nan), None, "")


def onset(
    profile: ArrayLike,
    boot: ArrayLike,
    pairs: int,
    *,
    first: int = 0,
    matters: float = 1.0,
    material: float = 0.05,
    last: int = 5,
    level: float = 0.95,
    unit: str = "",
) -> Onset:
    """The onset of a profile over depth, given the same profile for bootstrap resamples.

    The first layer of the profile is the first early one, so the onset is the second at the
    earliest. A profile that leaves and comes back has none, and neither has one whose interval for
    the layer is longer than half of the depth.

    Args:
        profile: [layer].
        boot: [resample, layer].
        pairs: how many pairs were resampled.
        first: the number of the profile's first layer; -1 if that is the embedding.
        matters: what the profile must come to depart by, in its unit (1 step, for a gap in steps).
            Without an onset the verdict is "none" if the simultaneous interval of every departure
            excludes it, else "cannot tell".
        material: a departure below this share of the largest one does not count, however certain:
            with enough pairs any real profile drifts.
        last: the layers of `share_last`.
        level: of the test and the intervals.
        unit: of the profile, for the message: "steps".

    Returns:
        Onset: the verdict, and what it rests on.

    Raises:
        InvalidValue: for fewer than 8 pairs, fewer than 3 layers, wrong shapes, or values that are
            not finite.

    >>> rng = np.random.default_rng(0); p = np.where(np.arange(28) >= 20, 9.0, 0.0)
    >>> onset(p + rng.normal(size=28), p + rng.normal(size=(500, 28)), pairs=64).layer
    20
    """
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an onset")
    first = arguments.whole("first", first, -1)
    last = arguments.whole("last", last, 1)
    matters = arguments.number("matters", matters, 0)
    material = arguments.number("material", material, 0, 1)
    level = checked_level(level)
    p, draws = arguments.array("profile", profile), arguments.array("boot", boot)
    draws = _check(p, draws, first)
    last = min(last, len(p) - 1)
    unit = unit and f" {unit}"

    # how large a departure noise makes
    noise = draws - draws.mean(0)
    wobble = _departures(noise)  # [resample, candidate, layer]
    error = wobble.std(0, ddof=1) * math.sqrt(pairs / (pairs - 1))
    # layers exactly alike: 0 / 0 is no departure
    tiny = 1e-6 * max(float(np.abs(p).max()), float(noise.std()), 1e-30)
    error = np.maximum(error, tiny)
    critical = _critical(np.abs(wobble / error).diagonal(0, 1, 2).max(1), pairs, level)

    # the first layer that leaves for good, in the profile and in every resample
    d = _departures(p[None])
    # a place in the profile, `layer` what it is called
    at = int(_first(d, error, critical, material, matters)[0])
    if at < 0:
        return _without(d[0], error, critical, pairs, matters, level, first, unit)
    refits = _first(_departures(draws), error, critical, material, matters)
    refits, layer = np.append(refits[refits > 0], at) + first, at + first
    low, high = np.quantile(refits, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    interval = min(int(low), int(layer)), max(int(high), int(layer))
    if interval[1] - interval[0] > len(p) / 2:
        message = (
            f"The profile leaves its early level, but anywhere from layer {interval[0]} to "
            f"{interval[1]} ({level:.0%} interval), over more than half of the depth: no onset can "
            f"be named with {pairs} pairs."
        )
        return replace(_ABSENT, verdict="cannot tell", message=message)

    # what the last layers have of the change
    ends = np.quantile(_share(draws, at, last), [(1 - level) / 2, (1 + level) / 2])
    share = Estimate.of(_share(p[None], at, last)[0], ends)
    make = "make" if last > 1 else "makes"
    made = (
        f"{make} {share:.0%} of the change"
        if share.high - share.low < 2
        else f"{make} a share of the change that can't be told"
    )
    where = f"layer {layer} ({level:.0%} interval {interval[0]} to {interval[1]})"
    depth = len(p) + min(first, 0)
    ending = f"the last {last} of {depth} layers" if last > 1 else f"the last of {depth} layers"
    message = f"The profile leaves its early level at {where}; {ending} {made}."
    return Onset("found", int(layer), interval, share.value, (share.low, share.high), None, message)


def _amount(value: float, unit: str) -> str:
    """A value with its unit; 1 has none of several."""
    return f"{value:g}{unit.removesuffix('s') if value == 1 else unit}"


def _departures(profiles: Array) -> Array:
    """[..., layer] -> [..., k - 1, j - 1]: layer j less the mean of the layers before k; 0 where j
    < k.
    """
    n = profiles.shape[-1]
    early = np.cumsum(profiles, -1)[..., :-1] / np.arange(1, n)
    return np.triu(profiles[..., None, 1:] - early[..., None])


def _critical(largest: Array, pairs: int, level: float) -> float:
    """The quantile of the largest |t| of normal noise, carried to Student's t with pairs - 1
    degrees of freedom.
    """
    # without any noise, rounding is still no departure
    normal = max(float(np.quantile(largest, level)), 1.96)
    return float(stats.t.isf(stats.norm.sf(normal), pairs - 1))


def _first(
    d: Array, error: Array, critical: float, material: float, matters: float
) -> NDArray[np.int64]:
    """The onset of each profile, from departures [profile, k - 1, j - 1]; -1 for none."""
    leaves = np.abs(d.diagonal(0, 1, 2)) > critical * error.diagonal()
    k = leaves.argmax(1)  # the first layer to leave: the mean before it is the level to keep off
    row, wide = d[np.arange(len(d)), k], error[k]
    size = np.abs(row)
    # 1.96: the 5 % rest on `leaves` alone
    floor = np.maximum(1.96 * wide, material * size.max(1, keepdims=True))
    off = (size > floor) & (np.sign(row) == np.sign(row[:, -1:]))
    stays = np.logical_and.accumulate(off[:, ::-1], axis=1)[:, ::-1]
    good = stays & (size > critical * wide) & leaves.any(1, keepdims=True)
    good &= (size * stays).max(
        1, keepdims=True
    ) > matters  # a ramp begins below what matters, and counts where it begins
    return np.where(good.any(1), good.argmax(1) + 1, -1)


def _without(
    d: Array,
    error: Array,
    critical: float,
    pairs: int,
    matters: float,
    level: float,
    first: int,
    unit: str,
) -> Onset:
    """The verdict when no candidate has left for good: "none" or "cannot tell"."""
    size, width = np.abs(d), critical * error
    inside = np.triu(np.ones_like(d, dtype=bool))
    for k in np.flatnonzero(np.diagonal(size > width))[:1]:
        # that it came back must be shown: surely small
        small = (size + width)[k, k:] < matters
        back = np.flatnonzero(small & (size <= width)[k, k:])
        leaves = f"The profile departs at layer {k + 1 + first}"
        if len(back):
            layer = k + back[0] + 1 + first
            message = f"{leaves} but is at its early level in layer {layer}: no onset."
            return replace(_ABSENT, message=message)
        if small.any():
            message = (
                f"{leaves} by less than the {_amount(matters, unit)} that count, and no larger "
                "departure stays: no onset."
            )
            return replace(_ABSENT, message=message)
    reach = np.where(inside, size + width, 0).max()
    if reach < matters:
        message = (
            f"No layer leaves the early level: every departure is below {reach:.2g}{unit} "
            f"({level:.0%} confidence; one of {matters:g} would count): no onset."
        )
        return replace(_ABSENT, message=message)
    # to show the departure seen, or to exclude one that matters: the nearer
    margin = np.maximum(size, matters - size)
    needed = np.where(inside & (size + width >= matters), (width / margin) ** 2, 0).max()
    more = max(pairs + 1, math.ceil(pairs * needed))
    message = (
        f"Cannot tell with {pairs} pairs: a departure of {_amount(matters, unit)} is neither shown "
        "nor excluded; "
        f"about {more} pairs would be needed."
    )
    return replace(_ABSENT, verdict="cannot tell", pairs_needed=more, message=message)


def _share(profiles: Array, layer: int, last: int) -> Array:
    """The change over the last layers as a share of the change from the level before `layer`,
    [...].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (profiles[:, -1] - profiles[:, -1 - last]) / (
            profiles[:, -1] - profiles[:, :layer].mean(-1)
        )


def _check(profile: Array, boot: Array, first: int) -> Array:
    """The resamples that are finite throughout."""
    if profile.ndim != 1 or len(profile) < 3:
        raise InvalidValue(
            f"profile has shape {profile.shape}; expected [layer], with 3 layers or more."
        )
    if boot.ndim != 2 or boot.shape[1] != len(profile) or len(boot) < 200:
        raise InvalidValue(
            f"boot has shape {boot.shape}; expected [resample, {len(profile)}], with 200 resamples "
            "or more."
        )
    finite = np.isfinite(np.vstack([profile, boot]))
    if not finite[0].all() or finite[1:].all(1).mean() < 0.9:
        bad = (np.flatnonzero(~finite[0] | (finite[1:].mean(0) < 0.9)) + first).tolist()
        where = f"in layers {bad}" if bad else "in more than a tenth of the resamples"
        raise InvalidValue(
            f"The profile is not finite {where}; its bands did not cross within the run there."
        )
    return boot[finite[1:].all(1)]
