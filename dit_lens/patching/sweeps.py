"""Activation patching as exact sweeps: which layer, at which steps, carries what one run decides
into another?

    from dit_lens.patching import as_grid, grid, sweep, tiles

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

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from .. import arguments
from ..errors import InvalidValue
from ..model.hooked import HookedDiT
from ..pieces import Piece, current, kept_in, results, scope
from ..pieces.content import digest as content_digest
from ..sampling.run import Run
from ..sampling.settings import Progress
from .lanes import Lanes
from .measure import Measure, applied, check_measure, compared, latent_bands
from .patch import Patch, Planned, plan

IN_FLIGHT = 64
"""So many patches advance together, as one piece of the measurement.

Only their x_t is in memory.
"""


def sweep(
    source: Run,
    target: Run,
    patches: Sequence[Patch],
    outcome: Measure = None,
    *,
    batch: int = 16,
    progress: Progress | None = None,
    store: str | Path | None = None,
) -> xr.Dataset:
    """Patch `source` into `target`, once for each patch, and compare what becomes of the target.

    Args:
        source: the run that activations are taken from, such as twin A. Edits in its own history
            act as they did.
        target: the run that is patched, such as twin B, of the same model with the same settings
            and number of items; item i goes with item i. Edits in its own history act before the
            patch. Any scheduler will do, those with a memory too.
        patches: what to do; `grid` makes every combination of layers, sites and windows.
        outcome: None or `Bands` of the latents' pixel grid (default: "low" and "high"): agreement
            and move, see below. Or a function of finished latents [item, c, h, w] that gives [item,
            ...].
        batch: images that run at once, at least one lane's; twice an item with guidance. Results do
            not depend on it but for rounding.
        progress: called with the patch-steps done and in all.
        store: a folder in which finished patches are kept; an interrupted sweep that is given it
            again goes on from there.

    Returns:
        Dataset over `patch` with the coordinates layer, site, window and kind (`as_grid` makes a
        grid of them). By default it holds `agreement` [patch, reference, band] with the finished
        latents of source and target, its statistics `agreement_stats` [patch, reference, stat,
        item, band], `move` [patch, band], `move_interval` [patch, band, bound] (95 %, bootstrap
        over items; NaN for fewer than 8) and `move_together`, which hold for all patches and bands
        at once. The move pools energies over items before it divides:
        1 - distance.mean("item") / distance_target.mean("item"). These are
        |P_b(. - source)|² of the patched and of the target, `distance` [patch, item, band] and
        `distance_target` [item, band]. With a function it holds
        `outcome` [patch, item, ...], `outcome_source` and `outcome_target` [item, ...]. The
        attribute `block_evaluations` counts images x blocks run, in this call and those that it
        resumed.

    Raises:
        ValueError: before anything is run, for runs that do not fit each other, patches that do not
            fit the runs, and a store of another sweep or a damaged one.
        UnknownName: for a site that the model does not have.
        RuntimeError: if the weights have changed since, or another process is at this sweep.
        OSError: where the store can't be written, if it can be seen before anything is run.

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=1, steps=3)
    >>> patches = dit_lens.patching.grid([9], "attn_out", [range(1, 2), range(2, 3)])
    >>> sweep(pair.a, pair.b, patches).move.sizes
    Frozen({'patch': 2, 'band': 2})
    """
    # What is asked for fits the runs.
    check_kind_of_runs(source, target)
    steps, items = target.settings.steps, len(target.labels)
    options: dict[str, Any] = {"batch": batch, "progress": progress}
    planned = _planned(patches, target.model, steps, items, outcome, **options)
    folder = arguments.optional(arguments.path, "store", store)
    tied = max(source.tied_until, target.tied_until)
    early = [p.patch for p in planned if len(p.steps) and min(p.steps) < tied]
    if early:
        raise InvalidValue(
            f"{str(early[0])!r} begins while the runs are coupled to their twins, until step "
            f"{tied}; expected windows from there on."
        )
    bands = None if callable(outcome) else latent_bands(outcome, target)
    if folder is not None:
        target.model.require_bare()
    if current() is None:  # where pieces are shared the model is known by its content
        check_runs(source, target)

    # The patches are run, those of a wave together.
    key, waves, done = sweep_key(source, target, planned), _waves(planned), 0
    lanes = Lanes(source, target, batch)

    def run(wave: Sequence[int]) -> dict[str, NDArray[Any]]:
        def tick(step: int) -> None:
            # the last step counts when its patches are kept
            if progress is not None and step < steps - 1:
                progress(done * steps + len(wave) * (step + 1), len(patches) * steps)

        before = lanes.blocks
        found = lanes.run([planned[p] for p in wave], tick)
        return {"latents": found.cpu().numpy(), "blocks": np.array(lanes.blocks - before)}

    def told(number: int) -> None:
        nonlocal done
        done += len(waves[number])
        if progress is not None:
            progress(done * steps, len(patches) * steps)

    pieces = [Piece(f"patches, wave {i}", partial(run, wave)) for i, wave in enumerate(waves)]
    about = {"sweep": key, "patches": len(planned)}
    with kept_in(folder, "sweep", about, target.model), scope(f"sweep {key}"):
        made = results(pieces, told)
    latents = {
        p: x
        for wave, of in zip(waves, made, strict=True)
        for p, x in zip(wave, torch.from_numpy(np.array(of["latents"])), strict=True)
    }
    blocks = sum(int(of["blocks"]) for of in made)

    # What became of the target.
    finished = torch.stack([latents[p] for p in range(len(patches))]).to(target.finished)
    if callable(outcome):
        result = applied(outcome, finished, source, target)
    else:
        assert bands is not None
        result = compared(bands, finished, source, target)
    coords = {
        "patch": [str(patch) for patch in patches],
        "layer": ("patch", [p.layer for p in planned]),
        "site": ("patch", [p.site for p in planned]),
        "window": ("patch", [patch.window for patch in patches]),
        "kind": ("patch", [patch.kind for patch in patches]),
    }
    attrs = {
        "block_evaluations": blocks,
        "steps": steps,
        "items": len(target.labels),
    }
    return result.assign_coords(coords).assign_attrs(attrs)


def check_patches(
    patches: Sequence[Patch],
    model: HookedDiT,
    steps: int,
    items: int,
    outcome: Measure = None,
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> None:
    """Refuse what `sweep` would, before there are runs to sweep.

    Args:
        patches: as for `sweep`.
        model: of the runs.
        steps: of the runs.
        items: of the runs.
        outcome: as for `sweep`.
        batch: as for `sweep`.
        progress: as for `sweep`.

    Raises:
        ValueError: for what does not fit, in one sentence.
        UnknownName: for a site that the model does not have.

    >>> import dit_lens; from dit_lens.patching import grid; model = dit_lens.load("digits")
    >>> try: check_patches(grid([99], "attn_out", [None]), model, steps=3, items=2)
    ... except ValueError as error: print(error)
    'swap attn_out, layer 99, every step': there is no layer 99; the model has 28, 0 to 27.
    """
    steps, items = arguments.whole("steps", steps, 1), arguments.whole("items", items, 1)
    _planned(patches, model, steps, items, outcome, batch=batch, progress=progress)


def _planned(
    patches: Sequence[Patch],
    model: HookedDiT,
    steps: int,
    items: int,
    outcome: Measure,
    *,
    batch: int,
    progress: Progress | None,
) -> list[Planned]:
    """The patches, checked as all else is."""
    several = "one or more patches, see dit_lens.patching.grid"
    for patch in arguments.listed("patches", patches, several):
        arguments.instance("patches", patch, Patch, several)
    batch = arguments.whole("batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    check_measure(outcome)
    return [plan(patch, model, steps, items) for patch in patches]


def as_grid(result: xr.Dataset) -> xr.Dataset:
    """A sweep over a full grid as [layer, site, window, ...] in place of [patch, ...], each in the
    order of the patches.

    Args:
        result: what `sweep` gave.

    Returns:
        The same variables with three axes in place of one.

    Raises:
        ValueError: where two patches have the same layer, site and window, such as two kinds;
            choose between them first (`result.isel(patch=...)`).

    >>> import dit_lens; pair = dit_lens.twins(dit_lens.load("digits"), pairs=2, release=1, steps=3)
    >>> patches = dit_lens.patching.grid([9], "attn_out", [range(1, 2), range(2, 3)])
    >>> as_grid(sweep(pair.a, pair.b, patches)).move.sizes
    Frozen({'layer': 1, 'site': 1, 'window': 2, 'band': 2})
    """
    arguments.instance("result", result, xr.Dataset, "what dit_lens.patching.sweep gave")
    axes = ("layer", "site", "window")
    if any(axis not in result for axis in axes):
        raise arguments.refusal("result", list(map(str, result.variables)), "a sweep's")
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


def check_runs(source: Run, target: Run) -> None:
    """Refuse two runs between which nothing can be patched.

    Args:
        source: the run that activations are taken from.
        target: the run that is patched.

    Raises:
        ValueError: for runs of different weights, settings, schedulers or shapes.
        RuntimeError: if the model's weights are no longer those of the runs.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> short, long = (dit_lens.sample(model, [3], steps=steps) for steps in (1, 2))
    >>> try: check_runs(short, long)
    ... except ValueError as error: print(error)
    The source has steps=1 and the target steps=2; expected the same: sample both alike.
    """
    check_kind_of_runs(source, target)
    target.forward(min(target.tied_until, target.settings.steps - 1))


def check_kind_of_runs(source: Run, target: Run) -> None:
    """What `check_runs` refuses without a forward of the model."""
    for name, run in (("source", source), ("target", target)):
        arguments.instance(name, run, Run, "a run of dit_lens.sample, or a twin")
        run.require_here()
    if source.model.transformer is not target.model.transformer:
        raise InvalidValue("The runs are of different models; expected two of one model.")
    for name in ("steps", "guidance", "guided_channels"):
        a, b = getattr(source.settings, name), getattr(target.settings, name)
        if a != b:
            raise InvalidValue(
                f"The source has {name}={a!r} and the target {name}={b!r}; expected the same: "
                "sample both alike."
            )
    a, b = scheduler_text(source.scheduler), scheduler_text(target.scheduler)
    if a != b:
        raise InvalidValue(
            f"The runs have different schedulers, {a[:60]} and {b[:60]}; expected the same, x_t at "
            "the same noise levels."
        )
    if source.latents.shape != target.latents.shape:
        raise InvalidValue(
            f"The source's latents are {list(source.latents.shape[1:])} and the target's "
            f"{list(target.latents.shape[1:])}; expected the same, source item i goes into target "
            "item i (run.select chooses items)."
        )


def _waves(planned: Sequence[Planned]) -> list[list[int]]:
    """Patches that go together: those that begin at the same step, and there those that do the
    same, are neighbours.
    """

    def place(p: int) -> tuple[int, str, str, str]:
        one = planned[p]
        return min(one.steps, default=10**9), one.patch.kind, one.name, one.key

    order = sorted(range(len(planned)), key=place)
    return [order[i : i + IN_FLIGHT] for i in range(0, len(order), IN_FLIGHT)]


def scheduler_text(scheduler: Any) -> str:
    """The class of a scheduler and a digest of its settings and noise levels."""
    return f"{type(scheduler).__name__} {content_digest(scheduler)[:8]}"


def sweep_key(source: Run, target: Run, patches: Sequence[Planned]) -> str:
    """A digest of all that finished patches depend on: the two runs, and what each patch does.

    A run's edits are functions, which have no content to compare, so they are only counted. That is
    enough: edits that do something else leave other latents, and these are compared to the bit.
    """
    digest = hashlib.sha256()
    for run in (source, target):
        settings = run.settings
        about = (settings.eta, settings.guidance, settings.guided_channels)
        digest.update(repr((*about, scheduler_text(run.scheduler), run.labels.tolist())).encode())
        digest.update(repr([(c.from_step, c.seeds, len(c.edits)) for c in run.history]).encode())
        for kept in (run.latents, run.outputs):  # these depend on the weights
            for step in kept:
                digest.update(step.cpu().contiguous().numpy().data)
    for patch in patches:
        digest.update(patch.digest.encode())
    return digest.hexdigest()[:16]
