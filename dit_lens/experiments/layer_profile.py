"""Profiles over depth: in which layer do low and high frequencies come apart? Four views, each
under its own name.

- `stream`, in steps: commitment in the layer's stream. Clones' finished images go through the model
  once more, at the last timestep; where what they agree on in the layer, beyond the mean of each
  label, position and channel, passes 1/2 as the release moves, the layer's content was decided;
- `lens`, in steps: when the agreement between the layer's stream read by the last layer and the
  finished image has reached half of what it ends at;
- `ratio`, in log energy: log E_low - log E_high at one step (arXiv 2603.20987), E normalised by the
  common mode, channels standardised;
- `growth`, in log energy: the same of the bare differences, log |P_low d|² - log |P_high d|². What
  a layer amplifies in one band shows here, and not in the others: the common mode grows with it.

Each has its onset (`dit_lens.measures.onset`), with the embedding, layer -1, as the first early
layer, so that layer 0 can be named too. No profile says anything about depth by itself: see
`dit_lens.experiments.null_profiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..measures import Array
from ..measures.agreement import Contrasts
from ..measures.bands import Bands
from ..measures.bootstrap import interval, simultaneous
from ..measures.crossing import half_crossing
from ..measures.onset import Onset, onset
from ..model.hooked import HookedDiT
from ..sampling.guidance import model_inputs
from ..twinning.twins import Twins
from .outcomes import Outcome

CHANNELS = "standardised"
"""How the stream's channels are weighed (see `dit_lens.probes.TwinDivergence`): each divided by its
variance, since a few massive ones would otherwise be all that is seen.
"""
STEP_VIEWS, ENERGY_VIEWS = ("stream", "lens"), ("ratio", "growth")
VIEWS = (*STEP_VIEWS, *ENERGY_VIEWS)
CONSTANT = 1e-9
"""A channel that varies by less than this share of the most variable one is constant."""
MATTERS = {"stream": 1 / 16, "lens": 1 / 16, "ratio": 1.0, "growth": 0.25}
"""What a profile must come to depart by for an onset: a share of the run's steps, or in log energy
more than 28 random layers drift by: the size at which `make checks` counts false alarms.
"""


def last_layers(n_layers: int) -> int:
    """How many layers the paper's last five of 28 are, in a model of any depth."""
    return max(1, round(n_layers * 5 / 28))


@dataclass(frozen=True, eq=False)
class Streams(Outcome):
    """Every layer's stream as an outcome: what finished latents agree on in it, band by band.

    Bands are those of every layer in turn, the embedding's first: low, high, low, high, ...

    Attributes:
        model: whose streams.
        t: the timestep at which they are looked at.
        labels: of the pairs.
        batch: so many images go through the model at once; None is all.
    """

    model: HookedDiT
    t: Tensor
    labels: tuple[int, ...]
    batch: int | None = None

    @classmethod
    def of_twins(cls, pair: Twins, split: Bands, batch: int | None = None) -> Streams:
        """At the last timestep of twins' run.

        Args:
            pair: the twins.
            split: "low" and "high" of the stream.
            batch: so many images go through the model at once; None is all.
        """
        run, labels = pair.run, tuple(pair.a.labels.tolist())
        return cls("stream", _latents, split, run.model, run.timesteps[-1], labels, batch)

    @property
    def band_names(self) -> tuple[str, ...]:
        """Each layer's bands."""
        assert self.bands is not None
        layers = range(-1, self.model.cfg.n_layers)
        return tuple(f"layer {layer}, {name}" for layer in layers for name in self.bands.names)

    def modes(self, x: Tensor, contrasts: Contrasts) -> Tensor:  # noqa: ARG002
        """The latents as they are: streams of both sides are looked at together, layer by layer.

        Args:
            x: finished latents, [pair, *latent_shape].
            contrasts: of the labels.
        """
        return x

    def sums(self, x: Tensor, y: Tensor, contrasts: Contrasts) -> Tensor:
        """⟨a, b⟩, |a|² and |b|² in every layer, [3, pair, layer x band], without the mean of each
        label, position and channel; each channel is divided by its variance, constant ones are left
        out.

        Args:
            x: finished latents of the twins A, [pair, *latent_shape].
            y: of the twins B.
            contrasts: of the labels.
        """
        bands = self.bands
        assert bands is not None
        both, labels = torch.cat([x, y]), torch.as_tensor([*self.labels, *self.labels])
        size = self.batch or len(both)
        waiting: dict[str, list[Tensor]] = {}
        found: list[Tensor] = []

        def look(stream: Tensor, hook: Any) -> None:
            parts = waiting.setdefault(hook.name, [])
            parts.append(stream)
            if sum(map(len, parts)) < len(both):
                return
            u, v = (
                contrasts.of(half.double()) for half in torch.cat(waiting.pop(hook.name)).chunk(2)
            )
            variance = u.square().mean((0, 1))
            varies = variance > CONSTANT * variance.max()
            weight = torch.where(varies, 1 / variance.clamp_min(1e-300), 0).sqrt()
            p, q = (bands.coefficients_tokens(side * weight) for side in (u, v))
            per_mode = torch.stack([(a * b).sum(-1) for a, b in ((p, q), (p, p), (q, q))])
            found.append(bands.total(per_mode))

        hooks = [(name, look) for name in ("hook_embed", "resid_post")]
        with torch.no_grad(), self.model.hooks(hooks):
            for part, of in zip(both.split(size), labels.split(size), strict=True):
                self.model(*model_inputs(self.model, part, self.t, of, 1.0))
        return torch.cat(found, -1)


