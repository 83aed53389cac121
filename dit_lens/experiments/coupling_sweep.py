"""The coupling sweep: twins coupled through attention with strength g, and what becomes of the gap
as g grows.

"The gap" is asked for in three senses, since one can collapse and the others not:

- `agreement`: the headline's. Twins that share their noise are coupled up to a release and then run
  alone, with noise of their own; commitment is the release at which the finished ones agree by
  half. At g = 0 these are clones that start a little apart.
- `parting`: twins start a little apart (z+- = sqrt(1 - eps²) z +- eps xi), run on a deterministic
  sampler and are never released, so that g is all that changes. Their predicted x0 part in each
  band at some step, where the energy of their difference has reached half of what it ends at; the
  gap is the high band's step less the low band's. For Gaussian data of variance lambda that step is
  at abar = 1/(1 + lambda) (E1 in docs/checks.md). It is normalised by what the twins end up
  differing by, so that it can collapse where nothing is decided at another time.
- `size`: log E_low - log E_high of these finished twins, E the share of the images' energy that the
  twins differ by.

What attention leaves of the twins' difference has two parts in every layer, measured on the very
same queries, keys and values: `routing`, through the values, to first order rho(g) = (1 - g)/(1 +
g) of what it is uncoupled, and `pattern`, through where attention looks, in the paper xi(g) = 1/(1
+ g) of it. And a coupling can push the model off its distribution: so the finished images at each g
are held against those at the weakest, by their energy in each band and by whether their label can
still be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from ..measures.commitment import commitment_draws
from ..measures.crossing import half_crossing
from ..measures.estimate import Estimate
from ..measures.proportion import proportion
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..model.pinned import sent
from ..pictures.result import Result
from ..pieces import Engine, Piece, enough, measured, results
from ..sampling.guidance import model_inputs
from ..sampling.run import decode
from ..twinning.coupling import CouplingForm, check_coupling, coupled_attention
from ..twinning.twins import Twins, chosen_labels, labels_of_fewer, twins
from .outcomes import latents
from .release import Curves, release_sweep

SENSES = {
    "agreement": "steps between the bands' commitment, by released twins",
    "parting": "steps between the bands' parting",
    "size": "log ratio of the finished difference",
}
RELEASES, RELEASED_PAIRS = 5, 24
"""How many releases, and of how many pairs at most, the sense `agreement` gets at each strength."""
NEAREST = "nearest to the mean image of its label among the images of other pairs at the weakest"


@measured
def couplings(
    model: HookedDiT,
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0),
    *,
    form: CouplingForm = "mix",
    layers: Sequence[int] | None = None,
    eps: float = 0.1,
    pairs: int = 32,
    labels: Labels | None = None,
    steps: int = 50,
    seed: int = 0,
    cut: float = CUT,
    reader: Callable[[Tensor], Tensor] | None = None,
    resamples: int = 1000,
    batch: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
    """The gap against the coupling, all strengths on the same pairs.

    Args:
        model: the opened model, with a scheduler.
        strengths: two or more, in increasing order.
        form: "mix" or "joint"; see `dit_lens.twins`.
        layers: in which the twins are coupled; by default all.
        eps: how far apart the twins start.
        pairs: of twins, 8 or more; the sense `agreement` takes 24 of them at most.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; each must have two
            pairs or more. By default the model's own.
        steps: of denoising, 5 or more.
        seed: of the twins and of the bootstrap.
        cut: between low and high, in cycles per pixel of the latents.
        reader: the label [n] that images [n, channel, height, width] in [0, 1] are read as; by
            default that of the nearest mean image.
        resamples: of the pairs; the same at every strength.
        batch: images that go through the model at once, twins together; None is all.
        progress: called with (done, total) strengths.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `parting` [g, band], in steps; `difference` [g, step, band], the energy of the
            difference of the predicted x0 as a share of the finished images'; `gap` [g, sense] and
            `change` [g, sense] from the first strength, each with its `_interval` [..., bound] (95
            %, bootstrap over pairs); `rho` [g] and `xi` [g], and what is measured of them,
            `routing` and `pattern` [g, layer], at step attrs["step"]; `energy` [g, band] of the
            finished images as a share of that at the first strength, and `read` [g], the share of
            images read as their label, each with its `_interval`. attrs["sentence_agreement"],
            attrs["sentence_parting"] and attrs["sentence_size"] say whether the gap collapses,
            attrs["sentence_quality"] whether the coupling pushes the model off its distribution.

    Raises:
        InvalidValue: for a strength below 0 or not finite, fewer than two of them, a first one that
            isn't the least, or too few pairs.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = couplings(model, [0, 1], pairs=8, steps=5, resamples=100)
    >>> found.gap.dims, found.rho.values.tolist()
    (('g', 'sense'), [1.0, 0.0])
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    gs, seed = checked_strengths(strengths, form), arguments.seed("seed", seed)
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    steps = checked_steps(steps)
    arguments.optional(arguments.function, "reader", reader, "of images; gives a label each")
    cut = arguments.number("cut", cut, above=0)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    counts = draws(pairs, resamples, seed)
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    own_labels = chosen_labels(model, pairs, labels)

    # every strength on the same pairs
    fewer, done = min(pairs, RELEASED_PAIRS), 0
    few = labels_of_fewer(model, fewer, labels)
    tie: dict[str, Any] = {"layers": layers, "eps": eps, "steps": steps}
    tie |= {"seed": seed, "batch": batch}

    def strength(g: float, first: bool) -> dict[str, Array]:
        pair = coupled_twins(model, own_labels, g, form, **tie)
        curves = difference_curves(pair, bands, counts)
        tau = half_crossing(curves)
        finished = pair.a.finished, pair.b.finished
        tied = coupled_twins(model, few, g, form, **tie, eta=1.0)
        sweep = release_sweep(tied, [latents(bands)], RELEASES, seed=seed, batch=batch)
        own, ends = _committed(sweep, resamples, seed)
        found = {
            "tau": tau,
            "last": curves[..., -1],
            "curve": curves[0].T,
            "finished": torch.stack(finished).cpu().numpy(),
            "energy": _energy(*finished, own_labels, bands, counts),
            "committed": own,
            "ends": np.asarray(ends),
        }
        if first:
            # the same twins, coupled by every g in turn; at the step by which the weakest parted
            known = np.isfinite(tau[0]).any()
            at = int(np.nan_to_num(np.nanmean(tau[0]) if known else steps / 2))
            routing, pattern = _responses(pair, gs, form, at, batch)
            found |= {"routing": routing, "pattern": pattern, "at": np.array(at)}
        return found

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(gs))

    pieces = [Piece(f"strength {g!r}", partial(strength, g, i == 0)) for i, g in enumerate(gs)]
    of_g = results(pieces, told)
    enough()
    weakest = of_g[0]
    routing, pattern, at = weakest["routing"], weakest["pattern"], int(weakest["at"])
    parted, curves_of = [of["tau"][0] for of in of_g], [of["curve"] for of in of_g]
    energies = [of["energy"] for of in of_g]
    last = [np.log(np.maximum(of["last"], 1e-30)) for of in of_g]
    gaps = [
        np.stack([of["tau"][:, 1] - of["tau"][:, 0], end[:, 0] - end[:, 1]], -1)
        for of, end in zip(of_g, last, strict=True)
    ]
    committed = [(of["committed"], of["ends"]) for of in of_g]
    # a reader may be a network: as all that is seen of images, it looks where they are wanted
    finished = [(x[0], x[1]) for x in (torch.from_numpy(np.array(of["finished"])) for of in of_g)]

    # a band that does not part in some resample has no interval
    rows, few_rows = pairs - len(set(own_labels)), fewer - len(set(few))
    gap = np.stack(gaps, 1)  # [resample, g, sense]
    own = np.stack([draw for draw, _ in committed], 1)[..., None]
    change, moved = gap - gap[:, :1], own - own[:, :1]
    agreed = np.array([ends for _, ends in committed])[:, None]
    energy = np.stack(energies, 1)  # [resample, g, band]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(energy / energy[:, :1])
    read = np.stack([_read(model, pair, finished[0], own_labels, reader) for pair in finished], 1)
    hits = counts @ read / pairs  # [resample, g]
    seen = [proportion(each, pairs) for each in read.sum(0)]
    result = xr.Dataset(
        {
            "parting": (("g", "band"), np.stack(parted)),
            "difference": (("g", "step", "band"), np.stack(curves_of)),
            "gap": (("g", "sense"), np.concatenate([own[0], gap[0]], -1)),
            "gap_interval": (
                ("g", "sense", "bound"),
                np.concatenate([agreed, interval(gap, rows, skip_nan=False)], 1),
            ),
            "change": (("g", "sense"), np.concatenate([moved[0], change[0]], -1)),
            "change_interval": (
                ("g", "sense", "bound"),
                np.concatenate(
                    [interval(moved, few_rows), interval(change, rows, skip_nan=False)], 1
                ),
            ),
            "rho": ("g", [(1 - g) / (1 + g) for g in gs]),
            "xi": ("g", [1 / (1 + g) for g in gs]),
            "routing": (("g", "layer"), routing),
            "pattern": (("g", "layer"), pattern),
            "energy": (("g", "band"), np.exp(share[0])),
            "energy_interval": (("g", "band", "bound"), np.exp(interval(share, rows))),
            "read": ("g", hits[0]),
            # resampled, none or all would have an interval of no width
            "read_interval": (("g", "bound"), [(e.low, e.high) for e in seen]),
            "read_change_interval": (("g", "bound"), interval(hits - hits[:, :1], pairs)),
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
            "released_pairs": fewer,
            "steps": steps,
            "seed": seed,
            "cut": cut,
            "step": at,
            "reader": "read as its label by the reader given" if reader else NEAREST,
        },
    )
    for sense in SENSES:
        result.attrs[f"sentence_{sense}"] = collapse(result, sense)
    result.attrs["sentence_quality"] = quality(result)
    return Result.of(result)


