"""The denoising loop: one step, many steps, and a scheduler made ready for them.

The scheduler does the arithmetic and draws its noise from per-item generators
(`dit_lens.sampling.noise`), a list of which every diffusers scheduler takes. A multistep
scheduler's memory is rebuilt for a replay by feeding it the stored model outputs again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DitLensError, InvalidValue
from ..model.hooked import HookedDiT
from ..model.noise_schedule import log_snr, predict_x0
from ..model.witness import Witness
from .guidance import guided, model_inputs
from .noise import generators
from .schedulers import SAMPLERS, learns_variance, make_scheduler, takes_eta
from .settings import Change, Settings, edits_at, seeds_at


class Step(NamedTuple):
    """What one denoising step leaves.

    Attributes:
        x0: the predicted clean latents, [batch, *latent_shape].
        output: what the scheduler was given, [batch, ...].
        following: the next x_t.
        witness: checksums of the streams in the model's pass.
    """

    x0: Tensor
    output: Tensor
    following: Tensor
    witness: Witness


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
) -> Iterator[Step]:
    """From x_t at step `first` to before step `last`, one step after the other."""
    with torch.no_grad():
        for step in range(first, settings.steps if last is None else last):
            inst = model.instrumentation
            with (
                inst.under(step=step),
                model.hooks(edits_at(history, step)),
                inst.witnessing() as witness,
            ):
                output = model_output(model, x, step, labels, settings, scheduler)
            t = scheduler.timesteps[step]
            x0 = predict_x0(scheduler, x, model.without_variance(output), t)
            x = advance(scheduler, output, x, seeds_at(history, step), step, settings.eta)
            yield Step(x0, output, x, witness)


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
    _refuse_foreign(scheduler)
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
    _set_timesteps(model, scheduler, settings.steps)
    _refuse_unfit(scheduler, settings)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise InvalidValue(
            f"{name} scales its latents by sigma, which is not supported; expected a "
            "variance-preserving or flow-matching scheduler, such as "
            f"{', '.join(map(repr, SAMPLERS))}."
        )
    _refuse_broken(scheduler, settings)
    return scheduler


def _refuse_foreign(scheduler: Any) -> None:
    """Raise ValueError for a scheduler without what a denoising loop needs, or that needs more."""
    name = type(scheduler).__name__
    absent = [part for part in ("step", "set_timesteps") if not hasattr(scheduler, part)]
    absent += ["num_train_timesteps"] * ("num_train_timesteps" not in scheduler.config)
    if absent:
        raise InvalidValue(
            f"{name} has no {absent[0]}; expected a variance-preserving or flow-matching scheduler."
        )
    wanted = list(inspect.signature(scheduler.step).parameters.values())[3:]
    more = [p.name for p in wanted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if more:
        raise InvalidValue(
            f"{name}'s step also wants {more[0]!r}, which a denoising loop does not have; expected "
            "a scheduler whose step takes (model_output, timestep, sample)."
        )


def _set_timesteps(model: HookedDiT, scheduler: Any, steps: int) -> None:
    try:
        model.family.set_timesteps(scheduler, steps, model.cfg.tokens)
    except DitLensError:
        raise
    except Exception as error:  # schedulers of other kinds of models fail in many ways
        raise InvalidValue(
            f"{type(scheduler).__name__} can't be given {steps} timesteps for this model "
            f"({type(error).__name__}: {error}); expected a variance-preserving or flow-matching "
            "scheduler."
        ) from error


def _refuse_unfit(scheduler: Any, settings: Settings) -> None:
    """Raise ValueError for a scheduler that this loop would not run to its end, whose noise is not
    the run's, or whose noise levels are not understood. It is asked by what it does.
    """
    name, steps = type(scheduler).__name__, settings.steps
    if len(scheduler.timesteps) != steps:
        raise InvalidValue(
            f"{name} calls the model {len(scheduler.timesteps)} times in {steps} steps; expected a "
            "scheduler that calls it once a step, such as 'ddim', 'dpm++' or 'euler-flow'."
        )
    if scheduler.config.get("stochastic_sampling"):
        raise InvalidValue(
            f"{name} has stochastic_sampling=True, whose noise can't be that of the run; expected "
            "scheduler='euler-flow' with eta=1."
        )
    known = getattr(scheduler, "alphas_cumprod", None)
    if known is not None and len(known) != scheduler.config.num_train_timesteps:
        raise InvalidValue(
            f"{name} has noise levels for {len(known)} timesteps; expected as many as the "
            f"{scheduler.config.num_train_timesteps} that the model was trained on."
        )
    levels = log_snr(scheduler, scheduler.timesteps)
    if not bool(levels.isfinite().all() and (levels.diff() >= -1e-6).all()):
        raise InvalidValue(
            f"The noise levels of {name} are not understood: log SNR should rise from step to "
            f"step, and goes {float(levels[0]):.2f}, ..., {float(levels[-1]):.2f}; expected a "
            "variance-preserving or flow-matching scheduler."
        )


def _refuse_broken(scheduler: Any, settings: Settings) -> None:
    """Raise ValueError for a scheduler that can't take its first step, before the model runs."""
    trial, x = copy.deepcopy(scheduler), torch.zeros(1, 4, 8, 8)
    output = torch.cat([x] * (2 if learns_variance(trial) else 1), 1)
    try:
        advance(trial, output, x, [0], 0, settings.eta)
    except DitLensError:
        raise
    except Exception as error:  # of settings that only its step looks at
        raise InvalidValue(
            f"{type(scheduler).__name__} can't take a step ({type(error).__name__}: {error}); "
            "expected a variance-preserving or flow-matching scheduler."
        ) from error


def is_stochastic(model: HookedDiT, settings: Settings) -> bool:
    """Whether the sampler draws noise after the start: seen by one step with two seeds."""
    x = torch.zeros(1, *model.cfg.latent_shape)
    ends = []
    for seed in (0, 1):
        scheduler = prepared(model, settings)
        output = torch.cat([x] * (2 if learns_variance(scheduler) else 1), 1)
        ends.append(advance(scheduler, output, x, [seed], 0, settings.eta))
    return not torch.equal(*ends)