def _latents(x: Tensor) -> Tensor:
    return x


class Profiles(NamedTuple):
    """Every view, and what it is made of.

    Attributes:
        values: for each view [resample, layer].
        taus: for each view in steps [resample, layer, band].
        merged: difference and common energies in low and high, by name.
    """

    values: dict[str, Array]
    taus: dict[str, Array]
    merged: dict[str, xr.DataArray]


def profile_values(
    seen: xr.Dataset,
    lensed: xr.Dataset,
    stream: Array,
    coarse: Bands,
    fine: Bands,
    counts: Array,
    at: int,
) -> Profiles:
    """Every view, in every resample.

    Args:
        seen: `TwinDivergence` in the bands `fine`, or in `coarse` with `fine=fine`.
        lensed: `LayerLens` in "low" and "high".
        stream: commitment in `Streams`, [resample, layer x band], in steps.
        coarse: "low" and "high" of the stream.
        fine: bands that refine `coarse`.
        counts: [resample, pair].
        at: the step of the two views in log energy.
    """
    # in steps
    taus = {
        "stream": stream.reshape(len(stream), -1, coarse.n),
        "lens": half_crossing(_lens_curves(lensed, counts)),
    }
    values = {view: tau[..., 1] - tau[..., 0] for view, tau in taus.items()}

    # in log energy, at one step
    merged = {
        name: seen[name].transpose("channels", "layer", "step", "band", "pair")
        if "fine_common" in seen  # pairs in the coarse bands, and only sums in the fine ones
        else _merged(seen[name], fine, coarse)
        for name in ("difference", "common")
    }
    now = {name: value.isel(step=[at]) for name, value in merged.items()}
    difference, common = (_pooled(now[name].sel(channels=CHANNELS), counts)[..., 0] for name in now)
    bare = _pooled(now["difference"].sel(channels="raw"), counts)[..., 0]
    # a band may hold nothing in some layer, and twins that are equal in it have no ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        for view, parts in (("ratio", difference / common), ("growth", bare)):
            values[view] = np.log(parts[..., 0]) - np.log(parts[..., 1])
    return Profiles(values, taus, merged)


def profiles(
    found: Profiles, seen: xr.Dataset, coarse: Bands, fine: Bands, pairs: int, steps: int, at: int
) -> tuple[xr.Dataset, dict[str, Onset | str]]:
    """Every view with its 95 % intervals, and its onset.

    Args:
        found: of `profile_values`, the sample first.
        seen: as there.
        coarse: as there.
        fine: as there.
        pairs: of twins.
        steps: of the run.
        at: as there.

    Returns:
        tuple[xr.Dataset, dict[str, Onset | str]]: the variables with `layer` or `channels` among
            their dims that docs/gap.md lists, and for each view its onset, or why there can be
            none.
    """
    values, taus, merged = found
    onsets = {
        view: _onset(value, pairs, view, MATTERS[view] * (steps if view in STEP_VIEWS else 1))
        for view, value in values.items()
    }
    now = seen.sel(channels=CHANNELS).isel(step=at)
    if "fine_common" in seen:
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
        last = last_layers(profile.shape[1] - 1)
        found = onset(
            profile[0], profile[1:], pairs, matters=matters, first=-1, last=last, unit=unit
        )
    except ValueError as error:  # a band that does not cross half its final value in some layer
        return str(error)
    return found
