"""The gap of twins that are coupled in one layer alone, each in turn: an intervention that takes no
part of the model away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import arguments
from ..errors import InvalidValue
from ..measures import Array
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, interval
from ..measures.crossing import half_crossing
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..pieces import Engine, Piece, enough, measured, results
from ..twinning.coupling import CouplingForm, check_coupling
from ..twinning.twins import chosen_labels
from .coupling_sweep import coupled_twins, difference_curves
from .effects import effects
from .knock_outs import checked_sets, set_text
from .knocked_gap import gap_of


@measured
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
    batch: int | None = None,
    labels: Labels | None = None,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
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
        batch: images that go through the model at once, twins together; None is all.
        labels: classes or prompts, one a pair or fewer, which are taken in turn; by default the
            model's own.
        progress: called with (done, total) layers.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `gap`, `effect`, `effect_interval`, `commitment` and attributes as `knock_outs`
            gives them, the commitment being the step at which the twins part.

    Raises:
        InvalidValue: for a layer that does not exist, a coupling that is none, too few pairs, or
            twins that don't part to begin with.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> found = couple_alone(model, [0], pairs=8, steps=3, resamples=100)
    >>> dict(found.gap.sizes), found.attrs["g"]
    ({'layer': 1}, 1.0)
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    if layers is not None:
        layers = arguments.layers(layers, model.cfg.n_layers)
    _, chosen = checked_sets(model, layers, "layer")
    check_coupling(g, form)
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    seed, cut = arguments.seed("seed", seed), arguments.number("cut", cut, above=0)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    bands = Bands.radial(model.cfg.pixels, cut=cut)
    counts = draws(pairs, resamples, seed)
    own = chosen_labels(model, pairs, labels)

    def taus(strength: float, only: list[int] | None) -> Array:
        tie: dict[str, Any] = {"layers": only, "eps": eps, "steps": steps, "seed": seed}
        pair = coupled_twins(model, own, strength, form, **tie, batch=batch)
        return half_crossing(difference_curves(pair, bands, counts))

    def kept(name: str, strength: float, only: list[int] | None) -> Piece:
        return Piece(name, lambda: {"taus": taus(strength, only)})

    (uncoupled,) = results([kept("uncoupled", 0.0, None)])
    before = uncoupled["taus"]
    if not np.isfinite(before[0]).all():
        raise InvalidValue(
            "The uncoupled twins do not part within the run in both bands, so there is no gap to "
            "find causes of."
        )
    done = 0

    def told(_number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(chosen))

    found = results([kept(f"coupled in {set_text(only)}", g, only) for only in chosen], told)
    enough()
    after = [of["taus"] for of in found]
    settings: dict[str, Any] = {"g": g, "form": form, "eps": eps, "n_layers": model.cfg.n_layers}
    settings |= {"done": "coupled", "pairs": pairs, "steps": steps, "seed": seed, "cut": cut}
    was, rows = gap_of(before), pairs - len(set(own))
    gap = Estimate.of(was[0], interval(was, rows))
    cells = {"layer": [layer for (layer,) in chosen]}
    return effects(gap, before, np.stack(after), cells, rows, settings)
