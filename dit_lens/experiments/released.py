"""Released twins, as pieces of a measurement: each release's finished twins, and what is compared
of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..measures.agreement import Agreement, Contrasts
from ..model.pinned import arrays, sent
from ..pieces import Piece, current, results
from ..sampling.branches import Branch, ends
from ..sampling.guidance import n_passes
from ..sampling.parts import Split
from ..twinning.twins import Twins, twin_seeds
from .outcomes import Outcome, Sides, side, statistics

TOGETHER = 16
"""So many releases that are known beforehand are one piece: they go through the model together."""

Arrays = dict[str, NDArray[Any]]


class Released:
    """Twins of one tied run, released at one step or another.

    Args:
        twins: as `release_sweep` takes them.
        outcomes: what to compare.
        seed: of the noise after the release.
        batch: images that go through the model at once; None is all.
        kept: of so many pairs, the first ones, the finished twins are wanted too.

    Attributes:
        clones: whether twin A is the run itself.
    """

    def __init__(
        self,
        twins: Twins,
        outcomes: Sequence[Outcome],
        seed: int,
        batch: int | None,
        kept: int,
    ) -> None:
        self.twins, self.outcomes, self.seed, self.batch = twins, outcomes, seed, batch
        self.kept, self.clones = kept, twins.tie == "noise"
        labels = twins.a.labels.tolist()
        self.contrasts = Contrasts(labels, len(labels))
        self.finished = twins.run.finished
        self._shared: Sides = {}
        self.parts: Sequence[tuple[int, ...]] = ()
        edited = any(change.edits for change in twins.run.history)  # edits see a run's own batch
        if self.clones and batch is not None and not edited:
            passes = n_passes(twins.run.model, twins.run.settings.guidance)
            self.parts = Split.of(twins.pairs, max(1, batch // passes)).parts

    def check(self) -> None:
        """Refuse, before anything is run, bands of another grid, and another model. Where pieces
        are shared the model is known by its content, and whoever compares first finds the rest.
        """
        if current() is None:
            self.shared()
            if self.clones:
                self.twins.a.check(self.twins.run.settings.steps - 1)

    def shared(self) -> Sides:
        """What of twin A's finished images is compared."""
        if not self._shared:
            mine = self.finished[: self.twins.pairs]
            self._shared = side(self.outcomes, mine, self.contrasts)
        return self._shared

    def at(
        self, releases: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Agreement], tuple[Tensor, Tensor]]]:
        """Release the twins at these steps.

        Args:
            releases: steps, to be run together if they can.

        Yields:
            The step, the statistics of each outcome, and both finished twins of the kept pairs.
        """
        alone = len(self.parts) > 1
        size = 1 if alone else TOGETHER
        groups = [tuple(releases[i : i + size]) for i in range(0, len(releases), size)]
        done: list[list[Tensor] | None] = [None] * len(groups)
        if alone:  # as many images a piece as go through the model at once
            made = iter(results([self._part(r, part) for (r,) in groups for part in self.parts]))
            for i in range(len(groups)):
                whole = np.concatenate([next(made)["ends"] for _ in self.parts])
                done[i] = [sent(torch.from_numpy(whole), self.finished.device)]
        pieces = [
            Piece(f"release {', '.join(map(str, group))}", partial(self._compared, group, known))
            for group, known in zip(groups, done, strict=True)
        ]
        for group, found in zip(groups, results(pieces), strict=True):
            for release in group:
                stats = {o.name: Agreement(*found[f"{release} {o.name}"]) for o in self.outcomes}
                yield release, stats, self._twins(release, found)

    def _part(self, release: int, part: tuple[int, ...]) -> Piece:
        def run() -> Arrays:
            seeds = self._seeds(release)
            own = Branch(
                self.twins.a.select(slice(part[0], part[-1] + 1)),
                release,
                tuple(seeds[i] for i in part),
            )
            return {"ends": ends([own], self.batch)[0].cpu().numpy()}

        return Piece(f"release {release}, pairs {part[0]} to {part[-1]}", run)

    def _seeds(self, release: int) -> tuple[int, ...]:
        return tuple(twin_seeds(self.seed + 1_000_003 * (release + 1), self.twins.pairs)[1])

    def _ends(self, group: Sequence[int]) -> list[Tensor]:
        """The finished twins, [A, B, A, B, ...]; of clones only B."""
        a, b, branches = self.twins.a, self.twins.b, list[Branch]()
        for release in group:
            if not self.clones:  # twin A's future is not there yet
                branches.append(Branch(a, release, a.seeds_at(a.settings.steps - 1)))
            branches.append(Branch(a if self.clones else b, release, self._seeds(release)))
        return ends(branches, self.batch)

    def _compared(self, group: Sequence[int], done: list[Tensor] | None) -> Arrays:
        done = self._ends(group) if done is None else done
        found: dict[str, Tensor] = {}
        for i, release in enumerate(group):
            mine, theirs = (None, done[i]) if self.clones else done[2 * i : 2 * i + 2]
            a = self.shared() if mine is None else mine
            stats = statistics(self.outcomes, a, theirs, self.contrasts)
            found |= {f"{release} {name}": each for name, each in stats.items()}
            if self.kept:
                for twin, x in (("A", mine), ("B", theirs)):
                    if x is not None:
                        found[f"{release} twin {twin}"] = x[: self.kept].clone()
        return arrays(found)

    def _twins(self, release: int, found: Mapping[str, NDArray[Any]]) -> tuple[Tensor, Tensor]:
        own = self.finished[: self.kept].clone()  # the caller's to change; the run's stay
        a, b = (
            sent(torch.from_numpy(np.array(found[name])), own.device) if name in found else own
            for name in (f"{release} twin A", f"{release} twin B")
        )
        return a, b