def checked_steps(steps: int) -> int:
    """The denoising steps, enough of them to release twins at.

    Args:
        steps: of denoising.

    >>> checked_steps(5)
    5
    """
    return arguments.whole("steps", steps, RELEASES, why="to release twins at")


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
        why = (
            "in some band the finished twins' agreement gives no moment of commitment"
            if sense == "agreement"
            else "a band's twins are apart from the first step, or never part"
        )
        return f"{what} can't be given at both ends: {why}."
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
    unit = "" if sense == "size" else " steps"
    return (
        f"{what}: {verdict}; {before:+.2f}{unit} at g = {float(first.g):g}, "
        f"{after:+.2f}{unit} at g = {float(last.g):g}."
    )


def quality(results: xr.Dataset) -> str:
    """Whether the finished images at each strength are still those of the weakest, as a sentence.

    Args:
        results: of `couplings`.
    """
    first, off = float(results.g[0]), []
    for g in results.g.values[1:]:
        one = results.sel(g=g)
        energies = {
            str(band): Estimate.of(one.energy.sel(band=band), one.energy_interval.sel(band=band))
            for band in results.band.values
        }
        moved = [f"{b} energy {e:.2f}" for b, e in energies.items() if e.low > 1 or e.high < 1]
        low, high = one.read_change_interval.values
        if low > 0 or high < 0:
            read = Estimate.of(one.read, one.read_interval)
            moved.append(f"read {read:.0%}")
        if moved:
            off.append(f"g = {float(g):g} ({', '.join(moved)})")
    start = Estimate.of(results.read[0], results.read_interval[0])
    judged = (
        f"judged by the energy of the finished images in each band, as a share of that at g = "
        f"{first:g}, and by the share of images {results.attrs['reader']} ({start:.0%} there)"
    )
    if not off:
        return f"Quality: no strength is shown to push the model off its distribution, {judged}."
    return (
        f"Quality: the model is pushed off its distribution at {'; '.join(off)}, {judged}: there "
        "the gap is not that of the model's own images."
    )


