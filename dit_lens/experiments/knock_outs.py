"""Which layers cause the gap: knock each layer out of the whole run and see how far the gap moves.

A layer is knocked out by leaving its stream as it came (what its attention and MLP would add is 0),
at every step and in every twin. The gap of what the model then generates is measured in one pass,
on the same starts and the same noise as without, so that the two gaps can be subtracted pair by
pair. A layer that merely shows the difference between the bands, without anything reading it, moves
nothing.

28 layers are tested at once. Their intervals are simultaneous: effect +- c * standard error, c the
95 % quantile of the largest |t| of all layers over the bootstrap (the studentised maximum, Romano &
Wolf 2005, "Exact and approximate stepdown methods for multiple hypothesis testing", JASA 100,
without its stepdown).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue
from ..measures.bands import CUT, Bands
from ..measures.commitment import FEWEST_PAIRS, commitment_draws, half_crossing, resample
from ..model.hooked import HookedDiT
from ..sampling.run import Run
from ..twinning.coupling import CouplingForm
from ..twinning.twins import Twins, paired_labels, twins
from .coupling_sweep import difference
from .release import latents, one_pass

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]
Part = Literal["layer", "attn", "mlp"]
PARTS: dict[str, tuple[str, ...]] = {"layer": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}
MATTERS = 0.25
"""Steps.

