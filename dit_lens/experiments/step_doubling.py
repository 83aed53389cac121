"""Does the answer depend on the number of steps? The same model sampled in twice as many.

Commitment is that of the sampler as it is run. A sampler of few steps decides a band earlier than
the continuous process does, the more so the less variance the band has: on exact Gaussian data in
50 DDIM steps a band of variance 4 by 0.13 in log SNR (0.6 steps), one of variance 0.25 by 0.35 (1.2
steps). The error falls as 1 / steps, so that two runs give the limit: 2 x the doubled run's answer
- the run's own (Richardson's extrapolation, to first order).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from .. import arguments
from ..measures import Array
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, interval
from ..measures.commitment import commitment_draws
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..twinning.twins import paired_labels, twins
from .gap import CLASS_MEANS
from .outcomes import latents
from .release import one_pass


def step_doubling(
    model: HookedDiT,
    pairs: int = 48,
    steps: int = 50,
    *,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    batch: int | None = None,
) -> xr.Dataset:
    """Commitment and gap by one pass in `steps` steps, in twice as many, and in the limit.

    In log SNR, in which runs of different lengths can be compared.

    Args:
        model: the opened model, with a scheduler.
        pairs: of twins, 16 or more.
        steps: of the shorter run, 4 or more.
        seed: of the twins and of the bootstrap.
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        batch: images that go through the model at once; None is all.

    Returns:
        xr.Dataset: `commitment` [run, band] and `gap` [run], in log SNR, the runs "steps",
            "doubled" and "limit"; `shift` [], how far doubling moves the gap; each with its
            `_interval` [..., bound], 95 %. attrs["sentence"] says it.

    Raises:
        InvalidValue: for too few pairs or steps.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> step_doubling(model, pairs=16, steps=4, resamples=50).run.values.tolist()
    ['steps', 'doubled', 'limit']
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
    steps = arguments.whole("steps", steps, 4)
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    resamples = arguments.whole("resamples", resamples, 1)
    outcome = latents(Bands.radial(model.cfg.pixels, cut=cut))
    labels = paired_labels(model, pairs)

    # [1 + resample, band] in log SNR; the two runs share nothing, so neither do their resamples
    drawn: list[Array] = []
    for number, length in enumerate((steps, 2 * steps)):
        settings: dict[str, Any] = {"steps": length, "seed": seed + number, "batch": batch}
        curves = one_pass(twins(model, pairs, labels, **settings), [outcome])
        taus = commitment_draws(
            curves.stats[outcome.name],
            curves.releases,
            curves.log_snr,
            squared=True,
            resamples=resamples,
            seed=seed + number,
        )
        drawn.append(np.interp(taus, np.arange(length), curves.log_snr))
    runs = np.stack([*drawn, 2 * drawn[1] - drawn[0]], 1)  # [1 + resample, run, band]
    gap = runs[..., 1] - runs[..., 0]
    shift = gap[:, 1] - gap[:, 0]
    variables = {
        "commitment": (("run", "band"), runs[0]),
        "commitment_interval": (("run", "band", "bound"), interval(runs, pairs)),
        "gap": ("run", gap[0]),
        "gap_interval": (("run", "bound"), interval(gap, pairs)),
        "shift": ((), shift[0]),
        "shift_interval": ("bound", interval(shift, pairs)),
    }
    coords = {
        "run": ["steps", "doubled", "limit"],
        "band": ["low", "high"],
        "bound": ["low", "high"],
    }
    result = xr.Dataset(variables, coords).assign_attrs(
        pairs=pairs, steps=steps, seed=seed, cut=cut
    )
    result.attrs["sentence"] = doubling_sentence(result)
    return result


def doubling_sentence(result: xr.Dataset) -> str:
    """How far doubling the steps moves the gap.

    Args:
        result: of `step_doubling`.
    """
    first, second, limit = (Estimate.of(result.gap[i], result.gap_interval[i]) for i in range(3))
    shift, steps = Estimate.of(result["shift"], result.shift_interval), result.attrs["steps"]
    if not (first.known and second.known and shift.known):
        return (
            f"In {steps} and {2 * steps} steps no gap can be compared: a band does not commit "
            "within one of the runs."
        )
    verdict = "which moves it" if shift.sign else "no change that can be told"
    return (
        f"The gap by one pass, in log SNR, is {first:+.2f} in {steps} steps and {second:+.2f} in "
        f"{2 * steps}, {verdict} ({shift:+.2f}); extrapolated to endlessly many steps it is "
        f"{limit:+.2f}."
    )