def _energy(a: Tensor, b: Tensor, labels: Sequence[int], bands: Bands, counts: Array) -> Array:
    """Of the finished images without each label's mean, [resample, band]."""
    _, xx, yy = agreement(a, b, bands, labels)
    return np.asarray(counts @ (xx + yy))


def _committed(sweep: Curves, resamples: int, seed: int) -> tuple[Array, Array]:
    """The gap of released twins in every resample, [resample], and its bootstrap-t interval."""
    (outcome,) = sweep.stats
    tau = commitment_draws(
        sweep.stats[outcome], sweep.releases, sweep.log_snr, resamples=resamples, seed=seed
    )
    fit = sweep.commitment(outcome, resamples=resamples, seed=seed).sel(quantity="step")
    known = np.isfinite(float(fit.gap))
    return np.where(known, tau[:, 1] - tau[:, 0], np.nan), fit.gap_interval.values


def _read(
    model: HookedDiT,
    pair: tuple[Tensor, Tensor],
    weakest: tuple[Tensor, Tensor],
    labels: Sequence[int],
    reader: Callable[[Tensor], Tensor] | None,
) -> Array:
    """How many of the two images of each pair are read as their label, a share, [pair]."""
    own = torch.as_tensor(labels)
    if reader is not None:
        shares = np.zeros(len(own))
        for x in pair:
            given = reader(decode(model, x))
            held = isinstance(given, Tensor)
            found = np.asarray(given.detach().cpu().to_dense().double() if held else given)
            if found.shape != (len(x),) or found.dtype.kind not in "iubf":
                raise InvalidValue(
                    f"The reader gave {arguments.shown(given)} for {len(x)} images; expected "
                    f"{len(x)} whole numbers, the labels they are read as."
                )
            shares += (found == own.numpy()) / 2
        return shares
    first = (weakest[0] + weakest[1]).flatten(1).double() / 2
    belongs = torch.nn.functional.one_hot(own).T.double()  # [label, pair]
    sums, n = belongs @ first, belongs.sum(1)
    hits = torch.zeros(len(own), dtype=torch.float64)
    for i, label in enumerate(labels):  # without its own pair
        means, count = sums.clone(), n.clone()
        means[label] -= first[i]
        count[label] -= 1
        known = count > 0
        distance = [
            (x[i].flatten().double() - means[known] / count[known, None]).square().sum(1)
            for x in pair
        ]
        names = torch.arange(len(n))[known]
        hits[i] = sum(float(names[d.argmin()] == label) for d in distance) / 2
    return hits.numpy()


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
    eta: float = 0.0,
    batch: int | None = None,
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
        eta: how stochastic the sampler is.
        batch: images that go through the model at once.
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
        eta=eta,
        batch=batch,
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
        [
            agreement(pair.run.here(a), pair.run.here(b), bands, labels)
            for a, b in zip(pair.a.x0, pair.b.x0, strict=True)
        ]
    )
    xy, xx, yy = (np.einsum("rp,spb->rbs", counts, part) for part in stats)
    return np.asarray((xx + yy - 2 * xy) / (xx + yy)[..., -1:])


