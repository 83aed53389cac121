"""What the finished image takes from which twin: one band of the stream from twin A, all else from
twin B.

Twins are one run until `release` and two from there on. In one layer, in a window of steps, a band
of twin B's stream (over the grid of tokens) is replaced by twin A's, and B runs on to its end; or
only the part of it that one attention head makes. The *move* says how far the finished image goes
over to A's in each band: the share of their squared distance that is gone. A layer through whose
low band the low band of the image is decided has a move there and in the low band only. Windows are
short for a reason: the stream also carries the noise of its own x_t, and B's is never taken off
while A's is answered, so a long exchange leads away from both (a move far below 0).

With a *dose* below 1 the difference of the twins' bands is added in part. A direction in which the
model computes answers in steps: the move grows with the dose. A patch that only pushes the model
off what it knows does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import arguments
from ..errors import InvalidValue
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS
from ..measures.estimate import Estimate
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching import Patch, check_patches, sweep
from ..patching.patch import steps_text
from ..pieces import Engine, enough, measured
from ..twinning.twins import in_turn
from .ablation import windows_of
from .effects import FEWEST_MOVE
from .kept_twins import kept_twins

BOTH = ("low", "high")
STREAM = -1
"""In place of a head's number: the whole stream."""


@measured
def interchange(
    model: HookedDiT,
    layers: Sequence[int] | None = None,
    *,
    windows: int | Sequence[range] | None = None,
    heads: bool = False,
    doses: Sequence[float] = (1.0,),
    release: int | None = None,
    pairs: int = 16,
    labels: Labels | None = None,
    steps: int = 25,
    seed: int = 0,
    cut: float = CUT,
    batch: int = 16,
    progress: Callable[[int, int], object] | None = None,
    store: str | Path | None = None,
    engine: str | Engine = "local",
) -> xr.Dataset:
    """Put one band of twin A's stream into twin B, layer by layer.

    Args:
        model: the opened model, with a scheduler.
        layers: by default every one.
        windows: ranges of steps from the release on, or how many to cut these steps into; by
            default five, or one a step where there are fewer.
        heads: exchange what each attention head puts out (`attn.hook_z`) in place of the stream.
        doses: parts of the difference that are put in, in increasing order, such as 0, 0.5, 1.
        release: the step from which the twins are two; by default a third of the steps.
        pairs: of twins, 8 or more.
        labels: classes or prompts, taken in turn; by default the model's own.
        steps: of denoising.
        seed: of the twins.
        cut: between low and high, in cycles per pixel of the latents and per token of the stream.
        batch: images that run at once.
        progress: called with the patch-steps done and in all.
        store: a folder in which the finished pieces are kept; given again, the measurement goes on
            from there.
        engine: where they are run: "local", "ray", or an `Engine`.

    Returns:
        xr.Dataset: `move` [layer, head, window, dose, taken, band], of the stream with a single
            head numbered -1: how far the finished latents' `band` goes over to A's where the
            stream's band `taken` is A's, 0 not at all, 1 all the way, below 0 away from A;
            `move_together` [..., bound], 95 % for all of them at once. attrs["sentence"] says what
            the image takes from which twin.

    Raises:
        InvalidValue: for what does not fit the model, before anything runs.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> interchange(model, [9], windows=1, pairs=8, steps=4).move.sizes
    Frozen({'layer': 1, 'head': 1, 'window': 1, 'dose': 1, 'taken': 2, 'band': 2})
    """
    del store, engine  # `measured` sees to them
    arguments.instance("model", model, HookedDiT, "a HookedDiT")
    n = model.cfg.n_layers
    chosen = list(range(n)) if layers is None else arguments.layers(layers, n)
    arguments.flag("heads", heads)
    steps = arguments.whole("steps", steps, 2)
    release = steps // 3 if release is None else arguments.whole("release", release, 0, steps - 1)
    pairs = arguments.whole("pairs", pairs, FEWEST_PAIRS, why="for an interval")
    seed, amounts = arguments.seed("seed", seed), checked_doses(doses)
    spans = windows_of(windows, release, steps)
    bands = Bands.radial(model.cfg.grid, cut=cut)
    outcome = Bands.radial(model.cfg.pixels, cut=cut)
    if heads and not model.cfg.n_heads:
        raise InvalidValue(
            "heads=True can't be used: the heads of this model are not known; expected heads=False."
        )
    numbers = range(model.cfg.n_heads) if heads else [STREAM]
    cells = list(itertools.product(chosen, numbers, spans, amounts, BOTH))
    patches = [
        Patch(
            "attn.hook_z" if heads else "resid_post",
            layer,
            span,
            heads=None if head == STREAM else [head],
            bands=bands,
            band=band,
            dose=dose,
        )
        for layer, head, span, dose, band in cells
    ]
    check_patches(patches, model, steps, pairs, outcome, batch=batch, progress=progress)
    own = None if labels is None else in_turn(model, pairs, labels)
    settings = {"steps": steps, "release": release, "seed": seed, "batch": batch}
    pair = kept_twins("twins", model, pairs, own, **settings)
    swept = sweep(pair.a, pair.b, patches, outcome, batch=batch, progress=progress)
    enough()
    coords: dict[str, Sequence[Any]] = {
        "layer": chosen,
        "head": list(numbers),
        "window": [steps_text(span) for span in spans],
        "dose": amounts,
        "taken": BOTH,
    }
    axes = tuple(coords)
    shape = tuple(len(coords[axis]) for axis in axes)
    result = xr.Dataset(
        {
            "move": ((*axes, "band"), swept.move.values.reshape(*shape, 2)),
            "move_together": (
                (*axes, "band", "bound"),
                swept.move_together.values.reshape(*shape, 2, 2),
            ),
        },
        coords={
            **{axis: list(values) for axis, values in coords.items()},
            "band": list(BOTH),
            "bound": ["low", "high"],
        },
        attrs={
            "n_layers": n,
            "release": release,
            "pairs": pairs,
            "steps": steps,
            "seed": seed,
            "cut": cut,
            "heads": int(heads),
        },
    )
    result.attrs["sentence"] = interchange_sentence(result)
    return result


