"""How twins are tied until their release: through their noise, or through attention.

A tie says where the twins start, what holds them together before the release, and whether they can
part at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..model.hooked import HookedDiT
from ..sampling.noise import START, noise, run_dtype
from ..sampling.schedulers import takes_eta
from .coupling import CouplingForm, check_coupling, coupled


@dataclass(frozen=True)
class NoiseTie:
    """Clones: one trajectory until the release, then each twin draws noise of its own.

    Biroli et al. 2024, arXiv 2402.18491. What finished clones agree on was decided by x_t at the
    release.
    """

    name = "noise"
    g = 0.0
    starts_equal = True

    def eta(self, scheduler: Any) -> float:
        """The stochasticity where nobody says: 1 for samplers that have to be told to draw."""
        return 1.0 if takes_eta(scheduler) else 0.0

    def start(self, model: HookedDiT, own: Sequence[int], _other: Sequence[int]) -> Tensor:
        """x_T of [A | B], equal; `own` are twin A's seeds."""
        z = noise(own, START, model.cfg.latent_shape, model.device, run_dtype(model.dtype))
        return torch.cat([z, z])

    def holding(self, _model: HookedDiT, _passes: int) -> contextlib.AbstractContextManager[None]:
        """What is in force until the release: nothing but the common noise."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class AttentionTie:
    """The twins start a little apart and attend to each other until the release.

    arXiv 2603.20987: z± = sqrt(1 - eps²) z ± eps xi, which keeps the variance, and the coupling of
    `dit_lens.twinning.coupling` with strength g.

    Attributes:
        g: strength of the coupling, 0 or more.
        form: "mix" or "joint".
        layers: the layers that are coupled; None is all.
        eps: how far apart the twins start, 0 (equal) to 1 (opposite).
    """

    g: float = 0.0
    form: CouplingForm = "mix"
    layers: Sequence[int] | None = None
    eps: float = 0.1
    name = "attention"

    def __post_init__(self) -> None:
        g, form = check_coupling(self.g, self.form)
        eps = arguments.number("eps", self.eps, 0, 1, why="equal starts to opposite ones")
        for name, value in (("g", g), ("form", form), ("eps", eps)):
            object.__setattr__(self, name, value)

    @property
    def starts_equal(self) -> bool:
        return self.eps == 0

    def eta(self, _scheduler: Any) -> float:
        """The stochasticity where nobody says: none."""
        return 0.0

    def start(self, model: HookedDiT, own: Sequence[int], other: Sequence[int]) -> Tensor:
        """x_T of [A | B]; `own` are the seeds of z, `other` those of xi."""
        shape, dtype = model.cfg.latent_shape, run_dtype(model.dtype)
        z, xi = (noise(seeds, START, shape, model.device, dtype) for seeds in (own, other))
        shared = (1 - self.eps**2) ** 0.5 * z
        return torch.cat([shared + self.eps * xi, shared - self.eps * xi])

    def holding(self, model: HookedDiT, passes: int) -> contextlib.AbstractContextManager[None]:
        """What is in force until the release: the coupling."""
        return coupled(model, self.g, self.form, self.layers, passes)


Tie = NoiseTie | AttentionTie


def make_tie(
    name: str, g: float, form: CouplingForm, layers: Sequence[int] | None, eps: float
) -> Tie:
    """The tie that is called so.

    Raises:
        ValueError: for an unknown name, a coupling that is none, or a coupling of clones.
    """
    # what is said of a coupling is checked with the other tie too
    coupling = AttentionTie(g, form, layers, eps)
    if arguments.choice("tie", name, ["noise", "attention"]) == "attention":
        return coupling
    if coupling.g:
        raise InvalidValue(
            f"g={g} is a coupling through attention; use tie='attention', or g=0 with tie='noise'."
        )
    return NoiseTie()
