"""The gap of one model with parts of it knocked out, all on the same starts, noise and resamples.

The engine under knock-outs of single layers, sets, windows, and shares: what is asked for twice is
run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.bands import Bands
from ..measures.bootstrap import FEWEST_PAIRS
from ..measures.commitment import commitment_draws
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..sampling.run import Run
from ..twinning.twins import paired_labels, twins
from .ablation import How, Part, knocked_out
from .gap import CLASS_MEANS
from .outcomes import latents
from .release import Curves, one_pass


class KnockedGap:
    """The gap, by one pass, with and without parts of the model.

    Args:
        model: the opened model, with a scheduler.
        part: of a layer that is knocked out.
        how: what comes in its place.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins, the bootstrap and how="resample".
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        batch: images that go through the model at once; None is all.

    Attributes:
        before: commitments of the whole model, [1 + resample, band], in steps.
        gap: of the whole model, as `measure_gap` gives it by one pass.

    Raises:
        InvalidValue: for too few pairs, or a model whose bands don't commit to begin with.
    """

    def __init__(
        self,
        model: HookedDiT,
        part: Part = "layer",
        how: How = "zero",
        *,
        pairs: int,
        steps: int,
        seed: int,
        cut: float,
        resamples: int,
        batch: int | None = None,
    ) -> None:
        arguments.instance("model", model, HookedDiT, "a HookedDiT")
        self.model, self.part, self.how = model, part, how
        self.pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
        self.steps = arguments.whole("steps", steps, 3, why="as many as a curve needs")
        self.resamples = arguments.whole("resamples", resamples, 1)
        self.seed, self.cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
        self.outcome = latents(Bands.radial(model.cfg.pixels, cut=self.cut))
        labels = paired_labels(model, self.pairs)
        batch = arguments.optional(arguments.whole, "batch", batch, 1)
        if batch is not None and batch < 2 * self.pairs and how != "zero":
            raise InvalidValue(
                f"how={how!r} takes what it puts in from the whole batch, and batch={batch} would "
                f"show it in parts; expected how='zero', or a batch of {2 * self.pairs} or more."
            )
        self.whole = twins(model, self.pairs, labels, steps=self.steps, seed=self.seed, batch=batch)
        curves = one_pass(self.whole, [self.outcome])
        own = curves.commitment(self.outcome.name, resamples=self.resamples, seed=self.seed)
        own = own.sel(quantity="step")
        self.gap = Estimate.of(own.gap, own.gap_interval)
        self.before = self._drawn(curves)
        if not np.isfinite(self.before[0]).all():
            raise InvalidValue(
                "The model's low or high band does not commit within the run, so it has no gap to "
                "find causes of."
            )
        self.known: dict[tuple[Any, ...], Array] = {}

    def without(
        self, layers: Sequence[int], *, window: range | None = None, direct: bool = False
    ) -> Array:
        """Commitments without these layers, [1 + resample, band], in steps; NaN for a band that
        does not commit.

        Args:
            layers: the blocks, 0 or more.
            window: of steps; None is every step.
            direct: see `knocked_out`.
        """
        if not layers:
            return self.before
        key = (frozenset(layers), window, direct)
        if key not in self.known:
            pair = self._knocked(layers, window, direct)
            self.known[key] = self._drawn(one_pass(pair, [self.outcome]))
        return self.known[key]

    def _knocked(self, layers: Sequence[int], window: range | None, direct: bool) -> Any:
        run: Run = knocked_out(
            self.whole.run,
            sorted(layers),
            self.part,
            direct,
            how=self.how,
            window=window,
            seed=self.seed,
        )
        return replace(self.whole, run=run)

    def _drawn(self, curves: Curves) -> Array:
        return commitment_draws(
            curves.stats[self.outcome.name],
            curves.releases,
            curves.log_snr,
            squared=True,
            resamples=self.resamples,
            seed=self.seed,
        )

    @property
    def attrs(self) -> dict[str, Any]:
        """What a result's attributes say of how it was measured."""
        return {
            "done": "knocked out",
            "estimator": "one pass",
            "part": self.part,
            "how": self.how,
            "n_layers": self.model.cfg.n_layers,
            "pairs": self.pairs,
            "steps": self.steps,
            "seed": self.seed,
            "cut": self.cut,
        }


def gap_of(commitments: Array) -> Array:
    """High less low, [...] of commitments [..., band].

    >>> gap_of(np.array([[3.0, 5.0]])).tolist()
    [2.0]
    """
    found: Array = commitments[..., 1] - commitments[..., 0]
    return found
