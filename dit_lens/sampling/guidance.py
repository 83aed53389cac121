"""Guidance in our own loop: the batch that the model sees, and what its answers are mixed to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..families.base import Condition
from ..model.hooked import HookedDiT

if TYPE_CHECKING:
    from .run import Settings


def model_inputs(
    model: HookedDiT, x: Tensor, t: Tensor, labels: Tensor, guidance: float
) -> tuple[Tensor, Tensor, Tensor | Condition]:
    """The batch that the model sees: as it is, or [cond | null] with guidance."""
    labels = labels.to(x.device)
    if n_passes(model, guidance) == 2:
        x, labels = (
            torch.cat([x, x]),
            torch.cat([labels, torch.full_like(labels, model.cfg.null_class)]),
        )
    x, t = x.to(model.dtype), t.to(x.device).expand(len(x))
    if model.cfg.n_classes:
        return x, t, labels
    condition = model.conditions.of(labels)
    if model.cfg.distilled_guidance:
        strength = torch.full((len(x),), guidance, device=x.device)
        condition["guidance"] = model.family.strength(model.transformer, strength)
    return x, t, condition


def n_passes(model: HookedDiT, guidance: float) -> int:
    """2 where guidance needs a second, null pass; 1 without guidance, and for models that are told
    its strength.
    """
    return 1 if guidance == 1 or model.cfg.distilled_guidance else 2


def means(model: HookedDiT, output: Tensor) -> Tensor:
    """A model's output without the variance that some predict in a second half of the channels."""
    return output[:, : model.cfg.in_channels] if model.cfg.learned_sigma else output


def guided(output: Tensor, model: HookedDiT, settings: Settings) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): null + guidance (cond - null) on the guided
    channels, cond on the others.
    """
    if n_passes(model, settings.guidance) == 1:
        return output
    cond, null = output.chunk(2)
    last = (
        (model.cfg.in_channels if model.cfg.learned_sigma else None)
        if settings.guided_channels == "all"
        else 3
    )
    mixed = model.family.guided(cond[:, :last], null[:, :last], settings.guidance)
    return mixed if last is None else torch.cat([mixed, cond[:, last:]], 1)
