"""Profiles over depth: in which layer do low and high frequencies come apart? Four views, each
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

import numpy as np
import xarray as xr

from ..measures import Array
from ..measures.bands import Bands
from ..measures.bootstrap import interval, simultaneous
from ..measures.crossing import half_crossing
from ..measures.onset import Onset, onset

CHANNELS = "standardised"
"""How the stream's channels are weighed (see `dit_lens.probes.TwinDivergence`): each divided by its
variance, since a few massive ones would otherwise be all that is seen.
"""
STEP_VIEWS, ENERGY_VIEWS = ("divergence", "lens"), ("ratio", "growth")
MATTERS = {"divergence": 1 / 16, "lens": 1 / 16, "ratio": 1.0, "growth": 0.25}
"""What a profile must come to depart by for an onset: a share of the run's steps, or in log energy
more than 28 random layers drift by: the size at which `make checks` counts false alarms.
"""


def profiles(
    seen: xr.Dataset, lensed: xr.Dataset, coarse: Bands, fine: Bands, counts: Array, at: int
) -> tuple[xr.Dataset, dict[str, Onset | str]]:
    """Every view with its 95 % intervals, and its onset.

    Args:
        seen: `TwinDivergence` in the bands `fine`, or in `coarse` with `fine=fine`.
        lensed: `LayerLens` in "low" and "high".
        coarse: "low" and "high" of the stream.
        fine: bands that refine `coarse`.
        counts: [1 + resample, pair], from `dit_lens.measures.bootstrap.draws`.
        at: the step of the two views in log energy.

    Returns:
        tuple[xr.Dataset, dict[str, Onset | str]]: the variables with `layer` or `channels` among
            their dims that docs/gap.md lists, and for each view its onset, or why there can be
            none.
    """
    values: dict[str, Array] = {}  # [resample, layer]
    taus: dict[str, Array] = {}  # [resample, layer, band]

    # in steps: half-crossings of the normalised difference, and of the lens
    kept = "fine_common" in seen  # pairs in the coarse bands, and only sums in the fine ones
    merged = {
        name: seen[name].transpose("channels", "layer", "step", "band", "pair")
        if kept
        else _merged(seen[name], fine, coarse)
        for name in ("difference", "common")
    }
    difference, common = (
        _pooled(merged[name].sel(channels=CHANNELS), counts) for name in ("difference", "common")
    )
    # a band may hold nothing in some layer, as the embedding of still frames
    with np.errstate(invalid="ignore"):
        energy = difference / common  # [resample, layer, band, step]
    for view, curves in (("divergence", energy), ("lens", _lens_curves(lensed, counts))):
        taus[view] = half_crossing(curves)
        values[view] = taus[view][..., 1] - taus[view][..., 0]

    # in log energy, at one step
    bare = _pooled(merged["difference"].sel(channels="raw").isel(step=[at]), counts)
    for view, parts in (("ratio", energy[..., at]), ("growth", bare[..., 0])):
        # twins that are equal in a band have no ratio
        with np.errstate(divide="ignore", invalid="ignore"):
            values[view] = np.log(parts[..., 0]) - np.log(parts[..., 1])

    pairs, steps = counts.shape[1], seen.sizes["step"]
    onsets = {
        view: _onset(value, pairs, view, MATTERS[view] * (steps if view in STEP_VIEWS else 1))
        for view, value in values.items()
    }
    now = seen.sel(channels=CHANNELS).isel(step=at)
    if kept:
        now = now[["fine_difference", "fine_common"]].rename(
            fine_difference="difference", fine_common="common", fine="band"
        )
    else:
        now = now.sum("pair")
    whole = {name: value.sum("pair") for name, value in merged.items()}

    # of layers by themselves, and of all of them at once; the lens takes label means off, of both
    # twins of a pair, which leaves each pair a row
    def stacked(views: tuple[str, ...]) -> tuple[Array, Array, Array]:
        return (
            np.stack([values[view][0] for view in views]),
            np.stack([interval(values[view], pairs) for view in views]),
            np.stack([simultaneous(values[view], pairs) for view in views]),
        )

    gap, gap_interval, gap_together = stacked(STEP_VIEWS)
    ratio, ratio_interval, ratio_together = stacked(ENERGY_VIEWS)
    dataset = xr.Dataset(
        {
            "layer_commitment": (
                ("view", "layer", "split"),
                np.stack([taus[view][0] for view in STEP_VIEWS]),
            ),
            "layer_gap": (("view", "layer"), gap),
            "layer_gap_interval": (("view", "layer", "bound"), gap_interval),
            "layer_gap_together": (("view", "layer", "bound"), gap_together),
            "log_ratio": (("energy", "layer"), ratio),
            "log_ratio_interval": (("energy", "layer", "bound"), ratio_interval),
            "log_ratio_together": (("energy", "layer", "bound"), ratio_together),
            "difference_energy": (
                ("channels", "layer", "step", "split"),
                (whole["difference"] / whole["common"]).values,
            ),
            "difference_spectrum": (
                ("layer", "token_frequency"),
                (now.difference / now.common).transpose("layer", "band").values,
            ),
        },
        coords={
            "view": list(STEP_VIEWS),
            "energy": list(ENERGY_VIEWS),
            "layer": seen.layer.values,
            "step": seen.step.values,
            "split": list(coarse.names),
            "bound": ["low", "high"],
            "channels": list(seen.channels.values),
            "token_frequency": fine.middles(),
        },
    )
    return dataset, onsets


def _merged(energies: xr.DataArray, fine: Bands, coarse: Bands) -> xr.DataArray:
    """Energies in the bands `fine` added up to those of `coarse`, which they refine."""
    # any mode of a band says where the band belongs
    first = [int((fine.index == b).nonzero()[0]) for b in range(fine.n)]
    group = energies.band.copy(
        data=[coarse.names[int(coarse.index[mode])] for mode in first]
    ).rename("split")
    parts = energies.groupby(group).sum().rename(split="band").sel(band=list(coarse.names))
    return parts.transpose("channels", "layer", "step", "band", "pair")


def _pooled(energies: xr.DataArray, counts: Array) -> Array:
    """Summed over each resample's pairs, [resample, layer, band, step]."""
    return np.einsum(
        "rp,lspb->rlbs",
        counts,
        energies.transpose("layer", "step", "pair", "band").values.astype(np.float64),
    )


def _lens_curves(lensed: xr.Dataset, counts: Array) -> Array:
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


def _onset(profile: Array, pairs: int, view: str, matters: float) -> Onset | str:
    unit = "steps" if view in STEP_VIEWS else "in log energy"
    try:
        # the paper's last five of 28, in a model of any depth
        last = max(1, round((profile.shape[1] - 1) * 5 / 28))
        found = onset(
            profile[0], profile[1:], pairs, matters=matters, first=-1, last=last, unit=unit
        )
    except ValueError as error:  # a band that does not cross half its final value in some layer
        return str(error)
    return found