def checked_doses(doses: Sequence[float]) -> list[float]:
    """The doses as numbers, different ones in increasing order.

    Args:
        doses: parts of a difference.
    """
    listed = arguments.listed("doses", doses, "numbers, such as 0, 0.5, 1")
    found = [arguments.number(f"doses[{i}]", dose, 0) for i, dose in enumerate(listed)]
    if sorted(set(found)) != found or found[-1] == 0:
        raise InvalidValue(
            f"doses={arguments.shown(found)} can't be used; expected different numbers in "
            "increasing order, the last above 0, such as 0, 0.5, 1."
        )
    return found


def interchange_sentence(result: xr.Dataset) -> str:
    """What the image takes from twin A with each band of the stream, at the largest dose, and
    whether less of it does less.

    Args:
        result: of `interchange`.
    """
    full, parts = result.isel(dose=-1), []
    what = "head's output" if result.attrs["heads"] else "layer's stream"
    for taken in BOTH:
        said = [_most(full.sel(taken=taken, band=band), band) for band in BOTH]
        parts.append(f"with the {taken} band of one {what} from twin A, {' and '.join(said)}")
    text = "; ".join(parts)
    text = f"{text[0].upper()}{text[1:]} (95 % for all at once)."
    return text + _graded(result)


def _most(one: xr.Dataset, band: str) -> str:
    """How many cells surely move this band of the image, and the one that does most."""
    low, value = one.move_together.sel(bound="low"), one.move
    sure = (low > 0) & (value > FEWEST_MOVE)
    count = int(sure.sum())
    if not count:
        return f"none surely moves the image's {band} band"
    best = np.unravel_index(int(np.argmax(np.where(sure, value, -np.inf))), value.shape)
    at = ", ".join(
        f"{'steps' if axis == 'window' else axis} {value[axis].values[i]}"
        for axis, i in zip(value.dims, best, strict=True)
        if axis != "head" or value[axis].values[i] != STREAM
    )
    most = Estimate.of(value.values[best], one.move_together.values[best])
    return (
        f"{count} of {value.size} surely move{'s' if count == 1 else ''} the image's {band} band "
        f"towards A, the largest estimate {most:.0%} of the way at {at}"
    )


def _graded(result: xr.Dataset) -> str:
    """Whether the largest of the moves grow with the dose."""
    if result.sizes["dose"] < 2:
        return ""
    sure = (result.move_together.isel(dose=-1).sel(bound="low") > 0).values
    sure &= result.move.isel(dose=-1).values > FEWEST_MOVE
    curves = np.moveaxis(result.move.values, result.move.dims.index("dose"), -1)[sure]
    if not len(curves):
        return ""
    rising = int((np.diff(curves, axis=-1) > 0).all(-1).sum())
    doses = ", ".join(f"{dose:g}" for dose in result.dose.values)
    return f" Sure moves that grow with every dose ({doses}): {rising} of {len(curves)}."
