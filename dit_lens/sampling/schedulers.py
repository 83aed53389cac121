"""All that dit_lens needs to know of diffusers' schedulers: making one, its noise levels, and x0
from a model's output.

Variance-preserving schedules have x_t = sqrt(abar) x0 + sqrt(1 - abar) eps; flow matching has x_t =
(1 - sigma) x0 + sigma eps.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue

NAMES = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler-flow": ("FlowMatchEulerDiscreteScheduler", {}),
}
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # the schedulers that honour clip_sample
ETA = ("DDIMScheduler", "FlowSDE")  # those that can be told how much noise to draw


def default_name(base: Any) -> str:
    """The sampler for a model whose own scheduler is `base`, where nobody says: "ddim", or
    "euler-flow" for flow matching.
    """
    return "euler-flow" if base is not None and is_flow(base) else "ddim"


def make_scheduler(name: str | Any, base: Any = None, learned_sigma: bool = False) -> Any:
    """A fresh scheduler: one of `NAMES` with the model's own noise schedule and prediction type, or
    a copy of the one given.

    >>> type(make_scheduler("ddim")).__name__
    'DDIMScheduler'

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    import diffusers

    if not isinstance(name, str):
        return _plain_variance(type(name).from_config(name.config), learned_sigma)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.3)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"expected one of {', '.join(map(repr, NAMES))}."
        )
        raise InvalidValue(f"There is no scheduler {name!r}; {hint}")
    cls, options = NAMES[name]
    if base is not None and (name == "euler-flow") != is_flow(base):
        kind = "flow matching" if is_flow(base) else "variance preserving"
        raise InvalidValue(
            f"The scheduler {name!r} does not fit the model's own, {type(base).__name__}, which is "
            f"{kind}."
        )
    config = {} if base is None else dict(base.config)
    if name == "euler-flow":
        # as the multistep schedulers call it
        config.setdefault("shift", config.get("flow_shift", 1.0))
        return flow_sde().from_config(config)
    made = _plain_variance(getattr(diffusers, cls).from_config(config, **options), learned_sigma)
    return made if base is None else _with_schedule(made, base)


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


@cache
def flow_sde() -> Any:
    """diffusers' Euler scheduler for flow matching, with DDIM's eta: how much of the noise is drawn
    anew in each step.

    x_t = (1 - sigma) x0 + sigma eps has, like any Gaussian path, a Markov process whose posterior
    q(x_s | x_t, x0) is what a stochastic sampler draws from. DDIM's equations 12 and 16 (Song et
    al. 2021, arXiv 2010.02502), written for any signal a and noise s: x_s = a_s x0 + sqrt(s_s² -
    c²) eps + c z with c = eta (s_s / s_t) sqrt(s_t² - (a_t / a_s)² s_s²). At eta = 0 that is
    Euler's step.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.utils.torch_utils import randn_tensor

    class FlowSDE(FlowMatchEulerDiscreteScheduler):
        def step(
            self,
            model_output: Tensor,
            timestep: Any,
            sample: Tensor,
            generator: Any = None,
            eta: float = 0.0,
        ) -> Any:
            if self.step_index is None:
                self._init_step_index(timestep)
            sigma, following = (
                float(s) for s in self.sigmas[self.step_index : self.step_index + 2]
            )
            taken = super().step(model_output, timestep, sample)
            if not eta or following == 0:
                return taken
            x0, eps = sample - sigma * model_output, sample + (1 - sigma) * model_output
            kept = sigma**2 - ((1 - sigma) / (1 - following)) ** 2 * following**2
            c = eta * following / sigma * kept**0.5
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
            taken.prev_sample = (
                (1 - following) * x0 + (following**2 - c**2) ** 0.5 * eps + c * noise
            )
            return taken

    return FlowSDE


def learns_variance(scheduler: Any) -> bool:
    """Whether the scheduler reads the variance that a model predicts in its second half of
    channels: only DDPM's can.
    """
    return type(scheduler).__name__ == "DDPMScheduler" and str(scheduler.variance_type).startswith(
        "learned"
    )


def _plain_variance(scheduler: Any, learned_sigma: bool) -> Any:
    """Without a learned variance where the model has none or the scheduler can't use it."""
    if str(scheduler.config.get("variance_type", "")).startswith("learned") and not (
        learned_sigma and learns_variance(scheduler)
    ):
        plain = "fixed_small" if type(scheduler).__name__ == "DDPMScheduler" else None
        return type(scheduler).from_config(scheduler.config, variance_type=plain)
    return scheduler


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler is of flow matching and not variance preserving."""
    config = scheduler.config
    return (
        not hasattr(scheduler, "alphas_cumprod")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def signal_and_noise(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x0 and of eps in x_t at timesteps [...], each [...], float64."""
    t = torch.as_tensor(t).cpu()
    if is_flow(scheduler):
        sigma = t.double() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    abar = scheduler.alphas_cumprod.cpu().double()[t.long()]
    return abar.sqrt(), (1 - abar).sqrt()


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
    signal, noise = (
        f.to(x).view(-1, *[1] * (x.ndim - 1))
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
    if type(scheduler).__name__ in CLIPPING and scheduler.config.clip_sample:
        bound = scheduler.config.clip_sample_range
        x0 = x0.clamp(-bound, bound)
    return x0
