"""Which layers cause the gap: knock layers out of the whole run, or of some of its steps, and see
how far the gap moves.

The gap of what the model then generates is measured in one pass, on the same starts and the same
noise as without, so that the two gaps can be subtracted pair by pair. A layer that merely shows the
difference between the bands, without anything reading it, moves nothing. How a layer is knocked out
is said in `dit_lens.experiments.ablation`; the intervals hold for all cells of one call at once.

- `knock_outs`: layers one by one, or sets of layers; over the whole run, or by windows of steps.
- `cumulative`: the first k and the last k layers, for growing k.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.bands import CUT
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching.patch import steps_text
from ..pictures.result import Result
from ..pieces import Engine, enough, measured
from ..sampling.settings import Progress
from .ablation import How, Part, added_by, windows_of
from .effects import effects, together
from .knocked_gap import KnockedGap, gap_of, set_text

Sets = Sequence[int] | Sequence[Sequence[int]]


@measured
def knock_outs(
    model: HookedDiT,
    layers: Sets | None = None,
    part: Part = "layer",
    *,
    how: How = "zero",
    windows: int | Sequence[range] | None = None,
    direct: bool = False,
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    progress: Progress | None = None,
    batch: int | None = None,
    labels: Labels | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
    """The gap without each layer in turn, and how far that moved it.

    Args:
        model: the opened model, with a scheduler.
        layers: to knock out one by one, by default every layer; or sets of layers, as `[[3, 4],
            [5]]`, each knocked out together.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        how: what comes in place of what a layer adds: "zero", "mean" or "resample", see
            `knocked_out`. Resampling ties items of a label together, which the intervals leave out
            of account.
        windows: ranges of steps, or how many equal ones to cut the run into; each layer is then
            knocked out in each of them by itself. None is the whole run.
        direct: also split each effect into a direct and a mediated one (see `knocked_out`); costs
            as much again.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins, of the bootstrap and of how="resample".
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        progress: called with (done, total) knock-outs.
        batch: images that go through the model at once; None is all. With how="zero" only.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; by default the
            model's own.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: over layer (or set), and window where there are some, in steps: `gap` and
            `effect`, the gap without the layer, and that less the gap with it; `effect_interval`
            [..., bound], 95 % for all of them at once; `commitment` [..., band]; with `direct` also
            `direct_effect` and `mediated_effect`, which add up to `effect`, each with its
            `_interval`. NaN where a band no longer commits within the run: without that layer the
            model decides nothing. Attributes: `gap` and `gap_interval` of the whole model,
            `causes`, the layers whose effect is not 0, and the `sentence`.

    Raises:
        InvalidValue: for a layer or a part that does not exist, too few pairs, or a model whose
            bands don't commit to begin with.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = knock_outs(model, [0], pairs=16, steps=3, resamples=100)
    >>> dict(found.effect_interval.sizes), "the gap of" in found.sentence
    ({'layer': 1, 'bound': 2}, True)
    """
    del store, engine  # `measured` sees to them
    axis, sets = checked_sets(model, layers, part)
    arguments.choice("how", how, get_args(How))
    arguments.flag("direct", direct)
    steps = arguments.whole("steps", steps, 3, why="as many as a curve needs")
    spans = None if windows is None else windows_of(windows, 0, steps)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    settings: dict[str, Any] = {"pairs": pairs, "steps": steps, "cut": cut, "resamples": resamples}
    known = KnockedGap(model, part, how, seed=seed, **settings, batch=batch, labels=labels)
    return knocked(known, axis, sets, spans, direct, progress)


def knocked(
    known: KnockedGap,
    axis: str,
    sets: Sequence[list[int]],
    windows: Sequence[range] | None = None,
    direct: bool = False,
    progress: Progress | None = None,
) -> Result:
    """The dataset of `knock_outs`, with an engine that is already there.

    Args:
        known: the gap with and without parts.
        axis: "layer" where each set is one layer, else "set".
        sets: of layers.
        windows: of steps; None is the whole run.
        direct: whether the effects are split.
        progress: called with (done, total) knock-outs.
    """
    spans: Sequence[range | None] = [None] if windows is None else windows
    cells = [(layers, span) for layers in sets for span in spans]
    shape = (len(sets), len(spans))
    done = 0

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None and not done % len(kinds):
            progress(done // len(kinds), len(cells))

    kinds = (False, True) if direct else (False,)
    found = known.all([(*cell, kind) for cell in cells for kind in kinds], told)
    enough()
    after, straight = found[:: len(kinds)], found[1 :: len(kinds)]
    labels: dict[str, Any] = {axis: [_label(axis, layers) for layers in sets]}
    if windows is not None:
        labels["window"] = [steps_text(span) for span in windows]

    def grid(found: list[Array]) -> Array:  # [*cell, 1 + resample, band]
        stacked = np.stack(found)
        return stacked.reshape(*shape[: len(labels)], *stacked.shape[1:])

    whole = grid(after)
    result = effects(known.gap, known.before, whole, labels, known.pairs, known.attrs)
    if direct:
        was, axes = gap_of(known.before), tuple(labels)
        total, alone = (np.moveaxis(gap_of(tau) - was, -1, 0) for tau in (whole, grid(straight)))
        for name, effect in (("direct_effect", alone), ("mediated_effect", total - alone)):
            result[name] = (axes, effect[0])
            result[f"{name}_interval"] = ((*axes, "bound"), together(effect, known.pairs))
    return Result.of(result)


@measured
def cumulative(
    model: HookedDiT,
    depths: Sequence[int] | None = None,
    part: Part = "layer",
    *,
    how: How = "zero",
    pairs: int = 24,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    resamples: int = 1000,
    batch: int | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> Result:
    """The gap without the first k layers, and without the last k, for growing k.

    Args:
        model: the opened model, with a scheduler.
        depths: the values of k, in increasing order; by default every one from 1 to all layers.
        part: "layer" for everything that a layer adds; "attn" or "mlp" for those additions alone.
        how: what comes in place of what a layer adds, see `knocked_out`.
        pairs: of twins, 16 or more.
        steps: of denoising.
        seed: of the twins, of the bootstrap and of how="resample".
        cut: between low and high, in cycles per pixel of the latents.
        resamples: of the pairs.
        batch: images that go through the model at once; None is all. With how="zero" only.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; by default the
            model's own.
        progress: called with (done, total) knock-outs.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `gap`, `effect` [end, depth], their intervals and attributes as those of
            `knock_outs`; end is "first" or "last", depth is k. NaN where a band no longer commits.

    Raises:
        InvalidValue: for depths that are none, and as `knock_outs`.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> cumulative(model, [1], pairs=16, steps=3, resamples=100).effect.sizes
    Frozen({'end': 2, 'depth': 1})
    """
    del store, engine  # `measured` sees to them
    checked_sets(model, None, part)
    n = model.cfg.n_layers
    chosen = checked_depths(depths, n)
    arguments.choice("how", how, get_args(How))
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    settings: dict[str, Any] = {"pairs": pairs, "steps": steps, "cut": cut, "resamples": resamples}
    known = KnockedGap(model, part, how, seed=seed, **settings, batch=batch, labels=labels)
    return accumulated(known, chosen, progress)


def accumulated(
    known: KnockedGap, depths: Sequence[int], progress: Progress | None = None
) -> Result:
    """The dataset of `cumulative`, with an engine that is already there.

    Args:
        known: the gap with and without parts.
        depths: the values of k.
        progress: called with (done, total) knock-outs.
    """
    n, ends = known.model.cfg.n_layers, ["first", "last"]
    sets = [range(k) for k in depths] + [range(n - k, n) for k in depths]
    done = 0

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(sets))

    after = known.all([(layers, None, False) for layers in sets], told)
    enough()
    stacked = np.stack(after)
    whole = stacked.reshape(2, len(depths), *stacked.shape[1:])
    cells: dict[str, Sequence[Any]] = {"end": ends, "depth": list(depths)}
    return Result.of(effects(known.gap, known.before, whole, cells, known.pairs, known.attrs))


def checked_sets(
    model: HookedDiT, layers: Any, part: Part, fewest: int = 1
) -> tuple[str, list[list[int]]]:
    """The sets of layers to go through, by default each layer, and the name of their axis; refuses
    what is not there, before anything runs.

    Args:
        model: the opened model.
        layers: whole numbers, or sets of them; None is every layer.
        part: of a layer.
        fewest: sets.
    """
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    n = model.cfg.n_layers
    if layers is None:
        axis, sets = "layer", [[layer] for layer in range(n)]
    elif isinstance(layers, (list, tuple)) and any(
        isinstance(s, (list, tuple, range)) for s in layers
    ):
        expected = "whole numbers, or sets of them such as [[3, 4], [5]]"
        each = arguments.listed("layers", layers, expected, fewest=fewest)
        axis = "set"
        sets = [sorted(arguments.layers(one, n, name=f"layers[{i}]")) for i, one in enumerate(each)]
        arguments.unlike("layers", [tuple(one) for one in sets])
    else:
        axis, sets = "layer", [[i] for i in arguments.layers(layers, n, fewest=fewest)]
    for layer in {layer for one in sets for layer in one}:
        added_by(model, layer, part)
    return axis, sets


def checked_depths(depths: Any, n: int) -> list[int]:
    """How many layers are knocked out at an end, in increasing order; None is every number.

    Args:
        depths: whole numbers.
        n: layers of the model.
    """
    if depths is None:
        return list(range(1, n + 1))
    found = arguments.wholes("depths", depths, 1, n)
    if sorted(set(found)) != found:
        raise InvalidValue(
            f"depths={arguments.shown(found)} can't be used; expected different numbers of layers "
            "in increasing order."
        )
    return found


def _label(axis: str, layers: list[int]) -> int | str:
    return layers[0] if axis == "layer" else set_text(layers)
