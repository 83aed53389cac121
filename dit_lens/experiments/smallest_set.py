"""The smallest set of layers without which half of the gap is gone, where there is one.

Trying all sets is out of the question, so this is a search, and says so. It goes two ways: from
single layers up, adding the layer that takes most of what is left (which misses causes that stand
in for each other), and from the first or last k layers down, leaving out whatever is not needed
(which finds those). The smaller set that comes out is irreducible: with any of its layers left out
of it, less than half is gone. A search picks what looks best by chance as well, so how much the set
takes away is then measured on other twins, and only that figure is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xarray as xr

from .. import arguments
from ..measures.bands import CUT
from ..measures.bootstrap import interval
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pieces import Engine, enough, measured
from ..sampling.settings import Progress
from .ablation import How, Part
from .knock_outs import checked_sets
from .knocked_gap import KnockedGap, gap_of, set_text

MOST = 4
"""From single layers up, a set of at most so many is looked for."""
CANDIDATES = 6
"""So many layers are tried at each step up: those that take most away by themselves."""
OTHER_TWINS = 1_000_003
"""Added to the seed for the twins on which the set is measured."""


@measured
def smallest_set(
    model: HookedDiT,
    share: float = 0.5,
    part: Part = "layer",
    *,
    how: How = "zero",
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    batch: int | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> xr.Dataset:
    """Look for the fewest layers that, knocked out together, take this share of the gap away.

    Args:
        model: the opened model, with a scheduler.
        share: of the gap, above 0 to 1.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        how: what comes in place of what a layer adds, see `dit_lens.experiments.knocked_out`.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins, the bootstrap and how="resample".
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        batch: images that go through the model at once; None is all. With how="zero" only.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; by default the
            model's own.
        progress: called with (done, total) knock-outs; the total is a guess.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `gap` [tried], in steps, without each set that the search tried, NaN where a
            band does not commit; coordinate `tried`, the sets as text; `left` and `left_interval`
            [bound], the share of the gap that is left without the set found, on twins that the
            search did not see, 95 %, NaN if no set was found. Attributes: `found`, the set as text,
            "" for none; `size`; `sure`, whether the interval lies within what `share` allows; the
            `sentence`.

    Raises:
        InvalidValue: for a share that is none, and as `knock_outs`.

    >>> from dit_lens import HookedDiT; from dit_lens.groundtruth import redundant
    >>> truth = redundant(); model = HookedDiT(truth.transformer, scheduler=truth.scheduler)
    >>> smallest_set(model, pairs=16, steps=5, cut=0.1, resamples=200).found
    '1, 3'
    """
    del store, engine  # `measured` sees to them
    checked_sets(model, None, part)
    share = arguments.number("share", share, above=0, most=1)
    arguments.choice("how", how, get_args(How))
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    settings: dict[str, Any] = {"pairs": pairs, "steps": steps, "cut": cut, "resamples": resamples}
    known = KnockedGap(model, part, how, seed=seed, **settings, batch=batch, labels=labels)
    return found_set(known, share, progress)


class Search:
    """What has been tried, and whether it takes enough away.

    Args:
        known: the gap with and without parts.
        share: that has to go.
        progress: called with (done, total) knock-outs.
    """

    def __init__(self, known: KnockedGap, share: float, progress: Progress | None) -> None:
        self.known, self.share, self.progress = known, share, progress
        self.whole = float(gap_of(known.before)[0])
        self.tried: dict[tuple[int, ...], float] = {}
        self.done = 0

    def ahead(self, sets: Sequence[Sequence[int]]) -> None:
        """Run all that is about to be asked for, at once.

        Args:
            sets: of layers.
        """
        new = [s for s in sets if tuple(sorted(s)) not in self.tried]
        self.known.all([(layers, None, False) for layers in new], self._told)

    def _told(self, _number: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.done, 3 * self.known.model.cfg.n_layers))

    def gap(self, layers: Sequence[int]) -> float:
        """Without these layers; NaN where a band does not commit.

        Args:
            layers: to knock out.
        """
        key = tuple(sorted(layers))
        if key not in self.tried:
            if not self.known.has(key):
                self.ahead([key])
            self.tried[key] = float(gap_of(self.known.without(key))[0])
        return self.tried[key]

    def left(self, layers: Sequence[int]) -> float:
        """The size of what is left of the gap, as a share of it; infinite where a band does not
        commit, for then nothing is known of it.

        Args:
            layers: to knock out.
        """
        found = abs(self.gap(layers) / self.whole)
        return found if np.isfinite(found) else np.inf

    def enough(self, layers: Sequence[int]) -> bool:
        """Whether the share goes with these layers.

        Args:
            layers: to knock out.
        """
        return self.left(layers) <= 1 - self.share

    def up(self) -> list[int]:
        """From single layers: the set of at most `MOST` that takes enough, or none."""
        self.ahead([[layer] for layer in range(self.known.model.cfg.n_layers)])
        singles = sorted(([layer] for layer in range(self.known.model.cfg.n_layers)), key=self.left)
        best = singles[0]
        candidates = [layer for (layer,) in singles[:CANDIDATES]]
        while not self.enough(best) and len(best) < MOST:
            wider = [[*best, layer] for layer in candidates if layer not in best]
            if not wider:
                return []
            self.ahead(wider)
            best = min(wider, key=self.left)
        return self.pruned(best) if self.enough(best) else []

    def down(self) -> list[int]:
        """From the fewest of the first or last layers that take enough: what is needed of them."""
        n = self.known.model.cfg.n_layers
        depths = sorted({max(1, round(n * k / 7)) for k in range(1, 8)})
        found: list[list[int]] = []
        for ends in ([list(range(k)) for k in depths], [list(range(n - k, n)) for k in depths]):
            wide = next((layers for layers in ends if self.enough(layers)), None)
            if wide is not None:
                found.append(self.pruned(wide))
        return min(found, key=len, default=[])

    def pruned(self, layers: Sequence[int]) -> list[int]:
        """Without all that can be left out, in halves, quarters and so on down to single layers, so
        that no layer of what stays can be.

        Args:
            layers: that take enough.
        """
        kept, size = list(layers), max(1, len(layers) // 2)
        while True:
            start, dropped = 0, False
            while start < len(kept):
                rest = kept[:start] + kept[start + size :]
                if rest and self.enough(rest):
                    kept, dropped = rest, True
                else:
                    start += size
            if size == 1 and not dropped:
                return sorted(kept)
            size = max(1, size // 2)


def found_set(known: KnockedGap, share: float, progress: Progress | None = None) -> xr.Dataset:
    """The dataset of `smallest_set`, with an engine that is already there.

    Args:
        known: the gap with and without parts.
        share: that has to go.
        progress: called with (done, total) knock-outs.
    """
    search = Search(known, share, progress)
    chosen = search.up()
    if len(chosen) != 1:
        chosen = min((s for s in (chosen, search.down()) if s), key=len, default=[])
    left = Estimate(np.nan, np.nan, np.nan)
    if chosen:
        other = KnockedGap(
            known.model,
            known.part,
            known.how,
            pairs=known.pairs,
            steps=known.steps,
            seed=known.seed + OTHER_TWINS,
            cut=known.cut,
            resamples=known.resamples,
            batch=known.batch,
            labels=known.labels,
        )
        ratio = gap_of(other.without(chosen)) / gap_of(other.before)
        left = Estimate.of(ratio[0], interval(ratio, known.pairs))
    enough()
    allowed = 1 - share
    result = xr.Dataset(
        {
            "gap": ("tried", list(search.tried.values())),
            "left": ((), left.value),
            "left_interval": ("bound", [left.low, left.high]),
        },
        coords={"tried": [set_text(s) for s in search.tried], "bound": ["low", "high"]},
        attrs=known.attrs
        | {
            "gap": known.gap.value,
            "gap_interval": [known.gap.low, known.gap.high],
            "share": share,
            "found": set_text(chosen),
            "size": len(chosen),
            "sure": int(left.known and -allowed <= left.low and left.high <= allowed),
        },
    )
    result.attrs["sentence"] = smallest_sentence(result)
    return result


def smallest_sentence(result: xr.Dataset) -> str:
    """Which layers it takes, and how sure that is.

    Args:
        result: of `smallest_set`.
    """
    share, size = f"{result.attrs['share']:.0%}", int(result.attrs["size"])
    gap = Estimate.of(result.attrs["gap"], result.attrs["gap_interval"])
    if not gap.sign:
        return (
            f"The gap of {gap:+.2f} steps can't be told from 0, so nothing is said of a set of "
            f"layers that takes {share} of it away."
        )
    lost = int(np.isnan(result.gap.values).sum())
    without = f"; without {lost} of them a band does not commit" if lost else ""
    tried = f"{result.sizes['tried']} sets tried, not all{without}"
    if not size:
        return f"No set of layers was found that takes {share} of the gap away ({tried})."
    left = Estimate.of(result.left, result.left_interval)
    who = f"layer {result.attrs['found']}" if size == 1 else f"layers {result.attrs['found']}"
    few = (
        "A single layer"
        if size == 1
        else f"The smallest set found that takes {share} of the gap away has {size} layers"
    )
    lead = f"{few}, {who}, takes {share} of the gap away, or more" if size == 1 else f"{few}, {who}"
    if not np.isfinite(left.value):
        return f"{lead} ({tried}); on other twins a band does not commit without it."
    allowed = 1 - result.attrs["share"]
    if result.attrs["sure"]:
        verdict = "it does for sure"
    elif abs(left.value) <= allowed:
        verdict = "it does, but not for sure"
    else:
        surely = left.low > allowed or left.high < -allowed
        verdict = "it does not" if surely else "it does not, but not for sure"
    return f"{lead} ({tried}); on other twins {verdict}: {left:.0%} of the gap is left."
