"""Guidance in our own loop: the batch that the model sees, and what its answers are mixed to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..families.config import Condition
from ..model.hooked import HookedDiT
from ..model.pinned import sent
from .settings import Settings


def model_inputs(
    model: HookedDiT, x: Tensor, t: Tensor, labels: Tensor, guidance: float
) -> tuple[Tensor, Tensor, Tensor | Condition]:
    """The batch that the model sees: as it is, or [cond | null] with guidance. Labels and times
    of the host are sent to x; of others the host may wait.
    """
    if n_passes(model, guidance) == 2:
        x, labels = (
            torch.cat([x, x]),
            torch.cat([labels, torch.full_like(labels, model.cfg.null_class)]),
        )
    x, t = x.to(model.dtype), sent(t, x.device).expand(len(x))
    if model.cfg.n_classes:
        return x, t, sent(labels, x.device)
    condition = model.conditions.of(labels, x.device)
    if model.cfg.distilled_guidance:
        strength = torch.full((len(x),), guidance, device=x.device)
        condition["guidance"] = model.family.strength(model.transformer, strength)
    return x, t, condition


def n_passes(model: HookedDiT, guidance: float) -> int:
    """2 where guidance needs a second, null pass; 1 without guidance, and for models that are told
    its strength.

    Raises:
        InvalidValue: for guidance of a model that has no label for no class.
    """
    if guidance == 1 or model.cfg.distilled_guidance:
        return 1
    if not model.cfg.has_null:
        raise InvalidValue(
            f"The model has {model.cfg.n_classes} labels and none for no class, which "
            f"guidance={guidance:g} needs; expected guidance=1, or, if its last label stands for "
            f"none, an Adapter with labels={model.cfg.n_classes - 1}."
        )
    return 2


def branches(items: int, passes: int) -> tuple[str, ...] | None:
    """The branch of guidance of each row of `model_inputs`; None where no null half is run, and the
    labels tell.
    """
    return None if passes == 1 else ("cond",) * items + ("uncond",) * items


def guided(answer: Tensor, model: HookedDiT, settings: Settings, keep_variance: bool) -> Tensor:
    """What the scheduler is given: the model's answer, mixed by classifier-free guidance.

    null + guidance (cond - null) on the guided channels, cond on the others (Ho & Salimans 2022,
    arXiv 2207.12598, equation 6).

    Args:
        answer: the model's, [batch, ...], or [cond | null] with guidance.
        model: whose answer it is.
        settings: the run's.
        keep_variance: whether a predicted variance is kept, for schedulers that read it.
    """
    if n_passes(model, settings.guidance) == 2:
        cond, null = answer.chunk(2)
        means_only = model.cfg.in_channels if model.cfg.learned_sigma else None
        last = means_only if settings.guided_channels == "all" else 3
        mixed = model.family.guided(cond[:, :last], null[:, :last], settings.guidance)
        answer = mixed if last is None else torch.cat([mixed, cond[:, last:]], 1)
    return answer if keep_variance else model.without_variance(answer)
