"""Good runs to compare the bad one with: given ones, or near twins, which are found.

A *near twin* shares the bad run's past up to a step, has fresh noise for a few steps, and then the
bad run's own noise again: so good and bad differ by little but what was decided in those steps.
(Clones that never share their noise again differ in every pixel's noise at every step, and a patch
between them carries that noise over.) With a sampler that draws no noise, x_t is noised a few steps
back up and denoised again, with fresh noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ... import arguments
from ...errors import InvalidValue
from ...measures.bootstrap import FEWEST_PAIRS
from ...model.noise_schedule import signal_and_noise
from ...patching.sweeps import scheduler_text
from ...sampling.kept import kept_run
from ...sampling.loop import is_stochastic
from ...sampling.noise import noise
from ...sampling.run import Run
from .chances import FIRST_SEED, Chances, Spent
from .fault import Fault, Images

FEW = 3
"""So many pairs are looked at where many places are compared."""


@dataclass(frozen=True)
class Pairs:
    """Bad and good runs, item by item.

    Attributes:
        bad: the bad runs.
        good: the good ones.
        matched: whether they have the same start and noise, so that nothing but what the models do
            tells them apart.
        since: the step from which on they differ.
        found: whether the good ones are near twins that were found.
    """

    bad: Run
    good: Run
    matched: bool
    since: int
    found: bool

    @property
    def n(self) -> int:
        """How many."""
        return len(self.bad.labels)

    @property
    def few(self) -> Pairs:
        """A few of them, to look at many places in; one, where only the weights differ."""
        return self.select(range(1 if self.matched else min(FEW, self.n)))

    def select(self, items: Sequence[int]) -> Pairs:
        """Some of them."""
        bad, good = self.bad.select(list(items)), self.good.select(list(items))
        return Pairs(bad, good, self.matched, self.since, self.found)


def check_good(run: Run, good: Run) -> None:
    """Refuse a good run that the bad one can't be compared with.

    Args:
        run: the bad one.
        good: given as good.

    Raises:
        InvalidValue: in one sentence.
    """
    arguments.instance("good", good, Run, "a run of dit_lens.sample")
    if len(good.labels) != len(run.labels):
        raise InvalidValue(
            f"The good run has {len(good.labels)} items and the bad one {len(run.labels)}; "
            "expected as many, item i beside item i."
        )
    asked = (each.model.conditions.words(each.labels.tolist()) for each in (good, run))
    for a, b in zip(*asked, strict=True):
        if a != b:
            raise InvalidValue(
                f"The good run has the label {a!r} and the bad one {b!r}; expected the same."
            )
    for name in ("steps", "guidance", "guided_channels", "eta"):
        a, b = getattr(good.settings, name), getattr(run.settings, name)
        if a != b:
            raise InvalidValue(
                f"The good run has {name}={a!r} and the bad one {name}={b!r}; expected the same "
                "sampler."
            )
    if scheduler_text(good.scheduler) != scheduler_text(run.scheduler):
        raise InvalidValue(
            f"The good run was sampled by {type(good.scheduler).__name__} and the bad one by "
            f"{type(run.scheduler).__name__}, or with other settings of it; expected the same "
            "sampler."
        )
    mine, theirs = run.model, good.model
    if mine.names != theirs.names or mine.cfg != theirs.cfg:
        raise InvalidValue(
            "The good run is of a model of another architecture; expected the same model, or "
            "another state of its weights."
        )


def given(run: Run, good: Run, fault: Fault, images: Images, n: int, spent: Spent) -> Pairs:
    """Pairs of the bad run and the given one. Of a single pair with the same noise, clones are made
    of both, with the same fresh noise after step 0.

    Args:
        run: the bad one.
        good: the good one, checked.
        fault: the score.
        images: of latents.
        n: pairs that are wanted.
        spent: the account.

    Raises:
        InvalidValue: for a good run that has the fault, or differs in nothing.
    """
    scores = fault.scores(images(good.finished))
    if fault.bad(scores).any():
        raise InvalidValue(
            f"The good run has the fault too: {fault.name} is {scores.max():.3g} there, and "
            f"{fault.at:g} or more is a fault."
        )
    pasts = enumerate(zip(run.latents, good.latents, strict=True))
    apart = [s for s, both in pasts if not torch.equal(*map(run.here, both))]
    if not apart:
        raise InvalidValue("The good run and the bad one are the same; expected two that differ.")
    steps = run.settings.steps
    matched = bool(apart[0]) and all(run.seeds_at(s) == good.seeds_at(s) for s in range(steps))
    pairs = Pairs(run, good, matched, max(0, apart[0] - 1), False)
    if not matched or len(run.labels) > 1 or not is_stochastic(run.model, run.settings):
        return pairs
    seeds, asked = [FIRST_SEED // 4 + i for i in range(2 * n)], run.settings.scheduler
    own, other = (each.select([0] * len(seeds)) for each in (run, good))
    bad, fine = (
        kept_run(
            f"clones of the {name} run",
            partial(each.replay, 0, seeds=seeds),
            each.model,
            asked,
            each.history,
        )
        for name, each in (("bad", own), ("good", other))
    )
    spent.add(2 * len(seeds))
    both = fault.bad(fault.scores(images(bad.finished)))
    both &= ~fault.bad(fault.scores(images(fine.finished)))
    chosen = np.flatnonzero(both)[:n].tolist()
    if len(chosen) < FEWEST_PAIRS:
        return pairs
    return Pairs(bad.select(chosen), fine.select(chosen), True, pairs.since, False)


def twins(
    run: Run,
    fault: Fault,
    images: Images,
    seen: Chances,
    n: int,
    seed: int,
    spent: Spent,
) -> Pairs | None:
    """Near twins that are good; None where none was found.

    Args:
        run: the bad one.
        fault: the score.
        images: of latents.
        seen: the chance of the fault by the step up to which the past is shared.
        n: twins that are wanted.
        seed: of their noise.
        spent: the account.
    """
    steps = run.settings.steps
    few = max(1, steps // 12)
    # the latest step at which good ones are to be had comes first: they are the nearest
    order = [s for s, hits in zip(seen.steps, seen.hits, strict=True) if hits < seen.of]
    tried: list[tuple[int, Pairs]] = []
    for release in sorted({*order, 0}, reverse=True)[:4]:
        if release + few >= steps:
            continue
        since = release + few if is_stochastic(run.model, run.settings) else release
        make = partial(_near, run, release, few, 2 * n, seed)
        name = f"near twins from step {release} on"
        twin = kept_run(name, make, run.model, run.settings.scheduler, run.history)
        spent.add(2 * n * (steps - release) / steps)
        scores = fault.scores(images(twin.finished))
        chosen = np.flatnonzero(~fault.bad(scores))[:n].tolist()
        if chosen:
            bad = run.select([i % len(run.labels) for i in chosen])
            tried.append((len(chosen), Pairs(bad, twin.select(chosen), False, since, True)))
        if len(chosen) >= min(n, 8):
            break
    return max(tried, key=lambda each: each[0])[1] if tried else None


def _near(run: Run, release: int, few: int, n: int, seed: int) -> Run:
    """Runs with the bad one's past and, but for a few steps, its noise."""
    own = run.select([i % len(run.labels) for i in range(n)])
    fresh = [FIRST_SEED // 8 + 100_000 * seed + 1000 * release + i for i in range(n)]
    if is_stochastic(run.model, run.settings):
        back = release + few
        return own.replay(release, seeds=fresh).replay(back, seeds=list(own.seeds_at(back)))
    above = release + few
    (s0, n0), (s1, n1) = (
        signal_and_noise(run.scheduler, run.timesteps[s]) for s in (above, release)
    )
    ratio = float(s1 / s0)
    sigma = max(0.0, float(n1) ** 2 - (ratio * float(n0)) ** 2) ** 0.5
    xi = noise(fresh, release, run.finished.shape[1:], run.finished.device, run.finished.dtype)
    return own.replay(release, latents=ratio * own.here(own.latents[above]) + sigma * xi)
