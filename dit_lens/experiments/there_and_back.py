"""There and back: finished images noised again up to a step and denoised, the third estimator of
what is decided by when (beside `one_pass` and clones, `dit_lens.experiments.release`).

A finished image x0 with fresh noise, x_r = signal x0 + noise xi, is a draw of x_r given x0;
denoised from there it is the image's *return*. With an exact denoiser and

- a stochastic sampler, the return is a draw from the posterior of x0 given x_r, as a clone released
  at r is: image and return agree as two clones do, whatever the data;
- a deterministic sampler or a flow, the return is a function of x_r. On Gaussian data
  corr²(image, return) is the clones' agreement in every mode (E1 in docs/checks.md), so that is
  what counts as agreement. On other data it is a figure of its own.

It needs no noise of the sampler's and nothing of the run but its finished image. A multistep
scheduler starts at the step without a memory, as at a run's first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures.agreement import Agreement, Contrasts, curve
from ..model.noise_schedule import signal_and_noise
from ..sampling.branches import Branch, ends
from ..sampling.loop import is_stochastic
from ..sampling.noise import noise
from ..sampling.run import Run
from ..twinning.twins import Twins, twin_seeds
from .outcomes import Outcome, compared, once, side, statistics
from .release import RELEASES, Curves, planned_releases, steepest


def noised(run: Run, step: int, seeds: Sequence[int]) -> Tensor:
    """The finished latents with fresh noise, as x_t before a step, [item, *latent_shape].

    Args:
        run: whose latents.
        step: 0 is the noisiest.
        seeds: of the noise, one an item.
    """
    signal, sigma = (
        f.to(run.finished) for f in signal_and_noise(run.scheduler, run.timesteps[step])
    )
    xi = noise(seeds, step, run.finished.shape[1:], run.finished.device, run.finished.dtype)
    return signal * run.finished + sigma * xi


def returns(run: Run, steps: Sequence[int], seeds: Sequence[int]) -> list[Branch]:
    """The ways there and back to each of several steps.

    Args:
        run: whose finished latents are noised again.
        steps: up to which.
        seeds: one an item; each step and each use draws its own noise from them.
    """
    made = []
    for step in steps:
        up, down = (tuple(_derived(s, 2 * step + part) for s in seeds) for part in (0, 1))
        made.append(Branch(run, step, down, noised(run, step, up)))
    return made


def _derived(seed: int, number: int) -> int:
    word = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(2))


def there_and_back(
    runs: Twins | Run,
    outcomes: Sequence[Outcome],
    releases: int | Sequence[int] = RELEASES,
    *,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    batch: int | None = None,
) -> Curves:
    """Agreement of finished images with what they return as, noised up to a step and denoised.

    Args:
        runs: a run, or twins with release=0; of twins each counts, and the pair is the unit that
            intervals resample. Any sampler will do.
        outcomes: what to compare.
        releases: steps, or how many of them; a number is spent where the curves rise most steeply.
        seed: of the noise.
        progress: called with (done, total) releases.
        batch: images that go through the model at once; None is all.

    Returns:
        Curves: the releases in increasing order; for deterministic samplers the squared
            correlation.

    Raises:
        InvalidValue: for releases outside the run, fewer than 3, or twins that were tied.

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3] * 8, steps=6)
    >>> low_high = dit_lens.experiments.latents(dit_lens.Bands.radial((16, 16), cut=0.25))
    >>> there_and_back(run, [low_high], [1, 3, 5]).agreement("latents").shape  # [release, band]
    (3, 2)
    """
    arguments.instance("runs", runs, (Twins, Run), "a run of dit_lens.sample, or twins")
    outcomes, seed = compared(outcomes), arguments.seed("seed", seed)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    if isinstance(runs, Twins) and (runs.release or runs.tie != "noise"):
        raise InvalidValue(
            f"These twins are tied by {runs.tie} up to step {runs.release}, and each counts as a "
            "run of its own; expected independent runs, twins with release=0, or one of them, "
            "twins.a."
        )
    run = runs if isinstance(runs, Run) else runs.run
    steps, items = run.settings.steps, len(run.labels)
    planned = planned_releases(releases, steps)
    total = len(planned) if planned else arguments.whole("releases", releases)
    contrasts = Contrasts(run.labels.tolist(), items)
    squared = not is_stochastic(run.model, run.settings)
    seeds = sum(twin_seeds(seed, items), [])[:items]
    found: dict[int, dict[str, Agreement]] = {}
    with once():
        own = side(outcomes, run.finished, contrasts)

        def go(chosen: Sequence[int]) -> None:
            done = ends(returns(run, chosen, seeds), batch)
            for release, x in zip(chosen, done, strict=True):
                found[release] = {}
                for name, stats in statistics(outcomes, own, x, contrasts).items():
                    if isinstance(runs, Twins):
                        stats = stats.unflatten(1, (2, -1)).sum(1)
                    found[release][name] = Agreement.of(stats)
                if progress is not None:
                    progress(len(found), total)

        if planned:
            go(planned)
        while len(found) < total:
            seen = {
                r: np.concatenate([curve(stats, squared=squared) for stats in of.values()])
                for r, of in found.items()
            }
            go([steepest(seen, steps)])
    order = tuple(sorted(found))
    stacked = {o.name: Agreement.stack([found[r][o.name] for r in order]) for o in outcomes}
    return Curves.of("there_and_back", order, run, outcomes, stacked, squared)
