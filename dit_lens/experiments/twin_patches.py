"""Patches of every layer of twin A into twin B, as pieces of a measurement."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from ..measures.bands import Bands
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..patching import as_grid, default_sites, grid, sweep, tiles
from ..pieces import enough, helped
from ..twinning.twins import in_turn
from .kept_twins import kept_twins


def twin_patches(
    model: HookedDiT,
    *,
    pairs: int,
    windows: int,
    release: int,
    steps: int,
    seed: int,
    cut: float,
    batch: int,
    labels: Labels | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> xr.Dataset | None:
    """What attention and MLP of each layer (or blocks, see `default_sites`) carry from twin A into
    twin B, window by window; what `dit_lens.probes.TwinPatching` measures.

    Args:
        model: the opened model.
        pairs: of twins.
        windows: how many to cut the steps from the release to the end into.
        release: the step from which the twins are two.
        steps: of denoising.
        seed: of the twins.
        cut: between low and high, in cycles per pixel of the latents.
        batch: images that run at once.
        labels: taken in turn; None is the model's own.
        progress: called with the patch-steps done and in all.

    Returns:
        xr.Dataset: of `dit_lens.patching.sweep` as a grid; None for those who help.
    """
    given = None if labels is None else in_turn(model, pairs, labels)
    layers, sites = range(model.cfg.n_layers), default_sites(model)
    patches = grid(layers, sites, tiles(release, steps, windows))

    def run() -> xr.Dataset:
        settings = {"steps": steps, "release": release, "seed": seed, "batch": batch}
        made = kept_twins("twins", model, pairs, given, **settings)
        bands = Bands.radial(model.cfg.pixels, cut=cut)
        swept = sweep(made.a, made.b, patches, bands, batch=batch, progress=progress)
        enough()
        return as_grid(swept).assign_attrs(release=release, tie=made.tie, g=made.g)

    found: xr.Dataset | None = helped(run)
    return found
