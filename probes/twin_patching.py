"""Patching between twins: which layer, at which steps, carries what twin A decides into twin B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, twins
from dit_lens.errors import InvalidState
from dit_lens.patching import Kind, as_grid, grid, sweep, tiles


class TwinPatching(Probe):
    """Patches twin A's activations into twin B, over layers, sites and windows of steps, and
    follows B to its end.

        result = TwinPatching().run(model, pairs=16, release=20, steps=50)
        result.move.sel(band="low")                          # [layer, site, window]

    `move` says how far B's finished latents go over to A's: the share of their squared distance
    that is gone, by band, 0 where the patch does nothing, 1 where B becomes A, below 0 where it
    leads away. The whole result is that of `dit_lens.patching.sweep.sweep`, its grid laid out.

    It runs its own twins and watches nobody else's: use `run`, not `dit_lens.trace(probes=[...])`.
    """

    names = ()

    def __init__(self) -> None:
        self._result: xr.Dataset | None = None

    def start(self, model: HookedDiT) -> None:
        raise InvalidState(
            "TwinPatching runs twins of its own and can't watch another run; use its run(model, "
            "...)."
        )

    def run(
        self,
        model: HookedDiT,
        pairs: int = 16,
        layers: Sequence[int] | None = None,
        sites: str | Sequence[str] = ("attn_out", "mlp_out"),
        windows: int | Sequence[range | None] = 5,
        *,
        kind: Kind = "swap",
        outcome: Bands | Callable[[Tensor], Any] | None = None,
        batch: int = 16,
        progress: Callable[[int, int], object] | None = None,
        resume: str | Path | None = None,
        **settings: Any,
    ) -> xr.Dataset:
        """Make twins and patch A into B.

        Args:
            pairs, settings: those of `dit_lens.twins` (release, steps, guidance, scheduler, ...).
            layers: by default every one.
            sites: hook points in a layer.
            windows: ranges of steps, or how many to cut the steps from the release to the end into.
            kind, outcome, batch, progress, resume: those of `dit_lens.patching.sweep.Patch` and
                `sweep`.

        Returns the Dataset of `sweep`, [layer, site, window, ...]. Raises ValueError, before the
        patches run, for what does not fit.
        """
        model = model if isinstance(model, HookedDiT) else HookedDiT(model)
        made = twins(model, pairs=pairs, **settings)
        steps = made.run.settings.steps
        chosen = tiles(made.release, steps, windows) if isinstance(windows, int) else windows
        patches = grid(
            range(model.cfg.n_layers) if layers is None else layers, sites, chosen, kind=kind
        )
        swept = sweep(
            made.a, made.b, patches, outcome, batch=batch, progress=progress, resume=resume
        )
        self._result = as_grid(swept).assign_attrs(release=made.release, tie=made.tie, g=made.g)
        return self._result

    def result(self) -> xr.Dataset:
        """What the latest `run` gave."""
        if self._result is None:
            raise InvalidState("TwinPatching has seen nothing: use its run(model, ...).")
        return self._result
