"""Which layers cause the gap: knock each layer out of the whole run and see how far the gap moves.

A layer is knocked out by setting everything that it adds to 0, at every step and in every twin, so
that its streams leave it as they came: attention and MLP, and where a family has them
cross-attention, a second attention, and the additions to the text's stream
(`dit_lens.hooks.names.additions`). The gap of what the model then generates is measured in one
pass, on the same starts and the same noise as without, so that the two gaps can be subtracted pair
by pair. A layer that merely shows the difference between the bands, without anything reading it,
moves nothing.

All layers are tested at once, and their intervals hold for all of them together
(`dit_lens.measures.bootstrap.simultaneous`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..hooks.names import additions, site_of
from ..measures import Array
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, interval, simultaneous
from ..measures.commitment import commitment_draws
from ..measures.crossing import half_crossing
from ..measures.estimate import Estimate
from ..model.hooked import HookedDiT
from ..sampling.run import Run
from ..twinning.coupling import CouplingForm, check_coupling
from ..twinning.twins import Twins, paired_labels, twins
from .coupling_sweep import difference_curves
from .gap import CLASS_MEANS
from .outcomes import latents
from .release import Curves, one_pass

Part = Literal["layer", "attn", "mlp"]
STREAMS = ("", "text.")
MATTERS = 0.01
"""A share of the run's steps: a smaller effect is named no cause, however certain, since finite
steps and the fitted logistic make as much of nothing.
"""


def added_by(model: HookedDiT, layer: int, part: Part = "layer") -> list[str]:
    """The hook names of what a layer adds to the image's stream and to the text's.

    Args:
        model: the opened model.
        layer: the block; negative ones count from the end.
        part: "layer" for everything; "attn" or "mlp" for those additions alone.

    Returns:
        list[str]: in forward order, the image's stream first.

    Raises:
        InvalidValue: for a layer or a part that does not exist.

    >>> import dit_lens; added_by(dit_lens.load("digits"), 5)
    ['blocks.5.hook_attn_out', 'blocks.5.hook_mlp_out']
    """
    (layer,) = arguments.layers([layer], model.cfg.n_layers)
    arguments.choice("part", part, get_args(Part))
    found = [
        name
        for stream in STREAMS
        for place in additions(model.names, stream)
        if place.layer == layer
        for name in place.added
    ]
    chosen = [name for name in found if part in ("layer", _kind(name))]
    if not chosen:
        raise InvalidValue(
            f"Layer {layer} has no {part!r} part to knock out by itself; it adds "
            f"{', '.join(map(repr, found))}. Use part='layer'."
        )
    return chosen


def _kind(name: str) -> str:
    """What an addition is of: "attn", "mlp", or "attn mlp" if it holds both."""
    words = site_of(name).rpartition("hook_")[2].split("_")
    return " ".join(kind for kind in ("attn", "mlp") if any(w.startswith(kind) for w in words))


def knocked_out(run: Run, layers: Sequence[int], part: Part = "layer", direct: bool = False) -> Run:
    """The run again, from the same start and with the same noise, with everything that these layers
    add to their streams set to 0.

    Args:
        run: from `dit_lens.sample`, or a twin.
        layers: the blocks, negative ones from the end; none gives the run itself.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        direct: take the additions off the image's stream after the last layer only, so that the
            layers between work on as if nothing were missing: the direct effect. What the whole
            knock-out does beyond that is mediated by those layers.

    Returns:
        Run: as long as the first.

    Raises:
        InvalidValue: for a layer or a part that does not exist.

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=2)
    >>> bool((knocked_out(run, [5]).x0 != run.x0).any())
    True
    """
    arguments.instance("run", run, Run, "a run of dit_lens.sample, or a twin")
    arguments.flag("direct", direct)
    layers = arguments.layers(layers, run.model.cfg.n_layers, fewest=0)
    names = [name for layer in layers for name in added_by(run.model, layer, part)]
    if not direct:
        return run.replay(0, [(name, _zero) for name in names])
    added: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        added.append(activation)

    def take_off(stream: Tensor, hook: Any) -> Tensor:
        left = stream - torch.stack(added).sum(0) if added else stream
        added.clear()
        return left

    # the output is read from the image's stream alone
    own = [name for name in names if site_of(name).startswith("hook_")]
    last = f"blocks.{run.model.cfg.n_layers - 1}.hook_resid_post"
    return run.replay(0, [*((name, keep) for name in own), (last, take_off)])


def _chosen(model: HookedDiT, layers: Sequence[int] | None) -> list[int]:
    """The layers to go through; by default all."""
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    n = model.cfg.n_layers
    return list(range(n)) if layers is None else arguments.layers(layers, n)


def knock_outs(
    model: HookedDiT,
    layers: Sequence[int] | None = None,
    part: Part = "layer",
    *,
    direct: bool = False,
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> xr.Dataset:
    """The gap without each layer in turn, and how far that moved it.

    Args:
        model: the opened model, with a scheduler.
        layers: to knock out one by one; by default every layer.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        direct: also split each effect into a direct and a mediated one (see `knocked_out`); costs
            as much again.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins and of the bootstrap.
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        progress: called with (done, total) layers.

    Returns:
        xr.Dataset: in steps, `gap` and `effect` [layer], the gap without the layer, and that less
            the gap with it; `effect_interval` [layer, bound], 95 % for all layers at once;
            `commitment` [layer, band]; with `direct` also `direct_effect` and `mediated_effect`
            [layer], which add up to `effect`, each with its `_interval`. NaN where a band no longer
            commits within the run: without that layer the model decides nothing. Attributes: `gap`
            and `gap_interval` of the whole model, `causes`, the layers whose effect is not 0, and
            the `sentence`.

    Raises:
        InvalidValue: for a layer or a part that does not exist, too few pairs, or a model whose
            bands don't commit to begin with.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = knock_outs(model, [0], pairs=16, steps=6, resamples=100)
    >>> dict(found.effect_interval.sizes), "the gap of" in found.sentence
    ({'layer': 1, 'bound': 2}, True)
    """
    chosen = _chosen(model, layers)
    pairs = arguments.whole("pairs", pairs, 2 * FEWEST_PAIRS, why=CLASS_MEANS)
    steps = arguments.whole("steps", steps, 3, why="as many as a curve needs")
    resamples = arguments.whole("resamples", resamples, 1)
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    arguments.flag("direct", direct)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    for layer in chosen:
        added_by(model, layer, part)  # refuses what is not there, before anything runs

    # the gap of the whole model
    outcome = latents(Bands.radial(model.cfg.pixels, cut=cut))
    whole = twins(model, pairs, paired_labels(model, pairs), steps=steps, seed=seed)

    def taus(pair: Twins) -> Array:  # [resample, band], in steps
        return drawn(one_pass(pair, [outcome]))

    def drawn(curves: Curves) -> Array:
        return commitment_draws(
            curves.stats[outcome.name],
            curves.releases,
            curves.log_snr,
            squared=True,
            resamples=resamples,
            seed=seed,
        )

    curves = one_pass(whole, [outcome])
    before = drawn(curves)
    own = curves.commitment(outcome.name, resamples=resamples, seed=seed).sel(quantity="step")
    if not np.isfinite(before[0]).all():
        raise InvalidValue(
            "The model's low or high band does not commit within the run, so it has no gap to find "
            "causes of."
        )

    # the gap without each layer
    after, straight = [], []
    for done, layer in enumerate(chosen, start=1):
        after.append(taus(replace(whole, run=knocked_out(whole.run, [layer], part))))
        if direct:
            missed = knocked_out(whole.run, [layer], part, direct=True)
            straight.append(taus(replace(whole, run=missed)))
        if progress is not None:
            progress(done, len(chosen))
    settings: dict[str, Any] = {"part": part, "n_layers": model.cfg.n_layers}
    settings |= {"pairs": pairs, "steps": steps, "seed": seed, "cut": cut}
    gap = Estimate.of(own.gap, own.gap_interval)  # as `measure_gap` gives it
    result = _effects(gap, before, np.stack(after), chosen, "knocked out", settings, pairs)
    if direct:
        was = before[:, 1] - before[:, 0]
        total, alone = (
            tau[..., 1] - tau[..., 0] - was for tau in (np.stack(after), np.stack(straight))
        )
        for name, effect in (("direct_effect", alone), ("mediated_effect", total - alone)):
            result[name] = ("layer", effect[:, 0])
            result[f"{name}_interval"] = (("layer", "bound"), simultaneous(effect.T, pairs))
    return result


def couple_alone(
    model: HookedDiT,
    layers: Sequence[int] | None = None,
    g: float = 1.0,
    *,
    form: CouplingForm = "mix",
    eps: float = 0.1,
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> xr.Dataset:
    """The gap of twins coupled in one layer alone, each in turn, and how far that moved it.

    The gap is that of `couplings`: twins that start `eps` apart part in each band at some step. A
    layer whose attention makes the bands part at different steps takes the gap away.

    Args:
        model: the opened model, with a scheduler.
        layers: to couple one by one; by default every layer.
        g: the strength of the coupling, 0 or more.
        form: "mix" or "joint"; see `dit_lens.twins`.
        eps: how far apart the twins start.
        pairs: of twins, 8 or more.
        steps: of denoising.
        seed: of the twins and of the bootstrap.
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        progress: called with (done, total) layers.

    Returns:
        xr.Dataset: `gap`, `effect`, `effect_interval`, `commitment` and attributes as `knock_outs`
            gives them, the commitment being the step at which the twins part.

    Raises:
        InvalidValue: for a layer that does not exist, a coupling that is none, too few pairs, or
            twins that don't part to begin with.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = couple_alone(model, [0], pairs=8, steps=6, resamples=100)
    >>> dict(found.gap.sizes), found.attrs["g"]
    ({'layer': 1}, 1.0)
    """
    chosen = _chosen(model, layers)
    check_coupling(g, form)
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    counts = draws(pairs, resamples, seed)
    labels = paired_labels(model, pairs)

    def taus(strength: float, only: list[int] | None) -> Array:
        pair = twins(
            model,
            pairs,
            labels,
            tie="attention",
            g=strength,
            form=form,
            layers=only,
            eps=eps,
            steps=steps,
            release=steps,
            seed=seed,
        )
        return half_crossing(difference_curves(pair, bands, counts))

    before = taus(0.0, None)
    if not np.isfinite(before[0]).all():
        raise InvalidValue(
            "The uncoupled twins do not part within the run in both bands, so there is no gap to "
            "find causes of."
        )
    after = []
    for done, layer in enumerate(chosen, start=1):
        after.append(taus(g, [layer]))
        if progress is not None:
            progress(done, len(chosen))
    settings: dict[str, Any] = {"g": g, "form": form, "eps": eps, "n_layers": model.cfg.n_layers}
    settings |= {"pairs": pairs, "steps": steps, "seed": seed, "cut": cut}
    was, rows = before[:, 1] - before[:, 0], pairs - len(set(labels))
    gap = Estimate.of(was[0], interval(was, rows))
    return _effects(gap, before, np.stack(after), chosen, "coupled", settings, rows)


def _effects(
    whole: Estimate,
    before: Array,
    after: Array,
    layers: list[int],
    done: str,
    settings: dict[str, Any],
    rows: int,
) -> xr.Dataset:
    """What became of the gap, from commitments before [resample, band] and after [layer, resample,
    band], of so many independent rows.
    """
    gap, was = after[..., 1] - after[..., 0], before[:, 1] - before[:, 0]
    effect = gap - was
    ends, matters = simultaneous(effect.T, rows), MATTERS * settings["steps"]
    causes = [
        layer
        for layer, value, bound in zip(layers, effect[:, 0], ends, strict=True)
        if Estimate.of(value, bound).sign and abs(value) > matters
    ]
    result = xr.Dataset(
        {
            "gap": ("layer", gap[:, 0]),
            "effect": ("layer", effect[:, 0]),
            "effect_interval": (("layer", "bound"), ends),
            "commitment": (("layer", "band"), after[:, 0]),
        },
        coords={"layer": layers, "band": ["low", "high"], "bound": ["low", "high"]},
        attrs={
            "gap": whole.value,
            "gap_interval": [whole.low, whole.high],
            "causes": causes,
            "matters": matters,
            "done": done,
        }
        | settings,
    )
    result.attrs["sentence"] = effects_sentence(result)
    return result


def _zero(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


def effects_sentence(result: xr.Dataset) -> str:
    """Which layers move the gap, the largest effects first.

    Args:
        result: of `knock_outs` or `couple_alone`.
    """
    done, causes, n = result.attrs["done"], result.attrs["causes"], len(result.layer)
    whole = (
        f"the gap of {Estimate.of(result.attrs['gap'], result.attrs['gap_interval']):+.2f steps}"
    )
    lost = [int(layer) for layer in result.layer.values[~np.isfinite(result.effect.values)]]
    undecided = (
        f" Without layer{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} a band does not "
        "commit at all."
        if lost
        else ""
    )
    matters = f"{result.attrs['matters']:.2g} steps, {MATTERS:.0%} of the run"
    if not causes:
        who = f"No layer of {n}, {done} by itself," if n > 1 else f"The layer, {done}, does not"
        verb = "moves" if n > 1 else "move"
        return f"{who} {verb} {whole} measurably and by {matters}, or more.{undecided}"
    effects = {
        layer: Estimate.of(one.effect, one.effect_interval)
        for layer in causes
        for one in [result.sel(layer=layer)]
    }
    order = sorted(causes, key=lambda layer: -abs(effects[layer].value))
    largest = ", ".join(f"{layer} ({effects[layer]:+.2f})" for layer in order[:5])
    more = f" and {len(order) - 5} more" if len(order) > 5 else ""
    move = "moves" if len(causes) == 1 else "move"
    head = f"{done.capitalize()} one by one, {len(causes)} of {n} layers {move} {whole}"
    return (
        f"{head}: {largest}{more}, largest first; 95 % for all layers at once, and {matters}, or "
        f"more.{undecided}"
    )
