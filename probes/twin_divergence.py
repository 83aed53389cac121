"""How far twins differ inside the model: by layer, band and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, Series, Site, twins
from dit_lens.errors import InvalidState, InvalidValue

MASSIVE = 100.0
"""A channel is massive if its mean square exceeds this many times the median channel's (Sun et al.
2024, arXiv 2402.17762).
"""
CONSTANT = 1e-9
"""A channel whose variance is below this share of its mean square is constant: rounding makes as
much.
"""


class TwinDivergence(Probe):
    """Difference energy of the residual stream, E = |P_b(h_A - h_B)|² / (|P_b h_A|² + |P_b h_B|²),
    for every layer, band and step.

    The stream grows with depth and a few massive channels hold most of its energy, so a raw
    |P_b(h_A - h_B)|² shows those and not the twins. Hence the common-mode normalisation, and three
    weightings of the channels: "raw" takes them as they are, "standardised" divides each by its
    variance over tokens and items and leaves constant ones out, "trimmed" leaves the massive ones
    out. With any of them E is 0 for equal twins. It is 1 for unrelated ones only where they have no
    mean in common: what a position or a label adds to every stream counts as shared.

    Layer -1 is the embedding, before any layer: what layer 0 does is seen against it.

    Args:
        bands: a `Bands` of the token grid; by default "low" and "high", cut at 0.25 cycles per
            token.
        names: hook points with the axes [batch, token, d], one a layer, and at most one that is in
            none (layer -1).

        fine: more bands of the same modes, of which only sums over pairs are kept.

    Raises:
        ValueError: if the batch is not made of twins (use `dit_lens.twins`, or this class's `run`).

    >>> import dit_lens
    >>> TwinDivergence().run(dit_lens.load("digits"), [3], release=1, steps=3).energy.sizes
    Frozen({'channels': 3, 'layer': 29, 'step': 3, 'band': 2})
    """

    channels = ("raw", "standardised", "trimmed")
    of_twins = True
    in_parts = True

    def __init__(
        self,
        bands: Bands | None = None,
        names: Sequence[str] = ("hook_embed", "resid_post"),
        fine: Bands | None = None,
    ) -> None:
        self.wanted_bands, self.names, self.fine = bands, names, fine
        self.difference = Series()

    def start(self, model: HookedDiT) -> None:
        """Forget earlier runs.

        Args:
            model: what is traced.
        """
        self.bands = self.wanted_bands or Bands.radial(model.cfg.grid, cut=0.25)
        self.difference, self.common = Series(), Series()
        self.fine_difference, self.fine_common = Series(), Series()
        self.waiting: dict[int, list[_Seen]] = {}  # by layer: the parts of the step under way
        self.timesteps: dict[int, Tensor] = {}
        self.band: Tensor | None = None  # of each mode, where the model is
        self.within = torch.empty(0)

    def observe(self, activation: Tensor, site: Site) -> None:
        """Keep the twins' difference and common energies.

        Args:
            activation: [batch, token, d].
            site: where and when it was seen.
        """
        if "A" not in site.twin:
            raise InvalidValue(
                "TwinDivergence compares twins, and this batch has none; run it with "
                "dit_lens.twins(model, probes=[...])."
            )
        layer = -1 if site.layer is None else site.layer
        # sums over many values, which half precision does not hold
        stream = activation.to(torch.promote_types(activation.dtype, torch.float32))
        a, b = (stream[site.where(branch="cond", twin=twin)] for twin in "AB")
        if self.band is None:
            # of the finer bands, and which of them make up each band
            self.band, self.within = (each.to(a) for each in _indicators(self.bands, self.fine))
        self.timesteps.setdefault(site.step, site.t[0])
        mine = _Seen.of(a, b, self.band, self.bands, site)

        # the channels' weights are known when all of the batch was seen
        parts = [part for part in self.waiting.get(layer, []) if part.goes_with(mine)] + [mine]
        if sum(len(part.rows) for part in parts) < site.size:
            self.waiting[layer] = parts
            return
        self.waiting[layer] = []
        weights = _weights(parts)  # [channels, d]
        in_order = sorted(parts, key=lambda part: part.rows)  # a part's pairs are neighbours
        for kept, pooled, name in (
            (self.difference, self.fine_difference, "difference"),
            (self.common, self.fine_common, "common"),
        ):
            energy = torch.cat([getattr(part, name) for part in in_order]) @ weights.T
            if self.fine is not None:
                pooled.put(site, energy.sum(0), layer, whole=True)  # [fine, channels]
                energy = self.within @ energy
            kept.put(site, energy, layer, whole=True)  # [pair, band, channels]

    def run(self, model: Any, labels: Any = None, **settings: Any) -> xr.Dataset:
        """Make twins under observation, and give the result.

        Args:
            model: a `HookedDiT`, or what it wraps.
            labels: one a pair; by default those of `dit_lens.twins`.
            **settings: those of `dit_lens.twins`: pairs, release, steps, guidance, ...
        """
        model = HookedDiT.of(model)
        if labels is not None:
            labels = model.conditions.numbers(labels)
            settings = {"pairs": len(labels), "labels": labels} | settings
        twins(model, probes=[self], **settings)
        return self.result()

    def result(self) -> xr.Dataset:
        """The energies of the latest run.

        Returns:
            Dataset with `difference`, `common` [channels, layer, step, pair, band] and their ratio
            `energy` [channels, layer, step, band], pooled over pairs; with `fine` also
            `fine_difference` and `fine_common` [channels, layer, step, fine], summed over pairs.

        Raises:
            RuntimeError: if nothing was seen.
        """
        if not self.difference.steps:
            raise InvalidState(
                "TwinDivergence has seen nothing: use its run(model, ...), or "
                "dit_lens.twins(model, probes=[...])."
            )
        layers, steps = sorted(self.difference.keys), self.difference.steps
        arrays = {
            # [layer, step, pair, band, channels] -> [channels, layer, step, pair, band]
            name: kept.stacked(layers).movedim(-1, 0)
            for name, kept in (("difference", self.difference), ("common", self.common))
        }
        if self.fine is not None:
            for name, kept in (("difference", self.fine_difference), ("common", self.fine_common)):
                arrays[f"fine_{name}"] = kept.stacked(layers).movedim(-1, 0)
        dims = ("channels", "layer", "step", "pair", "band")
        variables: dict[str, Any] = {
            name: (
                (*dims[:3], "fine") if name.startswith("fine") else dims,
                value.float().cpu().numpy(),
            )
            for name, value in arrays.items()
        }
        pooled = arrays["difference"].sum(3) / arrays["common"].sum(3)
        variables["energy"] = (("channels", "layer", "step", "band"), pooled.float().cpu().numpy())
        return xr.Dataset(
            variables,
            coords={
                "channels": list(self.channels),
                "layer": layers,
                "step": steps,
                "band": list(self.bands.names),
                "timestep": ("step", torch.stack([self.timesteps[s] for s in steps]).tolist()),
            },
        )


def _indicators(bands: Bands, fine: Bands | None) -> tuple[Tensor, Tensor]:
    """[finer band, mode], and which finer bands each band holds, [band, finer band]."""
    of_mode = torch.nn.functional.one_hot(bands.index, bands.n).T
    if fine is None:
        return of_mode, torch.eye(bands.n)
    of_fine = torch.nn.functional.one_hot(fine.index, fine.n).T
    shared = of_mode @ of_fine.T
    if not torch.equal((shared > 0).sum(0), torch.ones(fine.n, dtype=torch.long)):
        raise InvalidValue(
            f"The fine bands {list(fine.names)} do not refine the bands {list(bands.names)}; "
            "expected each of them to lie in one band."
        )
    return of_fine, (shared > 0).long()


class _Seen(NamedTuple):
    """One layer of one part of a step.

    Attributes:
        step: of the run.
        rows: of the part in the step's batch.
        places: tokens times items.
        mean: [d], over tokens and items.
        spread: [d], the sum of squares about the mean.
        difference: |P_b(h_A - h_B)|² by channel, [pair, band, d].
        common: |P_b h_A|² + |P_b h_B|², [pair, band, d].
    """

    step: int
    rows: tuple[int, ...]
    places: int
    mean: Tensor
    spread: Tensor
    difference: Tensor
    common: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, band: Tensor, bands: Bands, site: Site) -> _Seen:
        """Of the twins' streams [pair, token, d]."""
        both = torch.cat([a, b]).flatten(0, 1)
        mean = both.mean(0)
        spread = (both - mean).square().sum(0)

        def energy(h: Tensor) -> Tensor:
            return band @ bands.coefficients_tokens(h).square()

        common = energy(a) + energy(b)
        return cls(site.step, site.rows, len(both), mean, spread, energy(a - b), common)

    def goes_with(self, other: _Seen) -> bool:
        """Whether it is of the same step, and has none of the other's rows, as a part that was run
        again has.
        """
        return self.step == other.step and not set(self.rows) & set(other.rows)


def _weights(parts: Sequence[_Seen]) -> Tensor:
    """How each of `TwinDivergence.channels` weighs the stream's channels, [3, d]."""
    count, mean, spread = 0, torch.zeros_like(parts[0].mean), torch.zeros_like(parts[0].mean)
    for part in parts:  # moments of parts add up so (Chan et al. 1983)
        off, both = part.mean - mean, count + part.places
        mean = mean + off * (part.places / both)
        spread = spread + part.spread + off.square() * (count * part.places / both)
        count = both
    variance = spread / (count - 1)
    mean_square = spread / count + mean.square()
    kept = mean_square <= MASSIVE * mean_square.median()
    # a constant channel has no difference, and divided by its variance would drown the others
    even = torch.where(variance > CONSTANT * mean_square, 1 / variance.clamp_min(1e-30), 0)
    return torch.stack([torch.ones_like(variance), even, kept.to(variance)])