A smaller effect is named no cause, however certain: finite steps and the fitted logistic make as
much of nothing.
"""


def knocked_out(run: Run, layers: Sequence[int], part: Part = "layer", direct: bool = False) -> Run:
    """The run again, from the same start and with the same noise, with what these layers add to the
    stream set to 0.

    With `direct` only the last layer misses it, and the layers between work on as if it were there:
    what the knock-out does beyond that is mediated by them.

    Raises:
        ValueError: for a layer that does not exist, or an unknown part.

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=2)
    >>> bool((knocked_out(run, [5]).x0 != run.x0).any())
    True
    """
    n = run.model.cfg.n_layers
    for layer in layers:
        if not 0 <= layer < n:
            raise InvalidValue(
                f"There is no layer {layer} to knock out; the model has {n}, counted from 0."
            )
    if part not in PARTS:
        raise InvalidValue(f"part={part!r} is none of a layer; expected 'layer', 'attn' or 'mlp'.")
    names = [f"blocks.{layer}.hook_{of}_out" for layer in layers for of in PARTS[part]]
    if not direct:
        return run.replay(0, [(name, _nothing) for name in names])
    added: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        added.append(activation)

    def take_off(stream: Tensor, hook: Any) -> Tensor:
        left = stream - torch.stack(added).sum(0) if added else stream
        added.clear()
        return left

    return run.replay(
        0, [*((name, keep) for name in names), (f"blocks.{n - 1}.hook_resid_post", take_off)]
    )


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
    progress: Callable[[int], object] | None = None,
) -> xr.Dataset:
    """The gap without each layer in turn, and how far that moved it, in steps.

    Returns a Dataset: `gap` and `effect` (the gap without the layer less the gap with it) [layer];
    `effect_interval` [layer, bound], 95 % for all layers at once; `commitment` [layer, band]; with
    `direct` also `direct_effect` and `mediated_effect`, which add up to `effect`, each with its
    `_interval`; attrs: the `gap` and `gap_interval` of the whole model, `causes`, the layers whose
    effect is not 0, and the `sentence`. NaN where a band no longer commits within the run: without
    that layer the model decides nothing.

    Raises:
        ValueError: for a layer that does not exist, too few pairs, or a model whose bands don't
            commit to begin with.

        knock_outs(dit_lens.load("digits"), layers=[0, 14, 27], pairs=16, steps=20).attrs["sentence"]
    """
    chosen = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    if pairs < 2 * FEWEST_PAIRS:
        raise InvalidValue(
            f"There are {pairs} pairs; intervals over pairs with class means removed need "
            f"{2 * FEWEST_PAIRS} or more."
        )
    reading = latents(Bands.radial(model.cfg.pixels, cut=cut))
    labels = paired_labels(model, pairs)
    whole = twins(model, pairs, labels, steps=steps, seed=seed)

    def taus(pair: Twins) -> Array:  # [resample, band], in steps
        curves = one_pass(pair, [reading])
        return commitment_draws(
            curves.stats["latents"],
            curves.releases,
            curves.log_snr,
            squared=True,
            resamples=resamples,
            seed=seed,
        )

    before = taus(whole)
    if not np.isfinite(before[0]).all():
        raise InvalidValue(
            "The model's low or high band does not commit within the run, so it has no gap to find "
            "causes of."
        )
    after, straight = [], []
    for layer in chosen:
        after.append(taus(replace(whole, run=knocked_out(whole.run, [layer], part))))
        if direct:
            straight.append(
                taus(replace(whole, run=knocked_out(whole.run, [layer], part, direct=True)))
            )
        if progress is not None:
            progress(layer)
    result = _effects(
        before,
        np.stack(after),
        chosen,
        "knocked out",
        part=part,
        pairs=pairs,
        steps=steps,
        seed=seed,
        cut=cut,
    )
    gap = before[:, 1] - before[:, 0]
    if direct:
        both, alone = (
            tau[..., 1] - tau[..., 0] - gap for tau in (np.stack(after), np.stack(straight))
        )
        for name, draws in (("direct_effect", alone), ("mediated_effect", both - alone)):
            result[name] = ("layer", draws[:, 0])
            result[f"{name}_interval"] = (("layer", "bound"), _simultaneous(draws))
    return result


def coupled_alone(
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
    progress: Callable[[int], object] | None = None,
) -> xr.Dataset:
    """The gap of twins coupled in one layer alone, each in turn, and how far that moved it, in
    steps.

    The gap is that of `dit_lens.experiments.coupling_sweep`: twins that start `eps` apart part in
    each band at some step. Returns `gap`, `effect`, its interval, `commitment` and attrs as
    `knock_outs` does. A layer whose attention makes the bands part at different steps takes the gap
    away.

    Raises:
        ValueError: for a layer that does not exist, a coupling that is none, too few pairs, or
            twins that don't part to begin with.

        coupled_alone(dit_lens.load("digits"), layers=[0, 14, 27], pairs=16, steps=20).attrs["sentence"]
    """
    chosen = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    counts = np.concatenate([np.ones((1, pairs)), resample(pairs, resamples, seed)])
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
        return half_crossing(difference(pair, bands, counts))

    before = taus(0.0, None)
    if not np.isfinite(before[0]).all():
        raise InvalidValue(
            "The uncoupled twins do not part within the run in both bands, so there is no gap to "
            "find causes of."
        )
    after = []
    for layer in chosen:
        after.append(taus(g, [layer]))
        if progress is not None:
            progress(layer)
    return _effects(
        before,
        np.stack(after),
        chosen,
        "coupled",
        g=g,
        form=form,
        eps=eps,
        pairs=pairs,
        steps=steps,
        seed=seed,
        cut=cut,
    )


def _effects(before: Array, after: Array, layers: list[int], done: str, **attrs: Any) -> xr.Dataset:
    """What became of the gap, from commitments before [resample, band] and after [layer, resample,
    band].
    """
    import xarray as xr

    gap, was = after[..., 1] - after[..., 0], before[:, 1] - before[:, 0]
    effect = gap - was
    interval, own = _simultaneous(effect), np.nanquantile(was[1:], [0.025, 0.975])
    sure = (interval[:, 0] > 0) | (interval[:, 1] < 0)
    causes = [
        layer
        for layer, yes, size in zip(layers, sure, effect[:, 0], strict=True)
        if yes and abs(size) > MATTERS
    ]
    result = xr.Dataset(
        {
            "gap": ("layer", gap[:, 0]),
            "effect": ("layer", effect[:, 0]),
            "effect_interval": (("layer", "bound"), interval),
            "commitment": (("layer", "band"), after[:, 0]),
        },
        coords={"layer": layers, "band": ["low", "high"], "bound": ["low", "high"]},
        attrs={"gap": float(was[0]), "gap_interval": own.tolist(), "causes": causes, "done": done}
        | attrs,
    )
    result.attrs["sentence"] = _sentence(result)
    return result


def _nothing(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


def _simultaneous(effect: Array) -> Array:
    """95 % intervals [layer, bound] that hold for all layers at once, from effects [layer, 1 +
    resample]; NaN where unknown.
    """
    with warnings.catch_warnings():
        # a layer without which nothing commits is NaN throughout
        warnings.simplefilter("ignore", RuntimeWarning)
        known = np.isfinite(effect[:, 0]) & (np.isfinite(effect[:, 1:]).mean(1) > 0.9)
        wobble = effect[:, 1:] - np.nanmean(effect[:, 1:], axis=1, keepdims=True)
        error = np.where(known, np.nanstd(effect[:, 1:], axis=1, ddof=1), np.nan)
        largest = (
            np.nanmax(np.abs(wobble[known] / np.maximum(error[known, None], 1e-9)), axis=0)
            if known.any()
            else np.array([np.nan])
        )
        width = np.nanquantile(largest, 0.95) * error
    return np.stack([effect[:, 0] - width, effect[:, 0] + width], -1)


def _sentence(result: Any) -> str:
    gap, done, causes, n = (
        result.attrs["gap"],
        result.attrs["done"],
        result.attrs["causes"],
        len(result.layer),
    )
    low, high = result.attrs["gap_interval"]
    whole = f"the gap of {gap:+.2f} steps [{low:+.2f}, {high:+.2f}]"
    lost = [int(layer) for layer in result.layer.values[~np.isfinite(result.effect.values)]]
    undecided = (
        f" Without layer{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))} a band does not "
        "commit at all."
        if lost
        else ""
    )
    if not causes:
        return f"No layer of {n}, {done} by itself, moves {whole} measurably.{undecided}"
    order = sorted(causes, key=lambda layer: -abs(float(result.effect.sel(layer=layer))))
    words = []
    for layer in order[:5]:
        one = result.sel(layer=layer)
        words.append(
            f"{layer} ({float(one.effect):+.2f} [{float(one.effect_interval[0]):+.2f}, "
            f"{float(one.effect_interval[1]):+.2f}])"
        )
    more = f" and {len(order) - 5} more" if len(order) > 5 else ""
    head = f"{done.capitalize()} one by one, {len(causes)} of {n} layers move {whole}"
    return (
        f"{head}: {', '.join(words)}{more}, largest first; 95 % for all layers at once.{undecided}"
    )
