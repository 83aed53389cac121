"""Activation patching as exact sweeps: which layer, at which steps, carries what one run decides
into another?

    twins = dit_lens.twins(model, pairs=16, release=20)
    result = sweep(twins.a, twins.b, grid(range(28), ["attn_out", "mlp_out"], tiles(20, 50, 10)))
    as_grid(result).move.sel(band="low")                       # [layer, site, window]

For each patch the target's run is run again with the patch in its window and on to its end, exactly
as that patch would go alone (Meng et al. 2022, arXiv 2202.05262, along the denoising run);
`dit_lens.patching.lanes` says what is shared. With the outcome's default the *move* is 1 -
|P_b(x_patched - x_source)|² / |P_b(x_target - x_source)|² of the finished latents: 0 where the
patch does nothing, 1 where it makes the source of the target, below 0 where it leads away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue
from ..measures.agreement import Agreement, agreement, curve
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, resample
from ..sampling.run import Run
from .checkpoint import Store, scheduler_words, sweep_key
from .lanes import Lanes
from .patch import Kind, Patch, Planned, grid, plan, tiles

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Kind", "Patch", "as_grid", "grid", "sweep", "tiles"]
Outcome = Bands | Callable[[Tensor], Any] | None
IN_FLIGHT = 64
"""So many patches advance together; when they have finished they are stored.

