"""How often a fault comes: over seeds, and for runs that share the bad one's past up to a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ...measures import Array
from ...measures.estimate import Estimate
from ...measures.proportion import proportion
from ...pieces import Arrays, Piece, results
from ...sampling.branches import Branch, ends
from ...sampling.kept import kept_run
from ...sampling.loop import is_stochastic
from ...sampling.run import Run
from ...sampling.sample import sample
from ..there_and_back import returns
from .fault import Fault, Images

FIRST_SEED = 1 << 40
"""Other seeds are counted from here, so that a user's run is none of them."""


@dataclass
class Spent:
    """Images that a diagnosis has cost, in whole runs: a run of half the steps, or through half of
    the layers, is half an image.

    Attributes:
        images: so far.
        told: called with it.
        stage: for what they are spent now.
        by_stage: how many went where.
    """

    images: float = 0.0
    told: Callable[[float], object] | None = None
    stage: str = "base"
    by_stage: dict[str, float] = field(default_factory=dict)

    def add(self, images: float) -> None:
        """So many more."""
        self.images += images
        self.by_stage[self.stage] = self.by_stage.get(self.stage, 0.0) + images
        if self.told is not None:
            self.told(self.images)


def other_seeds(
    run: Run, n: int, seed: int, spent: Spent, batch: int | None, name: str = "other seeds"
) -> Run:
    """A run of the same label and sampler from other seeds.

    Args:
        run: the bad one.
        n: how many.
        seed: from which the others are counted.
        spent: the account.
        batch: images at once.
        name: of the piece.
    """
    s = run.settings

    def sampled() -> Run:
        return sample(
            run.model,
            run.labels[:1].repeat(n),
            [FIRST_SEED + 1000 * seed + i for i in range(n)],
            s.steps,
            s.guidance,
            s.scheduler,
            s.eta,
            s.guided_channels,
            batch=batch,
        )

    found = kept_run(name, sampled, run.model, s.scheduler)
    spent.add(n)
    return found


@dataclass(frozen=True)
class Chances:
    """P(fault | the past shared up to a step).

    Attributes:
        how: "clones", or "there and back".
        steps: [release].
        hits: how many had it.
        of: of how many at each.
    """

    how: str
    steps: tuple[int, ...]
    hits: tuple[int, ...]
    of: int

    @property
    def estimates(self) -> list[Estimate]:
        """The chance at each step, with its interval."""
        return [proportion(hits, self.of) for hits in self.hits]

    @property
    def decided(self) -> int | None:
        """The first step from which on more than half have it; None is never."""
        over = [2 * hits > self.of for hits in self.hits]
        if not over[-1]:
            return None
        first = len(over) - next((i for i, yes in enumerate(over[::-1]) if not yes), len(over))
        return self.steps[first]

    @property
    def from_the_start(self) -> bool:
        """Whether the start alone makes it more likely than not, surely so."""
        return self.steps[0] == 0 and self.estimates[0].low > 0.5


def spread_over(steps: int, number: int) -> list[int]:
    """So many of a run's steps, evenly, from the first on; fewer where the run has fewer.

    Args:
        steps: of the run.
        number: how many.

    >>> spread_over(50, 7), spread_over(4, 8)
    ([0, 7, 14, 21, 29, 36, 43], [0, 1, 2, 3])
    """
    return sorted({min(round(i * steps / number), steps - 1) for i in range(number)})


def chances(
    run: Run,
    fault: Fault,
    images: Images,
    releases: Sequence[int],
    clones: int,
    seed: int,
    spent: Spent,
    batch: int | None,
) -> Chances:
    """How often runs with the bad run's past have the fault.

    Args:
        run: the bad one, of one item or more; they are taken in turn.
        fault: the score.
        images: of latents.
        releases: steps up to which the past is shared.
        clones: runs at each.
        seed: of their noise.
        spent: the account.
        batch: images at once.
    """
    own = run.select([i % len(run.labels) for i in range(clones)])
    seeds = tuple(FIRST_SEED // 2 + 1000 * seed + i for i in range(clones))
    stochastic = is_stochastic(run.model, run.settings)
    if stochastic:
        words = np.random.SeedSequence([seed, 17]).generate_state(len(releases), np.uint32)
        branches = [
            Branch(own, r, tuple(s + 10_000 * int(word) for s in seeds))
            for r, word in zip(releases, words, strict=True)
        ]
    else:
        branches = returns(own, releases, seeds)

    def with_it() -> Arrays:
        finished = ends(branches, batch)
        return {"hits": np.array([fault.bad(fault.scores(images(x))).sum() for x in finished])}

    (found,) = results([Piece("runs that share the past", with_it)])
    steps, hits = run.settings.steps, found["hits"].tolist()
    spent.add(clones * sum(steps - r for r in releases) / steps)
    how = "clones" if stochastic else "there and back"
    return Chances(how, tuple(releases), tuple(hits), clones)


def spreads(images: Tensor, fault: Fault) -> Array:
    """How far images of one label are apart on average, squared: where the fault is not, and in
    all, [2].

    Args:
        images: of other seeds.
        fault: the score.
    """
    found = []
    for part in (fault.rest(images), images):
        flat = part.double().flatten(1)
        n = len(flat)
        mean = flat.mean(0)
        found.append(2 * n / (n - 1) * float((flat - mean).square().sum(1).mean()))
    return np.array(found)
