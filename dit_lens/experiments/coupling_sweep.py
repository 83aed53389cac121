"""The coupling sweep: twins coupled through attention with strength g for the whole run, and what
becomes of the gap as g grows.

Twins start a little apart (z+- = sqrt(1 - eps²) z +- eps xi), run on a deterministic sampler and
are never released, so that g is all that changes. With shared noise and a stochastic sampler they
would fall together whatever g is, and there would be nothing to measure. "The gap" is asked for in
two senses, since one can collapse and the other not:

- `parting`: the twins' predicted x0 part in each band at some step, where the energy of their
  difference has reached half of what it ends at; the gap is the high band's step less the low
  band's. For Gaussian data of variance lambda that step is at abar = 1/(1 + lambda) (E1 in
  docs/checks.md): Var(x0hat) there is half of Var(x0), and the difference grows with it.
- `size`: log E_low - log E_high of the finished twins, E the share of the images' energy that the
  twins differ by.

The dataset also has the first-order routing factor rho = (1 - g)/(1 + g) and the `response` that is
measured in every layer: how much of the attention output's difference is left when the very same
queries, keys and values are coupled. It is rho only where the difference reaches the output through
values and keys; queries are each twin's own (see `dit_lens.twinning.coupling.linear_response`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..families.parts.attention import Kernel
from ..measures import Array
from ..measures.agreement import Agreement, agreement
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, interval
from ..measures.crossing import half_crossing
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..sampling.guidance import model_inputs
from ..twinning.coupling import CouplingForm, check_coupling, coupled_attention, linear_response
from ..twinning.twins import Twins, paired_labels, twins

SENSES = {
    "parting": "steps between the bands' parting",
    "size": "log ratio of the finished difference",
}


def couplings(
    model: HookedDiT,
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0),
    *,
    form: CouplingForm = "mix",
    layers: Sequence[int] | None = None,
    eps: float = 0.1,
    pairs: int = 32,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> xr.Dataset:
    """The gap against the coupling, all strengths on the same pairs.

    Args:
        model: the opened model, with a scheduler.
        strengths: two or more, in increasing order.
        form: "mix" or "joint"; see `dit_lens.twins`.
        layers: in which the twins are coupled; by default all.
        eps: how far apart the twins start.
        pairs: of twins, 8 or more.
        steps: of denoising.
        seed: of the twins and of the bootstrap.
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs; the same at every strength.
        progress: called with (done, total) strengths.

    Returns:
        xr.Dataset: `parting` [g, band], in steps; `difference` [g, step, band], the energy of the
            difference of the predicted x0 as a share of the finished images'; `gap` [g, sense] and
            `change` [g, sense] from the first strength, each with its `_interval` [..., bound] (95
            %, bootstrap over pairs); `rho` [g]; `response` and its first-order prediction `linear`
            [g, layer], at step attrs["step"]. attrs["sentence_parting"] and
            attrs["sentence_size"] say whether the gap collapses.

    Raises:
        InvalidValue: for a strength below 0 or not finite, fewer than two of them, a first one that
            isn't the least, or too few pairs.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = couplings(model, [0, 1], pairs=8, steps=6, resamples=100)
    >>> found.gap.dims, found.rho.values.tolist()
    (('g', 'sense'), [1.0, 0.0])
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    gs, seed = checked_strengths(strengths, form), arguments.seed("seed", seed)
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    steps = arguments.whole("steps", steps, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    counts = draws(pairs, resamples, seed)
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    labels = paired_labels(model, pairs)

    # every strength on the same pairs
    parted, gaps, energy = [], [], []
    responses: list[tuple[Array, Array]] = []
    for done, g in enumerate(gs, start=1):
        pair = coupled_twins(model, labels, g, form, layers=layers, eps=eps, steps=steps, seed=seed)
        curves = difference_curves(pair, bands, counts)
        tau, last = half_crossing(curves), np.log(np.maximum(curves[..., -1], 1e-30))
        parted.append(tau[0])
        gaps.append(np.stack([tau[:, 1] - tau[:, 0], last[:, 0] - last[:, 1]], -1))
        energy.append(curves[0].T)
        # the same twins, coupled by every g in turn; at the step by which the weakest have parted
        if not responses:
            at = int(np.nan_to_num(np.nanmean(tau[0]) if np.isfinite(tau[0]).any() else steps / 2))
            responses = _responses(pair, gs, form, at)
        if progress is not None:
            progress(done, len(gs))

    # a band that does not part in some resample has no interval
    rows = pairs - len(set(labels))
    gap = np.stack(gaps, 1)  # [resample, g, sense]
    change = gap - gap[:, :1]
    measured, linear = (np.stack([r[i] for r in responses]) for i in (0, 1))
    result = xr.Dataset(
        {
            "parting": (("g", "band"), np.stack(parted)),
            "difference": (("g", "step", "band"), np.stack(energy)),
            "gap": (("g", "sense"), gap[0]),
            "gap_interval": (("g", "sense", "bound"), interval(gap, rows, skip_nan=False)),
            "change": (("g", "sense"), change[0]),
            "change_interval": (("g", "sense", "bound"), interval(change, rows, skip_nan=False)),
            "rho": ("g", [(1 - g) / (1 + g) for g in gs]),
            "response": (("g", "layer"), measured),
            "linear": (("g", "layer"), linear),
        },
        coords={
            "g": gs,
            "band": list(bands.names),
            "step": np.arange(steps),
            "sense": list(SENSES),
            "bound": ["low", "high"],
            "layer": np.arange(model.cfg.n_layers),
        },
        attrs={
            "form": form,
            "eps": eps,
            "pairs": pairs,
            "steps": steps,
            "seed": seed,
            "cut": cut,
            "step": at,
        },
    )
    for sense in SENSES:
        result.attrs[f"sentence_{sense}"] = collapse(result, sense)
    return result


def checked_strengths(strengths: Sequence[float], form: str = "mix") -> list[float]:
    """The strengths as numbers.

    Args:
        strengths: of the coupling.
        form: "mix" or "joint".

    Raises:
        InvalidValue: unless there are two or more in increasing order, each 0 or more and finite.

    >>> checked_strengths([0, 1])
    [0.0, 1.0]
    """
    expected = "two or more strengths in increasing order, such as 0, 0.5, 1"
    gs = [check_coupling(g, form)[0] for g in arguments.listed("strengths", strengths, expected)]
    if len(gs) < 2 or sorted(set(gs)) != gs:
        raise InvalidValue(
            f"strengths is {gs}; expected two or more in increasing order, the weakest first, such "
            "as 0, 0.5, 1."
        )
    return gs


def collapse(results: xr.Dataset, sense: str) -> str:
    """Whether the gap collapses between the weakest and the strongest coupling, as a sentence.

    Args:
        results: of `couplings`.
        sense: "parting" or "size".
    """
    first, last = (results.sel(sense=sense).isel(g=i) for i in (0, -1))
    before, after = (Estimate.of(one.gap, one.gap_interval) for one in (first, last))
    change = Estimate.of(last.change, last.change_interval)
    what = f"The gap ({SENSES[sense]})"
    if not (before.known and after.known and change.known):
        return (
            f"{what} can't be given at both ends: a band's twins are apart from the first step, or "
            "never part."
        )
    if not before.sign:
        verdict = "there is none to collapse at the weakest coupling"
    elif not change.sign:
        verdict = "no change can be told with this many pairs"
    elif not after.sign:
        verdict = "it collapses: none can be told from zero at the strongest coupling"
    elif before.value * after.value < 0:
        verdict = "it does not collapse but changes sign"
    elif abs(after.value) < abs(before.value):
        verdict = "it shrinks but does not collapse"
    else:
        verdict = "it does not collapse but grows"
    unit = " steps" if sense == "parting" else ""
    return (
        f"{what}: {verdict}; {before:+.2f}{unit} at g = {float(first.g):g}, "
        f"{after:+.2f}{unit} at g = {float(last.g):g}."
    )


def coupled_twins(
    model: HookedDiT,
    labels: Sequence[int],
    g: float,
    form: CouplingForm,
    *,
    layers: Sequence[int] | None,
    eps: float,
    steps: int,
    seed: int,
) -> Twins:
    """Twins that start `eps` apart and are coupled for the whole run, a pair a label.

    Args:
        model: the opened model.
        labels: one a pair.
        g: the strength of the coupling.
        form: "mix" or "joint".
        layers: in which they are coupled; None is all.
        eps: how far apart they start.
        steps: of denoising.
        seed: decides all noise.
    """
    return twins(
        model,
        len(labels),
        labels,
        tie="attention",
        g=g,
        form=form,
        layers=layers,
        eps=eps,
        steps=steps,
        release=steps,
        seed=seed,
    )


def difference_curves(pair: Twins, bands: Bands, counts: Array) -> Array:
    """|P_b(x0_A - x0_B)|² of the predicted x0 over |P_b x_A|² + |P_b x_B|² of the finished images.

    Without each class's mean image, which is most of the low band's energy, and no twin chose it.

    Args:
        pair: the twins.
        bands: of the pixel grid.
        counts: [resample, pair], from `dit_lens.measures.bootstrap.draws`.

    Returns:
        Array: [resample, band, step].
    """
    labels = pair.a.labels.tolist()
    stats = Agreement.stack(
        [agreement(a, b, bands, labels) for a, b in zip(pair.a.x0, pair.b.x0, strict=True)]
    )
    xy, xx, yy = (np.einsum("rp,spb->rbs", counts, part) for part in stats)
    return np.asarray((xx + yy - 2 * xy) / (xx + yy)[..., -1:])


def _responses(
    pair: Twins, gs: Sequence[float], form: CouplingForm, step: int
) -> list[tuple[Array, Array]]:
    """For every g the measured and the first-order response of each layer's attention, ([layer],
    [layer]).

    How much of the uncoupled difference D(0) is left along itself: <D(g), D(0)> / |D(0)|², over
    pairs, heads and tokens. NaN for the first order where attention is linear: the formula is that
    of a softmax.
    """
    run, model = pair.run, pair.run.model
    n = model.cfg.n_layers
    measured, linear = np.full((2, len(gs), n), np.nan)

    def listener(layer: int) -> Callable[..., Tensor]:
        def look(
            z: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel
        ) -> Tensor:
            za, zb = z.chunk(2)
            plain = za - zb
            (qa, qb), (ka, kb), (va, vb) = (part.chunk(2) for part in (q, k, v))
            means = ((qa + qb) / 2, (ka + kb) / 2, (va + vb) / 2)
            for i, g in enumerate(gs):
                a, b = (
                    coupled_attention(z, q, k, v, g, form, 1, mask, kernel).chunk(2)
                    if g
                    else (za, zb)
                )
                measured[i, layer] = float(((a - b) * plain).sum() / plain.square().sum())
                if not getattr(kernel, "linear", False) and mask is None:
                    d = linear_response(*means, qa - qb, ka - kb, va - vb, g)
                    linear[i, layer] = float((d * plain).sum() / plain.square().sum())
            return z

        return look

    listening = {layer: listener(layer) for layer in range(n)}
    with torch.no_grad(), model.instrumentation.under(couplings=listening):
        t, guidance = run.timesteps[step], run.settings.guidance
        model(*model_inputs(model, run.latents[step], t, run.labels, guidance))
    return list(zip(measured, linear, strict=True))
