"""How much of an activation's energy lies in each frequency band of the token grid."""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dit_lens import Bands, HookedDiT, Probe, Series, Site
from dit_lens.errors import InvalidState, InvalidValue


class SpectralSplit(Probe):
    """Band energies |P_b h|² of hook points, [name, step, batch, band], reduced inside the hook.

    The bands are an orthonormal partition of the token grid's modes, so their energies sum to |h|²
    (Parseval).

    Args:
        names: hook points with the axes [batch, token, ...], by any names filter.
        bands: a `Bands` of the token grid; by default six radial bands.

    Raises:
        ValueError: in the forward pass, at a hook point that has no token axis.

    >>> import dit_lens
    >>> SpectralSplit("resid_post").run(dit_lens.load("digits"), [3, 7], steps=2).energy.sizes
    Frozen({'name': 28, 'step': 2, 'batch': 2, 'band': 6})
    """

    in_parts = True

    def __init__(self, names: str | list[str] = "resid_post", bands: Bands | None = None) -> None:
        self.names = names
        self.wanted_bands = bands
        self.energy = Series()

    def start(self, model: HookedDiT) -> None:
        """Forget earlier runs.

        Args:
            model: what is traced.
        """
        self.sites = model.sites
        self.bands = self.wanted_bands or Bands.radial(model.cfg.grid)
        self.energy = Series()
        self.timesteps: dict[int, Tensor] = {}

    def observe(self, activation: Tensor, site: Site) -> None:
        """Keep the energies.

        Args:
            activation: [batch, token, ...].
            site: where and when it was seen.
        """
        if self.sites[site.name][1] != "token":
            axes = ", ".join(self.sites[site.name])
            raise InvalidValue(
                f"{site.name!r} has no token axis to take a spectrum over; its axes are {axes}."
            )
        self.energy.put(site, self.bands.energy_tokens(activation.flatten(2)))
        self.timesteps.setdefault(site.step, site.t[0])

    def result(self) -> xr.Dataset:
        """The energies of the latest run.

        Returns:
            Dataset with `energy` [name, step, batch, band] and coordinates name, step, timestep and
            band.

        Raises:
            RuntimeError: if nothing was seen.
        """
        if not self.energy.steps:
            raise InvalidState(
                "SpectralSplit has seen nothing: use its run(model, ...), or `with "
                "dit_lens.trace(model, probes=[...])`."
            )
        energy, steps = self.energy.stacked(), self.energy.steps
        return xr.Dataset(
            {"energy": (("name", "step", "batch", "band"), energy.float().cpu().numpy())},
            coords={
                "name": self.energy.keys,
                "step": steps,
                "band": list(self.bands.names),
                "timestep": ("step", torch.stack([self.timesteps[s] for s in steps]).tolist()),
            },
        )
