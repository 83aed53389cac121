"""diffusers' Euler scheduler for flow matching, made as stochastic as wanted."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..model.pinned import sent


class FlowSDE(FlowMatchEulerDiscreteScheduler):
    """Euler's step with DDIM's eta: how much of the noise is drawn anew in each step.

    x_t = (1 - sigma) x0 + sigma eps has, like any Gaussian path, a Markov process whose posterior
    q(x_s | x_t, x0) is what a stochastic sampler draws from. DDIM's equations 12 and 16 (Song et
    al. 2021, arXiv 2010.02502), written for any signal a and noise s: x_s = a_s x0 + sqrt(s_s² -
    c²) eps + c z with c = eta (s_s / s_t) sqrt(s_t² - (a_t / a_s)² s_s²). At eta = 0 that is
    Euler's step.
    """

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
        sigma, following = (float(s) for s in self.sigmas[self.step_index : self.step_index + 2])
        taken = super().step(model_output, timestep, sample)
        if not eta or following == 0:
            return taken
        x0, eps = sample - sigma * model_output, sample + (1 - sigma) * model_output
        kept = sigma**2 - ((1 - sigma) / (1 - following)) ** 2 * following**2
        c = eta * following / sigma * kept**0.5
        first = generator[0] if isinstance(generator, list) else generator
        where = sample.device if first is None else first.device
        drawn = randn_tensor(sample.shape, generator=generator, device=where, dtype=sample.dtype)
        noise = sent(drawn, sample.device)
        taken.prev_sample = (1 - following) * x0 + (following**2 - c**2) ** 0.5 * eps + c * noise
        return taken
