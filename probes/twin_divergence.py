"""How far twins differ inside the model: by layer, band and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, Site, twins
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

    Raises:
        ValueError: if the batch is not made of twins (use `dit_lens.twins`, or this class's `run`).

    >>> import dit_lens
    >>> TwinDivergence().run(dit_lens.load("digits"), [3], release=1, steps=2).energy.sizes
    Frozen({'channels': 3, 'layer': 29, 'step': 2, 'band': 2})
    """

    channels = ("raw", "standardised", "trimmed")
    of_twins = True

    def __init__(
        self, bands: Bands | None = None, names: Sequence[str] = ("hook_embed", "resid_post")
    ) -> None:
        self.wanted_bands, self.names = bands, names

    def start(self, model: HookedDiT) -> None:
        """Forget earlier runs.

        Args:
            model: what is traced.
        """
        self.bands = self.wanted_bands or Bands.radial(model.cfg.grid, cut=0.25)
        self.difference: dict[tuple[int, int], Tensor] = {}
        self.common: dict[tuple[int, int], Tensor] = {}
        self.timesteps: dict[int, Tensor] = {}

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
        a, b = (
            activation[site.where(branch="cond", twin="A")],
            activation[site.where(branch="cond", twin="B")],
        )
        mean_square = torch.cat([a, b]).square().mean((0, 1))
        variance = torch.cat([a, b]).var((0, 1))
        kept = mean_square <= MASSIVE * mean_square.median()
        # a constant channel has no difference, and divided by its variance would drown the others
        varies = variance > CONSTANT * mean_square
        even = torch.where(varies, 1 / variance.clamp_min(1e-30), 0)
        weights = torch.stack([torch.ones_like(variance), even, kept.to(variance)])
        band = torch.nn.functional.one_hot(self.bands.index, self.bands.n).to(a)

        def energy(h: Tensor) -> Tensor:  # [pair, token, d] -> [channels, pair, band]
            # [pair, mode, channels]
            per_mode = self.bands.coefficients_tokens(h).square() @ weights.T
            return torch.einsum("pmc,mb->cpb", per_mode, band)

        self.difference[layer, site.step] = energy(a - b)
        self.common[layer, site.step] = energy(a) + energy(b)
        self.timesteps[site.step] = site.t[0]

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
            `energy` [channels, layer, step, band], pooled over pairs.

        Raises:
            RuntimeError: if nothing was seen.
        """
        if not self.difference:
            raise InvalidState(
                "TwinDivergence has seen nothing: use its run(model, ...), or "
                "dit_lens.twins(model, probes=[...])."
            )
        layers, steps = (sorted({key[i] for key in self.difference}) for i in (0, 1))
        arrays = {
            name: torch.stack(
                [torch.stack([seen[layer, step] for step in steps], 1) for layer in layers], 1
            )
            for name, seen in (("difference", self.difference), ("common", self.common))
        }
        dims = ("channels", "layer", "step", "pair", "band")
        variables: dict[str, Any] = {
            name: (dims, value.float().cpu().numpy()) for name, value in arrays.items()
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
                "timestep": ("step", [float(self.timesteps[s]) for s in steps]),
            },
        )