Only their x_t is in memory.
"""
RESAMPLES = 1000


def sweep(
    source: Run,
    target: Run,
    patches: Sequence[Patch],
    outcome: Outcome = None,
    *,
    batch: int = 16,
    progress: Callable[[int, int], object] | None = None,
    resume: str | Path | None = None,
) -> xr.Dataset:
    """Patch `source` into `target`, once for each patch, and compare what becomes of the target.

    Args:
        source, target: two runs of one model with the same settings and number of items, such as
            the twins A and B; item i goes with item i. Edits in their own history act as they did,
            before the patch. Any scheduler will do, those with a memory too.
        patches: what to do; `grid` makes every combination of layers, sites and windows.
        outcome: None or `Bands` of the latents' pixel grid (default: "low" and "high"): agreement
            and move, see below. Or a function of finished latents [item, c, h, w] that gives [item,
            ...].
        batch: images that run at once, at least one lane's; twice an item with guidance. Results do
            not depend on it but for rounding.
        progress: called with the patch-steps done and in all.
        resume: a file in which finished patches are kept; an interrupted sweep that is given it
            again goes on from there.

    Returns:
        Dataset over `patch` with the coordinates layer, site, window and kind (`as_grid` makes a grid of them), and
        - by default `agreement` [patch, reference, band] with the finished latents of source and target, its statistics
          `agreement_stats` [patch, reference, stat, item, band], `move` [patch, band], `move_interval` [patch, band, bound] (95 %,
          bootstrap over items; NaN for fewer than 8), |P_b(. - source)|² of the patched and of the target, `distance`
          [patch, item, band] and `distance_target` [item, band];
        - with a function `outcome` [patch, item, ...], `outcome_source` and `outcome_target` [item, ...].
        The attribute `block_evaluations` counts images x blocks run, in this call and those that it resumed.

    Raises:
        ValueError: or.
        UnknownName: before anything is run, for runs that do not fit each other, patches that do
            not fit the runs, and a file of another sweep.
        RuntimeError: if the weights have changed since.

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=2, steps=4)
    >>> sweep(pair.a, pair.b, grid([9], "attn_out", [range(2, 3), range(3, 4)])).move.sizes
    Frozen({'patch': 2, 'band': 2})
    """
    _check(source, target, patches, batch)
    planned = [
        plan(patch, target.model, target.settings.steps, len(target.labels)) for patch in patches
    ]
    tied = max(source.tied_until, target.tied_until)
    early = [
        patch
        for patch, p in zip(patches, planned, strict=True)
        if len(p.steps) and min(p.steps) < tied
    ]
    if early:
        raise InvalidValue(
            f"{str(early[0])!r} begins while the runs are coupled to their twins, until step "
            f"{tied}; expected windows from there on."
        )
    bands = None if callable(outcome) else _bands(outcome, target)
    store = Store(resume, sweep_key(source, target, patches), len(patches))
    lanes = Lanes(source, target, batch)
    steps = target.settings.steps
    for wave in _waves(planned):
        if all(p in store.done for p in wave):
            continue

        def tick(step: int, size: int = len(wave)) -> None:
            # the last step counts when its patches are stored
            if progress is not None and step < steps - 1:
                progress(len(store.done) * steps + size * (step + 1), len(patches) * steps)

        before = lanes.blocks
        found = lanes.run([planned[p] for p in wave], tick)
        store.add(wave, found, lanes.blocks - before)
        if progress is not None:
            progress(len(store.done) * steps, len(patches) * steps)
    finished = torch.stack([store.done[p] for p in range(len(patches))]).to(target.latents)
    result = (
        _described(outcome, finished, source, target)
        if callable(outcome)
        else _compared(bands, finished, source, target)
    )
    coords = {
        "patch": [str(patch) for patch in patches],
        "layer": ("patch", [p.layer for p in planned]),
        "site": ("patch", [p.name.split(".", 2)[2].replace("hook_", "") for p in planned]),
        "window": ("patch", [patch.window for patch in patches]),
        "kind": ("patch", [patch.kind for patch in patches]),
    }
    attrs = {
        "block_evaluations": store.blocks,
        "steps": steps,
        "items": len(target.labels),
    }
    return result.assign_coords(coords).assign_attrs(attrs)


def as_grid(result: xr.Dataset) -> xr.Dataset:
    """A sweep over a full grid as [layer, site, window, ...] in place of [patch, ...], each in the
    order of the patches.

    Raises:
        ValueError: where two patches stand at one place, such as two kinds; choose between them
            first (`result.isel(patch=...)`).
    """
    axes = ("layer", "site", "window")
    places = list(zip(*(result[axis].values.tolist() for axis in axes), strict=True))
    if len(set(places)) < len(places):
        twice = next(p for p in places if places.count(p) > 1)
        raise InvalidValue(
            f"Layer, site and window do not tell the patches apart: {places.count(twice)} of them "
            f"are at {twice}."
        )
    order = {axis: list(dict.fromkeys(result[axis].values.tolist())) for axis in axes}
    plain = result.drop_vars(["patch", "kind"])
    return plain.set_index(patch=list(axes)).unstack("patch").reindex(order).transpose(*axes, ...)


# What is compared.


def _bands(outcome: Bands | None, target: Run) -> Bands:
    side = (target.latents.shape[-2], target.latents.shape[-1])
    bands = Bands.radial(side, cut=CUT) if outcome is None else outcome
    if bands.grid != side:
        raise InvalidValue(
            f"The outcome's bands are of a {bands.grid[0]}x{bands.grid[1]} grid; expected the "
            f"latents' {side[0]}x{side[1]}."
        )
    return bands


def _compared(bands: Bands | None, finished: Tensor, source: Run, target: Run) -> xr.Dataset:
    """Agreement and move by band, from finished latents [patch, item, c, h, w]."""
    import xarray as xr

    assert bands is not None
    a, b, items = source.latents[-1], target.latents[-1], len(target.labels)
    away = np.stack([_energy(x - a, bands) for x in finished])
    apart = _energy(b - a, bands)
    labels = target.labels.cpu().numpy()
    groups = labels if np.unique(labels, return_counts=True)[1].min() > 1 else np.zeros_like(labels)
    # one item has no mean to take off
    found = np.full((len(finished), 2, 3, items, bands.n), np.nan)
    if items > 1:
        for i, x in enumerate(finished):
            found[i] = np.stack([np.stack(agreement(x, other, bands, groups)) for other in (a, b)])
    stats = Agreement(*np.moveaxis(found, 2, 0))
    counts = resample(items, RESAMPLES) if items >= FEWEST_PAIRS else np.full((2, items), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        move = 1 - away.sum(1) / apart.sum(0)
        spread = 1 - np.einsum("ri,pib->rpb", counts, away) / (counts @ apart)[:, None]
        bound = np.moveaxis(np.quantile(spread, [0.025, 0.975], axis=0), 0, -1)
    return xr.Dataset(
        {
            "agreement": (("patch", "reference", "band"), curve(stats)),
            "agreement_stats": (("patch", "reference", "stat", "item", "band"), found),
            "move": (("patch", "band"), move),
            "move_interval": (("patch", "band", "bound"), bound),
            "distance": (("patch", "item", "band"), away),
            "distance_target": (("item", "band"), apart),
        },
        coords={
            "reference": ["source", "target"],
            "stat": list(Agreement._fields),
            "band": list(bands.names),
            "bound": ["low", "high"],
        },
        attrs={"groups": len(np.unique(groups)), "level": 0.95},
    )


def _energy(x: Tensor, bands: Bands) -> NDArray[np.float64]:
    # channels are summed: [item, band]
    energy: NDArray[np.float64] = bands.energy(x.double()).sum(1).cpu().numpy()
    return energy


def _described(
    outcome: Callable[[Tensor], Any], finished: Tensor, source: Run, target: Run
) -> xr.Dataset:
    """The user's function of finished latents [patch, item, c, h, w], and of the source's and the
    target's own.
    """
    import xarray as xr

    items = len(target.labels)
    values = [
        np.asarray(torch.as_tensor(outcome(x)).detach().cpu())
        for x in (source.latents[-1], target.latents[-1], *finished)
    ]
    odd = [v.shape for v in values if v.shape[:1] != (items,) or v.shape != values[0].shape]
    if odd:
        raise InvalidValue(
            f"The outcome gave shape {list(odd[0])}; expected [{items}, ...], one row an item and "
            "always the same shape."
        )
    dims = ("item", *(f"outcome_{i}" for i in range(values[0].ndim - 1)))
    return xr.Dataset(
        {
            "outcome": (("patch", *dims), np.stack(values[2:])),
            "outcome_source": (dims, values[0]),
            "outcome_target": (dims, values[1]),
        }
    )


# Which sweep it is.


def _check(source: Run, target: Run, patches: Sequence[Patch], batch: int) -> None:
    if source.model.transformer is not target.model.transformer:
        raise InvalidValue("The runs are of different models; expected two of one model.")
    for name in ("steps", "guidance", "guided_channels"):
        a, b = getattr(source.settings, name), getattr(target.settings, name)
        if a != b:
            raise InvalidValue(
                f"The source has {name}={a!r} and the target {name}={b!r}; expected the same: "
                "sample both alike."
            )
    a, b = scheduler_words(source), scheduler_words(target)
    if a != b:
        raise InvalidValue(
            f"The runs have different schedulers, {a[:60]} and {b[:60]}; expected the same, x_t at "
            "the same noise levels."
        )
    if source.latents.shape != target.latents.shape:
        raise InvalidValue(
            f"The source's latents are {list(source.latents.shape[1:])} and the target's "
            f"{list(target.latents.shape[1:])}; "
            "expected the same, source item i goes into target item i (run.select chooses items)."
        )
    if not patches:
        raise InvalidValue(
            "There are no patches to make; expected one or more, see dit_lens.patching.sweep.grid."
        )
    if not isinstance(batch, int) or batch < 1:
        raise InvalidValue(
            f"batch={batch!r} is no number of images to run at once; expected 1 or more."
        )
    target.forward(min(target.tied_until, target.settings.steps - 1))


def _waves(planned: Sequence[Planned]) -> list[list[int]]:
    """Patches that go together: those that begin at the same step, and there those that do the
    same, are neighbours.
    """
    order = sorted(
        range(len(planned)), key=lambda p: (min(planned[p].steps, default=10**9), planned[p].key)
    )
    return [order[i : i + IN_FLIGHT] for i in range(0, len(order), IN_FLIGHT)]
