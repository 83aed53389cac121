"""Patching between twins: which layer, at which steps, carries what twin A decides into twin B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, twins
from dit_lens.errors import InvalidState
from dit_lens.patching import (
    Kind,
    Patch,
    as_grid,
    check_patches,
    default_sites,
    grid,
    sweep,
    tiles,
)


class TwinPatching(Probe):
    """Patches twin A's activations into twin B, over layers, sites and windows of steps, and
    follows B to its end.

    `move` says how far B's finished latents go over to A's: the share of their squared distance
    that is gone, by band, 0 where the patch does nothing, 1 where B becomes A, below 0 where it
    leads away. The whole result is that of `dit_lens.patching.sweep`, its grid laid out.

    It makes its own twins and observes no other run: use `run`, not `dit_lens.trace(probes=[...])`.

    >>> import dit_lens; model = dit_lens.load("digits")
    >>> result = TwinPatching().run(model, [3], layers=[9], windows=2, release=1, steps=3)
    >>> result.move.sizes
    Frozen({'layer': 1, 'site': 2, 'window': 2, 'band': 2})
    """

    names = ()
    of_twins = True

    def __init__(self) -> None:
        self.found: xr.Dataset | None = None

    def run(
        self,
        model: Any,
        labels: Any = None,
        *,
        pairs: int | None = None,
        layers: Sequence[int] | None = None,
        sites: str | Sequence[str] | None = None,
        windows: int | Sequence[range | None] | None = None,
        kind: Kind = "swap",
        outcome: Bands | Callable[[Tensor], Any] | None = None,
        batch: int = 16,
        progress: Callable[[int, int], object] | None = None,
        store: str | Path | None = None,
        **settings: Any,
    ) -> xr.Dataset:
        """Make twins and patch A into B.

        Args:
            model: a `HookedDiT`, or what it wraps.
            labels: one a pair; by default those of `dit_lens.twins`.
            pairs: how many; by default one a label, or 16.
            layers: by default every one.
            sites: hook points in a layer; by default `dit_lens.patching.default_sites`.
            windows: ranges of steps, or how many to cut the steps from the release to the end into;
                by default five, or one a step where there are fewer.
            kind: of patch; see `dit_lens.patching.Patch`.
            outcome: what is measured at the end; see `dit_lens.patching.sweep`.
            batch: images that run at once.
            progress: called with the patch-steps done and in all.
            store: a folder in which finished patches are kept; see `dit_lens.patching.sweep`.
            **settings: those of `dit_lens.twins`: release, steps, guidance, scheduler, ...

        Returns:
            The Dataset of `dit_lens.patching.sweep`, [layer, site, window, ...].

        Raises:
            ValueError: before the patches run, for what does not fit.
        """
        model = HookedDiT.of(model)
        if pairs is None:
            pairs = 16 if labels is None else len(model.conditions.numbers(labels))
        # What is asked for fits the model, before the twins run.
        patches = combinations(model, layers, sites, windows, kind, settings)
        options: dict[str, Any] = {"batch": batch, "progress": progress}
        check_patches(patches, model, settings.get("steps", 50), pairs, outcome, **options)
        made = twins(model, pairs, labels, **settings)
        swept = sweep(made.a, made.b, patches, outcome, store=store, **options)
        self.found = as_grid(swept).assign_attrs(release=made.release, tie=made.tie, g=made.g)
        return self.found

    def result(self) -> xr.Dataset:
        """What the latest `run` gave.

        Raises:
            RuntimeError: if there was none.
        """
        if self.found is None:
            raise InvalidState("TwinPatching has seen nothing: use its run(model, ...).")
        return self.found


def combinations(
    model: HookedDiT,
    layers: Sequence[int] | None,
    sites: str | Sequence[str] | None,
    windows: int | Sequence[range | None] | None,
    kind: Kind,
    settings: dict[str, Any],
) -> list[Patch]:
    """Every combination of layer, site and window."""
    if not isinstance(windows, Sequence):
        windows = tiles(settings.get("release", 0), settings.get("steps", 50), windows)
    layers = range(model.cfg.n_layers) if layers is None else layers
    sites = default_sites(model) if sites is None else sites
    return grid(layers, sites, windows, kind=kind)
