"""What a scheduler's timesteps stand for: noise levels, log SNR, and x0 from a model's output.

Variance-preserving schedules have x_t = sqrt(abar) x0 + sqrt(1 - abar) eps; flow matching has
x_t = (1 - sigma) x0 + sigma eps.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue

CLIPPING = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
)
"""The schedulers that honour `clip_sample`."""


SPACINGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
"""The settings by which a scheduler spaces its noise levels itself."""


def setting(scheduler: Any, name: str) -> Any:
    """A setting of a scheduler; None where its class has none of that name. Its config also holds
    what the scheduler that it was made from had, and nobody reads.

    Args:
        scheduler: of diffusers.
        name: of the setting.

    >>> from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    >>> of_flow = DPMSolverMultistepScheduler(use_flow_sigmas=True)
    >>> setting(of_flow, "use_flow_sigmas")
    True
    >>> setting(DDIMScheduler.from_config(of_flow.config), "use_flow_sigmas")
    """
    cls: Any = type(scheduler)
    return scheduler.config.get(name) if name in _settings_of(cls) else None


@cache
def _settings_of(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls).parameters)


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler is of flow matching (rectified flow) and not variance preserving."""
    name = type(scheduler).__name__
    return (
        "Flow" in name
        or "RF" in name
        or bool(setting(scheduler, "use_flow_sigmas"))
        or setting(scheduler, "prediction_type") == "flow_prediction"
    )


def clips(scheduler: Any) -> bool:
    """Whether a scheduler bounds the x0 that it predicts. Others may have the setting, and not read
    it.
    """
    return type(scheduler).__name__ in CLIPPING and bool(scheduler.config.clip_sample)


def signal_and_noise(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x0 and of eps in x_t at timesteps [...], each [...], float64."""
    t = _on_host(torch.as_tensor(t))
    own = _own_sigmas(scheduler, t)
    if is_flow(scheduler):
        sigma = t.double() / scheduler.config.num_train_timesteps
        sigma = torch.where(own.isnan(), sigma, own)
        return 1 - sigma, sigma
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InvalidValue(
            f"The noise levels of {type(scheduler).__name__} are not known; expected a "
            "variance-preserving or flow-matching scheduler."
        )
    abar = _on_host(scheduler.alphas_cumprod).double()[t.long()]
    abar = torch.where(own.isnan(), abar, 1 / (1 + own**2))
    return abar.sqrt(), (1 - abar).sqrt()


def _own_sigmas(scheduler: Any, t: Tensor) -> Tensor:
    """The scheduler's own noise levels where it spaces them itself, float64 [...]; NaN elsewhere.

    Its timesteps are then rounded, and x_t is not quite what they stand for. Of steps that are
    rounded to the same timestep it is the one under way, or the first.
    """
    none = torch.full(t.shape, torch.nan, dtype=torch.float64)
    if not hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # of diffusers' solvers
        return none
    if not any(setting(scheduler, spacing) for spacing in SPACINGS):
        return none
    times = _on_host(scheduler.timesteps)
    sigmas = _on_host(scheduler.sigmas).double()
    if len(sigmas) != len(times) + 1:  # nobody has set its timesteps
        return none
    if torch.equal(times, t):
        return sigmas[:-1]
    same = times == t.reshape(-1, 1)
    at, now = same.int().argmax(1), scheduler.step_index
    if now is not None and now < len(times):
        at = torch.where(same[:, now], now, at)
    return torch.where(same.any(1), sigmas[at], torch.nan).reshape(t.shape)


def _on_host(x: Tensor) -> Tensor:
    return x if x.device.type == "cpu" else x.cpu()


def log_snr(scheduler: Any, t: Tensor) -> Tensor:
    """log(signal² / noise²) at timesteps [...]; for variance-preserving schedules log(abar / (1 -
    abar)).

    Where there is no signal at all, as at a flow's first step, it is given as half a training
    timestep later: curves need a number.
    """
    signal, noise = signal_and_noise(scheduler, t)
    signal = signal.clamp_min(0.5 / scheduler.config.num_train_timesteps)
    return 2 * (signal.log() - noise.log())


def predict_x0(scheduler: Any, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The clean image that a model output [batch, ...] at x_t and timesteps [batch] stands for, by
    the scheduler's prediction type.

    epsilon and v_prediction: Ho et al. 2020 eq. 15, Salimans & Ho 2022 appendix D; flow: output =
    eps - x0. Clipped if the scheduler clips. Raises ValueError for an unknown prediction type.
    """
    # a single number needs no copy to the device
    signal, noise = (
        f[0].to(x.dtype) if len(f) == 1 else f.to(x).view(-1, *[1] * (x.ndim - 1))
        for f in signal_and_noise(scheduler, torch.as_tensor(t).reshape(-1))
    )
    kind = "flow" if is_flow(scheduler) else scheduler.config.prediction_type
    if kind == "flow":
        x0 = x - noise * output
    elif kind == "epsilon":
        x0 = (x - noise * output) / signal
    elif kind == "v_prediction":
        x0 = signal * x - noise * output
    elif kind == "sample":
        x0 = output
    else:
        raise InvalidValue(
            f"The prediction type {kind!r} is unknown; expected 'epsilon', 'v_prediction', "
            "'sample' or flow matching."
        )
    if clips(scheduler):
        bound = scheduler.config.clip_sample_range
        x0 = x0.clamp(-bound, bound)
    return x0
