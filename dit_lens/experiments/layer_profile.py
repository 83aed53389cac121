"""Profiles over depth: in which layer do low and high frequencies come apart? Four readings, each
under its own name.

- `divergence`, in steps: when the normalised difference of twins in the layer's stream has reached
  half of what it ends at, high less low;
- `lens`, in steps: the same of the agreement between the layer's stream read by the last layer and
  the finished image;
- `ratio`, in log energy: log E_low - log E_high at one step (arXiv 2603.20987), E normalised by the
  common mode, channels standardised;
- `growth`, in log energy: the same of the bare differences, log |P_low d|² - log |P_high d|². What
  a layer amplifies in one band shows here, and not in the others: the common mode grows with it.

Each has its onset (`dit_lens.measures.onset`), with the embedding, layer -1, as the first early
layer, so that layer 0 can be named too.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..measures.bands import Bands
from ..measures.commitment import half_crossing
from ..measures.onset import Onset, onset

Array = NDArray[np.float64]
READING = "standardised"
MATTERS = {"divergence": 1.0, "lens": 1.0, "ratio": 1.0, "growth": 0.25}
"""What a profile must come to depart by for an onset: one step, or in log energy more than 28
random layers drift by (`make checks`).
"""


def profiles(
    seen: Any, lensed: Any, coarse: Bands, fine: Bands, counts: Array, at: int
) -> tuple[dict[str, Any], dict[str, Onset | str]]:
    """Every reading with its 95 % interval, and its onset (or why there is none).

    Args:
        seen: `TwinDivergence` in the bands `fine`.
        lensed: `LayerLens` in "low" and "high".
        coarse: "low" and "high" of the stream.
        counts: bootstrap over pairs [resample, pair], the first row all ones.
        at: the step of the two readings in log energy.
    """
    seen = seen.rename(channels="reading")
    merged = {name: _merged(seen[name], fine, coarse) for name in ("difference", "common")}
    energies = [
        _pooled(merged[name].sel(reading=READING), counts) for name in ("difference", "common")
    ]
    bare = _pooled(merged["difference"].sel(reading="raw").isel(step=[at]), counts)
    # a band may hold nothing in some layer, as the embedding of still frames
    with np.errstate(invalid="ignore"):
        energy = energies[0] / energies[1]  # [resample, layer, band, step]
    values: dict[str, Array] = {}
    taus = {}
    for view, curves in (("divergence", energy), ("lens", _lens_curves(lensed, counts))):
        taus[view] = half_crossing(curves)
        values[view] = taus[view][..., 1] - taus[view][..., 0]
    for view, parts in (("ratio", energy[..., at]), ("growth", bare[..., 0])):
        # twins that are equal in a band have no ratio
        with np.errstate(divide="ignore", invalid="ignore"):
            values[view] = np.log(parts[..., 0]) - np.log(parts[..., 1])
    onsets = {view: _onset(value, counts.shape[1], MATTERS[view]) for view, value in values.items()}
    now = seen.sel(reading=READING).isel(step=at).sum("pair")
    whole = {name: value.sum("pair") for name, value in merged.items()}
    variables: dict[str, Any] = {
        "layer_commitment": (
            ("view", "layer", "split"),
            np.stack([taus[view][0] for view in ("divergence", "lens")]),
        ),
        "layer_gap": (
            ("view", "layer"),
            np.stack([values[view][0] for view in ("divergence", "lens")]),
        ),
        "layer_gap_interval": (
            ("view", "layer", "bound"),
            np.stack([percentiles(values[v][1:]) for v in ("divergence", "lens")]),
        ),
        "log_ratio": (
            ("energy", "layer"),
            np.stack([values[view][0] for view in ("ratio", "growth")]),
        ),
        "log_ratio_interval": (
            ("energy", "layer", "bound"),
            np.stack([percentiles(values[v][1:]) for v in ("ratio", "growth")]),
        ),
        "difference_energy": (
            ("reading", "layer", "step", "split"),
            (whole["difference"] / whole["common"]).values,
        ),
        "difference_spectrum": (
            ("layer", "token_frequency"),
            (now.difference / now.common).transpose("layer", "band").values,
        ),
    }
    return variables, onsets


def percentiles(draws: Array) -> Array:
    """95 % percentile interval over the resamples, [..., bound]; NaN where every resample is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all-NaN slices say so by NaN
        return np.moveaxis(np.nanquantile(draws, [0.025, 0.975], axis=0), 0, -1)


def _merged(energies: Any, fine: Bands, coarse: Bands) -> Any:
    """Energies in the bands `fine` added up to those of `coarse`, which they refine."""
    first = [
        int((fine.index == b).nonzero()[0]) for b in range(fine.n)
    ]  # any mode of a band says where the band belongs
    group = energies.band.copy(
        data=[coarse.names[int(coarse.index[mode])] for mode in first]
    ).rename("split")
    parts = energies.groupby(group).sum().rename(split="band").sel(band=list(coarse.names))
    return parts.transpose("reading", "layer", "step", "band", "pair")


def _pooled(energies: Any, counts: Array) -> Array:
    """Summed over each resample's pairs, [resample, layer, band, step]."""
    return np.einsum(
        "rp,lspb->rlbs",
        counts,
        energies.transpose("layer", "step", "pair", "band").values.astype(np.float64),
    )


def _lens_curves(lensed: Any, counts: Array) -> Array:
    """corr² of each layer's x0 with the finished image, of every resample, [resample, layer, band,
    step].
    """
    sums = []
    for name in ("xy", "xx", "yy"):
        value = lensed[name].transpose("layer", "step", "batch", "band").values
        by_pair = value.reshape(*value.shape[:2], 2, -1, value.shape[-1]).sum(2)
        sums.append(np.einsum("rp,lspb->rlbs", counts, by_pair))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[0] ** 2 / (sums[1] * sums[2]))


def _onset(profile: Array, pairs: int, matters: float) -> Onset | str:
    try:
        return onset(profile[0], profile[1:], pairs, matters=matters, first=-1)
    except ValueError as error:  # a band that does not cross half its final value in some layer
        return str(error)
