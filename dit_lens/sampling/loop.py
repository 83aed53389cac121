"""The denoising loop: one step, many steps, and a scheduler made ready for them.

The scheduler does the arithmetic and draws its noise from per-item generators
(`dit_lens.sampling.noise`), a list of which every diffusers scheduler takes. A multistep
scheduler's memory is rebuilt for a replay by feeding it the stored model outputs again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..model.hooked import HookedDiT
from ..model.noise_schedule import predict_x0
from .guidance import guided, model_inputs
from .noise import generators
from .schedulers import SAMPLERS, learns_variance, make_scheduler, takes_eta
from .settings import Change, Settings, edits_at, seeds_at


def model_output(
    model: HookedDiT, x: Tensor, step: int, labels: Tensor, settings: Settings, scheduler: Any
) -> Tensor:
    """What the scheduler is given at x_t [batch, ...]: the model's guided answer, [batch, ...]."""
    t = scheduler.timesteps[step]
    answer = model(*model_inputs(model, x, t, labels, settings.guidance))
    return guided(answer.to(x.dtype), model, settings, learns_variance(scheduler))


def advance(
    scheduler: Any, output: Tensor, x: Tensor, seeds: Sequence[int], step: int, eta: float
) -> Tensor:
    """The next x_t: one step of the scheduler, with each item's own noise."""
    options: dict[str, Any] = {}
    # UniPC draws no noise and takes none
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generators(seeds, step)
    if takes_eta(scheduler):
        options["eta"] = eta
    following: Tensor = scheduler.step(output, scheduler.timesteps[step], x, **options).prev_sample
    return following.to(x.dtype)


def denoise(
    model: HookedDiT,
    x: Tensor,
    labels: Tensor,
    history: tuple[Change, ...],
    settings: Settings,
    scheduler: Any,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """From x_t at step `first` to before step `last`, one step after the other.

    Yields:
        The predicted x0, what the scheduler was given, and the next x_t.
    """
    with torch.no_grad():
        for step in range(first, settings.steps if last is None else last):
            with model.hooks(edits_at(history, step)):
                output = model_output(model, x, step, labels, settings, scheduler)
            t = scheduler.timesteps[step]
            x0 = predict_x0(scheduler, x, model.without_variance(output), t)
            x = advance(scheduler, output, x, seeds_at(history, step), step, settings.eta)
            yield x0, output, x


def prepared(model: HookedDiT, settings: Settings) -> Any:
    """A fresh scheduler with its timesteps set.

    Raises ValueError if it does not fit the model, the steps or eta.
    """
    if model.scheduler is None:
        raise InvalidValue(
            "The model has no scheduler, so its noise schedule is unknown; give one: "
            "HookedDiT(transformer, scheduler=...)."
        )
    scheduler = make_scheduler(
        settings.scheduler, model.scheduler, learned_sigma=model.cfg.learned_sigma
    )
    name, most = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if settings.eta and not takes_eta(scheduler):
        raise InvalidValue(
            f"eta={settings.eta} is DDIM's and Euler's on a flow; {name} has none, so expected "
            "eta=0."
        )
    if settings.steps > most:
        raise InvalidValue(
            f"steps={settings.steps} is more than the {most} timesteps the model was trained on."
        )
    model.family.set_timesteps(scheduler, settings.steps, model.cfg.tokens)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise InvalidValue(
            f"{name} scales its latents by sigma, which is not supported; expected a "
            "variance-preserving or flow-matching scheduler, such as "
            f"{', '.join(map(repr, SAMPLERS))}."
        )
    return scheduler


def is_stochastic(model: HookedDiT, settings: Settings) -> bool:
    """Whether the sampler draws noise after the start: seen by one step with two seeds."""
    x = torch.zeros(1, *model.cfg.latent_shape)
    ends = []
    for seed in (0, 1):
        scheduler = prepared(model, settings)
        output = torch.cat([x] * (2 if learns_variance(scheduler) else 1), 1)
        ends.append(advance(scheduler, output, x, [seed], 0, settings.eta))
    return not torch.equal(*ends)