def _responses(
    pair: Twins, gs: Sequence[float], form: CouplingForm, step: int, batch: int | None
) -> tuple[Array, Array]:
    """What every g leaves of the two parts of the attention's difference, each along itself, [g,
    layer]: <D(g), D(0)> / |D(0)|², over pairs, heads and tokens; NaN where there is no such part.

    Attention is linear in the values. With the twins' mean values in both, what is left of the
    difference is that of the patterns; the rest is routed through the values.
    """
    run, model = pair.run, pair.run.model
    n = model.cfg.n_layers
    # sums over the pairs: of both parts along themselves at every g, and of their squares at 0
    along = run.finished.new_zeros(2, len(gs), n, dtype=torch.float64)
    squares = run.finished.new_zeros(2, n, dtype=torch.float64)

    def listener(layer: int) -> Callable[..., Tensor]:
        def look(
            z: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel
        ) -> Tensor:
            mean = torch.stack(v.chunk(2)).mean(0).repeat(2, 1, 1, 1)
            alone = kernel(q, k, mean, mask)

            def parts(g: float) -> tuple[Tensor, Tensor]:
                outs = (
                    (coupled_attention(own, q, k, values, g, form, 1, mask, kernel) if g else own)
                    for own, values in ((z, v), (alone, mean))
                )
                whole, pattern = (a - b for a, b in (out.chunk(2) for out in outs))
                return whole - pattern, pattern

            plain = parts(0.0)
            for kind, own in enumerate(plain):
                squares[kind, layer] += own.square().sum()
            for i, g in enumerate(gs):
                for kind, (part, own) in enumerate(zip(parts(g), plain, strict=True)):
                    along[kind, i, layer] += (part * own).sum()
            return z

        return look

    listening = {layer: listener(layer) for layer in range(n)}
    at_once = pair.pairs if batch is None else max(1, batch // 2)
    whole, t = run.here(run.latents[step]), run.timesteps[step]
    with run.restored(), model.instrumentation.under(couplings=listening):
        for part in torch.arange(pair.pairs).split(at_once):
            rows = torch.cat([part, part + pair.pairs])
            x = whole[sent(rows, whole.device)]
            model(*model_inputs(model, x, t, run.labels[rows], run.settings.guidance))
    own = squares.cpu().numpy()
    own[own <= 1e-10 * own.sum(0)] = np.nan  # rounding is no part
    routing, pattern = along.cpu().numpy() / own[:, None]
    return routing, pattern
