"""Making a scheduler: which samplers there are by name, and fitting one to a model."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from ..arguments import shown
from ..errors import InvalidType, InvalidValue
from ..model.noise_schedule import CLIPPING, clips, is_flow, setting
from ..pieces.content import SET_LATER
from ..storage.configured import config_of
from .flow_sde import FlowSDE


@dataclass(frozen=True)
class Sampler:
    """One sampler that can be asked for by name.

    Attributes:
        scheduler: the scheduler's class.
        label: what a title calls it.
        takes_eta: whether it can be told how much noise to draw.
        options: what its configuration sets besides the model's own.
    """

    scheduler: Any
    label: str
    takes_eta: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS = {
    "ddim": Sampler(diffusers.DDIMScheduler, "DDIM", takes_eta=True),
    "ddpm": Sampler(diffusers.DDPMScheduler, "DDPM"),
    "dpm++": Sampler(
        diffusers.DPMSolverMultistepScheduler,
        "DPM-Solver++",
        options={"algorithm_type": "dpmsolver++"},
    ),
    "sde-dpm++": Sampler(
        diffusers.DPMSolverMultistepScheduler,
        "SDE-DPM-Solver++",
        options={"algorithm_type": "sde-dpmsolver++"},
    ),
    "euler-flow": Sampler(
        FlowSDE, "Euler on a flow", takes_eta=True, options={"stochastic_sampling": False}
    ),
}

MEMORYLESS = ("DDIMScheduler", "DDPMScheduler")
"""The schedulers whose step depends on nothing but its arguments: a replay need not rebuild what
they remember.
"""


def takes_eta(scheduler: Any) -> bool:
    """Whether a scheduler, by name or object, can be told how much noise to draw (eta)."""
    if isinstance(scheduler, str):
        return scheduler in SAMPLERS and SAMPLERS[scheduler].takes_eta
    return any(s.takes_eta and type(scheduler) is s.scheduler for s in SAMPLERS.values())


def default_name(base: Any) -> str:
    """The sampler for a model whose own scheduler is `base`, where nobody says: "ddim", or
    "euler-flow" for flow matching.
    """
    return "euler-flow" if base is not None and is_flow(base) else "ddim"


def make_scheduler(name: str | Any, base: Any = None, learned_sigma: bool = False) -> Any:
    """A fresh scheduler: one of `SAMPLERS`, or a copy of the one given.

    Args:
        name: of a sampler, or a diffusers scheduler.
        base: the model's own scheduler, whose noise levels and prediction type it gets.
        learned_sigma: whether the model predicts a variance, which DDPM can use.

    >>> type(make_scheduler("ddim")).__name__
    'DDIMScheduler'

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    if not isinstance(name, str):
        if isinstance(name, type) or not hasattr(name, "config"):
            raise InvalidType(
                f"scheduler={shown(name)} is no scheduler; expected an object of diffusers, or one "
                f"of {', '.join(map(repr, SAMPLERS))}."
            )
        _refuse_other_kind(type(name).__name__, is_flow(name), base)
        made = _plain_variance(type(name).from_config(config_of(name)), learned_sigma)
        for each in SET_LATER:
            if hasattr(name, each):
                setattr(made, each, copy.deepcopy(getattr(name, each)))
        return made
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.3)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"expected one of {', '.join(map(repr, SAMPLERS))}."
        )
        raise InvalidValue(f"There is no scheduler {name!r}; {hint}")
    sampler = SAMPLERS[name]
    _refuse_other_kind(repr(name), sampler.scheduler is FlowSDE, base)
    config = {} if base is None else config_of(base)
    if name == "euler-flow":
        # as the multistep schedulers call it
        config.setdefault("shift", config.get("flow_shift", 1.0))
        # diffusers warns of settings of other schedulers, as if they were lost
        read = inspect.signature(sampler.scheduler).parameters
        config = {name: value for name, value in config.items() if name in read or name[0] == "_"}
    options = dict(sampler.options)
    if base is not None and sampler.scheduler.__name__ in CLIPPING:
        # not these classes' own usual setting, which is for pixels
        options["clip_sample"] = clips(base)
        if type(base).__name__ not in CLIPPING and config.get("timestep_spacing") == "linspace":
            # they step by a whole share of the timesteps, which is not where these lie
            options["timestep_spacing"] = "leading"
    fitted = sampler.scheduler.from_config(config, **options)
    if sampler.scheduler is FlowSDE:
        if hasattr(base, "_shift"):  # by set_shift, perhaps
            fitted.set_shift(base.shift)
        return fitted
    made = _plain_variance(fitted, learned_sigma)
    return made if base is None else _with_schedule(made, base)


