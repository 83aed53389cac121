"""What is measured on finished latents: how far a patched run went over to the source, by band, or
whatever a function of the user's gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..measures.agreement import Agreement, agreement, curve, not_alone
from ..measures.bands import CUT, Bands
from ..measures.bootstrap import FEWEST_PAIRS, draws, interval, simultaneous
from ..sampling.run import Run

Measure = Bands | Callable[[Tensor], Any] | None
"""`Bands` of the latents' grid (None: "low" and "high"), or a function of finished latents."""
RESAMPLES = 1000


def check_measure(outcome: Any) -> None:
    """Raise InvalidType for what is neither bands nor a function."""
    if outcome is not None and not isinstance(outcome, Bands):
        arguments.function("outcome", outcome, "of finished latents, Bands or None")


def latent_bands(bands: Bands | None, run: Run) -> Bands:
    """The bands, or "low" and "high".

    Raises ValueError for bands of another grid than the run's latents.
    """
    side = (run.latents.shape[-2], run.latents.shape[-1])
    bands = Bands.radial(side, cut=CUT) if bands is None else bands
    arguments.instance("bands", bands, Bands, "Bands of the latents' grid, or None")
    if bands.grid != side:
        raise InvalidValue(
            f"The outcome's bands are of a {bands.grid[0]}x{bands.grid[1]} grid; expected the "
            f"latents' {side[0]}x{side[1]}."
        )
    return bands


def energy(x: Tensor, bands: Bands) -> NDArray[np.float64]:
    """|P_b x|² of latents [item, c, h, w] or, of videos, [item, c, f, h, w], summed over channels
    and frames: [item, band].
    """
    found = bands.energy(x.double())
    values: NDArray[np.float64] = found.flatten(1, -2).sum(1).cpu().numpy()
    return values


def compared(bands: Bands, finished: Tensor, source: Run, target: Run) -> xr.Dataset:
    """Agreement and move by band, from finished latents [patch, item, c, h, w]."""
    # Distances from the source, of the patched runs and of the target.
    a, b, items = source.finished, target.finished, len(target.labels)
    away = np.stack([energy(x - a, bands) for x in finished])
    apart = energy(b - a, bands)

    # Agreement with both, less what all items of a label share; one that is alone has no say.
    labels = target.labels.cpu().numpy()
    kept = not_alone(labels)
    if not len(kept):  # each has its own, as in patches between two prompts
        labels, kept = np.zeros_like(labels), np.arange(items)
    # one item has no mean to take off
    found = np.full((len(finished), 2, 3, items, bands.n), np.nan)
    if items > 1:
        found[..., np.setdiff1d(np.arange(items), kept), :] = 0
        for i, x in enumerate(finished):
            both = [agreement(x[kept], y[kept], bands, labels[kept]) for y in (a, b)]
            found[i][:, :, kept] = np.stack([np.stack(each) for each in both])
    stats = Agreement(*np.moveaxis(found, 2, 0))

    # The move, with intervals over items.
    enough = items >= FEWEST_PAIRS
    counts = draws(items, RESAMPLES) if enough else np.ones((1, items))
    with np.errstate(invalid="ignore", divide="ignore"):
        move = 1 - np.einsum("ri,pib->rpb", counts, away) / (counts @ apart)[:, None]
    shape = (*move.shape[1:], 2)
    bound, together = np.full((2, *shape), np.nan)
    if enough:
        bound = interval(move, items)
        together = simultaneous(move.reshape(len(move), -1), items).reshape(shape)
    return xr.Dataset(
        {
            "agreement": (("patch", "reference", "band"), curve(stats)),
            "agreement_stats": (("patch", "reference", "stat", "item", "band"), found),
            "move": (("patch", "band"), move[0]),
            "move_interval": (("patch", "band", "bound"), bound),
            "move_together": (("patch", "band", "bound"), together),
            "distance": (("patch", "item", "band"), away),
            "distance_target": (("item", "band"), apart),
        },
        coords={
            "reference": ["source", "target"],
            "stat": list(Agreement._fields),
            "band": list(bands.names),
            "bound": ["low", "high"],
        },
        attrs={"groups": len(np.unique(labels[kept])), "level": 0.95},
    )


def applied(fn: Callable[[Tensor], Any], finished: Tensor, source: Run, target: Run) -> xr.Dataset:
    """The user's function of finished latents [patch, item, c, h, w], and of the source's and the
    target's own.
    """
    items = len(target.labels)
    values = [
        np.asarray(torch.as_tensor(fn(x.clone())).detach().cpu())
        for x in (source.finished, target.finished, *finished)
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
