"""The knob: twins coupled through attention with strength g for the whole run, and what becomes of
the gap as g grows.

Twins start a little apart (z+- = sqrt(1 - eps²) z +- eps xi), run on a deterministic sampler and
are never released, so that g is all that changes. With shared noise and a stochastic sampler they
would fall together whatever g is, and there would be nothing to measure. "The gap" is asked for in
two senses, since one can collapse and the other not:

- `parting`: the twins' predicted x0 part in each band at some step, where the energy of their
  difference has reached half of what it ends at; the gap is the high band's step less the low
  band's. For Gaussian data that step is E1's, abar = 1/(1 + lambda): Var(x0hat) there is half of
  Var(x0), and the difference grows with it.
- `size`: log E_low - log E_high of the finished twins, E the share of the images' energy that the
  twins differ by.

Beside them the first-order routing factor rho = (1 - g)/(1 + g) and the `response` measured in
every layer: how much of the attention output's difference is left when the very same queries, keys
and values are coupled. It is rho only where the difference reaches the output through values and
keys; queries are each twin's own (see `dit_lens.twinning.coupling.linear_response`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue
from ..families.parts.attention import Kernel
from ..measures.bands import CUT, Bands
from ..measures.commitment import Agreement, agreement, half_crossing, resample
from ..model.hooked import HookedDiT
from ..sampling.guidance import model_inputs
from ..twinning.coupling import CouplingForm, check_coupling, coupled_attention, linear_response
from ..twinning.twins import Twins, paired_labels, twins

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]
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
    progress: Callable[[float], object] | None = None,
) -> xr.Dataset:
    """The gap against the coupling, all strengths on the same pairs.

    Returns a Dataset: `parting` [g, band] in steps; `difference` [g, step, band], the difference
    energies of the predicted x0 as a share of the finished images'; for each `sense` its `gap` [g,
    sense] and `change` [g, sense] from the first strength, with `_interval`s [..., bound] (95 %,
    percentile bootstrap over pairs, the same resamples at every g); `rho` [g]; `response` and its
    first-order prediction `linear` [g, layer], at step attrs["step"]. attrs["sentence_parting"] and
    attrs["sentence_size"] say whether it collapses.

    Raises:
        ValueError: for a strength below 0 or not finite, fewer than two of them, a first one that
            isn't the least, too few pairs.

        couplings(dit_lens.load("digits"), [0, 0.5, 1], pairs=16, steps=25).attrs["sentence_parting"]
    """
    import xarray as xr

    gs = checked_strengths(strengths, form)
    counts = np.concatenate([np.ones((1, pairs)), resample(pairs, resamples, seed)])
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    labels = paired_labels(model, pairs)
    parted, gaps, energy = [], [], []
    responses: list[tuple[Array, Array]] = []
    for g in gs:
        pair = twins(
            model,
            pairs,
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
        curves = difference(pair, bands, counts)
        tau, last = half_crossing(curves), np.log(np.maximum(curves[..., -1], 1e-30))
        parted.append(tau[0])
        gaps.append(np.stack([tau[:, 1] - tau[:, 0], last[:, 0] - last[:, 1]], -1))
        energy.append(curves[0].T)
        # the same twins, coupled by every g in turn; at the step by which the weakest have parted
        if not responses:
            at = int(np.nan_to_num(np.nanmean(tau[0]) if np.isfinite(tau[0]).any() else steps / 2))
            responses = _responses(pair, gs, form, at)
        if progress is not None:
            progress(g)
    measured, linear = (np.stack([r[i] for r in responses]) for i in (0, 1))
    gap = np.stack(gaps)  # [g, resample, sense]
    change = gap - gap[:1]
    result = xr.Dataset(
        {
            "parting": (("g", "band"), np.stack(parted)),
            "difference": (("g", "step", "band"), np.stack(energy)),
            "gap": (("g", "sense"), gap[:, 0]),
            "gap_interval": (("g", "sense", "bound"), _ends(gap)),
            "change": (("g", "sense"), change[:, 0]),
            "change_interval": (("g", "sense", "bound"), _ends(change)),
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
    """The strengths as numbers; ValueError unless there are two or more, rising, each a strength."""
    gs = [float(g) for g in strengths]
    for g in gs:
        check_coupling(g, form)
    if len(gs) < 2 or sorted(set(gs)) != gs:
        raise InvalidValue(
            f"strengths is {gs}; expected two or more in increasing order, the weakest first, such "
            "as 0, 0.5, 1."
        )
    return gs


def collapse(results: Any, sense: str) -> str:
    """Whether the gap collapses between the weakest and the strongest coupling, in one sense, in
    words.
    """
    one = results.sel(sense=sense)
    (first, last), unit = (one.isel(g=i) for i in (0, -1)), " steps" if sense == "parting" else ""

    def words(value: Any, interval: Any) -> str:
        low, high = (float(v) for v in interval)
        return f"{float(value):+.2f} [{low:+.2f}, {high:+.2f}]{unit}"

    (a, b), (low, high) = first.gap_interval.values, last.change_interval.values
    what = f"The gap ({SENSES[sense]})"
    if not np.isfinite([a, b, low, high]).all():
        return f"{what} can't be given at both ends: a band's twins are apart from the first step, or never part."
    before, after = float(first.gap), float(last.gap)
    here, there = (float(one.g[i]) for i in (0, -1))
    if a <= 0 <= b:
        verdict = "there is none to collapse at the weakest coupling"
    elif low <= 0 <= high:
        verdict = "no change can be told with this many pairs"
    elif last.gap_interval.values[0] <= 0 <= last.gap_interval.values[1]:
        verdict = "it collapses: none can be told from zero at the strongest coupling"
    elif before * after < 0:
        verdict = "it does not collapse but changes sign"
    else:
        verdict = (
            "it shrinks but does not collapse"
            if abs(after) < abs(before)
            else "it does not collapse but grows"
        )
    return (
        f"{what}: {verdict}; {words(first.gap, first.gap_interval)} at g = {here:g}, "
        f"{words(last.gap, last.gap_interval)} at g = {there:g}."
    )


def difference(pair: Twins, bands: Bands, counts: Array) -> Array:
    """|P_b(x0_A - x0_B)|² of the predicted x0 over |P_b x_A|² + |P_b x_B|² of the finished images,
    [resample, band, step].

    Without each class's mean image, which is most of the low band's energy, and no twin chose it.
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


def _ends(draws: Array) -> Array:
    """[g, resample, sense] -> [g, sense, bound]; NaN if any resample is: a band that may not part
    has no interval.
    """
    return np.moveaxis(np.quantile(draws[:, 1:], [0.025, 0.975], axis=1), 0, -1)