def _refuse_other_kind(name: str, flow: bool, base: Any) -> None:
    if base is not None and flow != is_flow(base):
        kind = "flow matching" if is_flow(base) else "variance preserving"
        raise InvalidValue(
            f"The scheduler {name} does not fit the model's own, {type(base).__name__}, which is "
            f"{kind}."
        )


def check_training(scheduler: Any, own: Any) -> None:
    """Refuse a scheduler that takes the model's answers for something else, and warn of one whose
    noise is not what the model was trained on: it would run, and its images be wrong.

    Args:
        scheduler: to sample with.
        own: the model's.
    """
    if is_flow(own):
        return
    name, its = type(scheduler).__name__, type(own).__name__
    kinds = [setting(each, "prediction_type") for each in (scheduler, own)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise InvalidValue(
            f"scheduler={name} has prediction_type={kinds[0]!r}, and the model's own, {its}, has "
            f"{kinds[1]!r}; expected one for what the model predicts, such as "
            f"{name}.from_config(model.scheduler.config)."
        )
    theirs, ours = (getattr(each, "alphas_cumprod", None) for each in (scheduler, own))
    if theirs is None or ours is None or len(theirs) != len(ours):
        return
    if not torch.allclose(theirs, ours.to(theirs), rtol=1e-3):
        warnings.warn(
            f"scheduler={name} has other noise levels than the model's own, {its}, so the model "
            "may be given noise that it was not trained on; 'ddim' and 'ddpm' take its own.",
            stacklevel=2,
        )


def _with_schedule(made: Any, base: Any) -> Any:
    """With the noise levels of `base`, also where they are not those its config says to a scheduler
    of another class (CogVideoX's).
    """
    if torch.allclose(made.alphas_cumprod, base.alphas_cumprod.to(made.alphas_cumprod)):
        return made
    if type(made).__name__ not in CLIPPING:
        raise InvalidValue(
            f"{type(base).__name__} has noise levels that {type(made).__name__} can't be given; "
            "expected 'ddim' or 'ddpm'."
        )
    made.alphas_cumprod = base.alphas_cumprod.clone()
    if hasattr(made, "final_alpha_cumprod"):
        made.final_alpha_cumprod = (
            torch.tensor(1.0) if made.config.set_alpha_to_one else made.alphas_cumprod[0]
        )
    return made


def learns_variance(scheduler: Any) -> bool:
    """Whether the scheduler reads the variance that a model predicts in its second half of
    channels: only DDPM's can.
    """
    return type(scheduler).__name__ == "DDPMScheduler" and str(scheduler.variance_type).startswith(
        "learned"
    )


def _plain_variance(scheduler: Any, learned_sigma: bool) -> Any:
    """Without a learned variance where the model has none or the scheduler can't use it."""
    if str(setting(scheduler, "variance_type")).startswith("learned") and not (
        learned_sigma and learns_variance(scheduler)
    ):
        plain = "fixed_small" if type(scheduler).__name__ == "DDPMScheduler" else None
        return type(scheduler).from_config(scheduler.config, variance_type=plain)
    return scheduler
