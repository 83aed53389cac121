"""The gap of one model with parts of it knocked out, all on the same starts, noise and resamples.

The engine under knock-outs of single layers, sets, windows, and shares: what is asked for twice is
run once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching.patch import steps_text
from ..pieces import Piece, digest, results, scope
from ..sampling.run import Run
from ..twinning.twins import chosen_labels
from .ablation import How, Part, knocked_out
from .gap import CLASS_MEANS
from .kept_twins import kept_twins
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
        labels: taken in turn, two pairs or more of each; None is the model's own.

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
        labels: Labels | None = None,
    ) -> None:
        arguments.instance("model", model, HookedDiT, "a HookedDiT")
        self.model, self.part, self.how = model, part, how
        self.pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
        self.steps = arguments.whole("steps", steps, 3, why="as many as a curve needs")
        self.resamples = arguments.whole("resamples", resamples, 1)
        self.seed, self.cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
        self.outcome = latents(Bands.radial(model.cfg.pixels, cut=self.cut))
        self.labels = chosen_labels(model, self.pairs, labels)
        self.batch = batch = arguments.optional(arguments.whole, "batch", batch, 1)
        if batch is not None and batch < 2 * self.pairs and how != "zero":
            raise InvalidValue(
                f"how={how!r} takes what it puts in from the whole batch, and batch={batch} would "
                f"show it in parts; expected how='zero', or a batch of {2 * self.pairs} or more."
            )
        settings: dict[str, Any] = {"steps": self.steps, "seed": self.seed, "batch": batch}
        known = [part, how, self.labels, self.resamples, self.cut, settings]
        self.scope = f"knock-outs {digest(known)}"
        with scope(self.scope):
            self.whole = kept_twins("twins", model, self.pairs, self.labels, **settings)
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
        (found,) = self.all([(layers, window, direct)])
        return found

    def has(self, layers: Sequence[int]) -> bool:
        """Whether it is known what the gap is without these layers."""
        return not layers or (frozenset(layers), None, False) in self.known

    def all(
        self,
        cells: Sequence[tuple[Sequence[int], range | None, bool]],
        told: Callable[[int], object] = lambda _: None,
    ) -> list[Array]:
        """The same of several at once.

        Args:
            cells: layers, window and direct of each, as for `without`.
            told: called with a number as each is there.
        """
        keys = [(frozenset(layers), window, direct) for layers, window, direct in cells]
        new = [key for key in dict.fromkeys(keys) if key[0] and key not in self.known]
        for known in range(len(keys) - len(new)):
            told(known)
        with scope(self.scope):
            found = results([self._piece(*key) for key in new], told)
        self.known |= {key: one["commitments"] for key, one in zip(new, found, strict=True)}
        return [self.known[key] if key[0] else self.before for key in keys]

    def _piece(self, layers: frozenset[int], window: range | None, direct: bool) -> Piece:
        def run() -> dict[str, Array]:
            pair = self._knocked(sorted(layers), window, direct)
            return {"commitments": self._drawn(one_pass(pair, [self.outcome]))}

        when = "" if window is None else f", steps {steps_text(window)}"
        return Piece(f"without {set_text(layers)}{when}{', direct' if direct else ''}", run)

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


def set_text(layers: Collection[int]) -> str:
    """A set of layers as text, neighbours drawn together.

    >>> set_text([3, 4, 5, 9])
    '3-5, 9'
    """
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def gap_of(commitments: Array) -> Array:
    """High less low, [...] of commitments [..., band].

    >>> gap_of(np.array([[3.0, 5.0]])).tolist()
    [2.0]
    """
    found: Array = commitments[..., 1] - commitments[..., 0]
    return found
