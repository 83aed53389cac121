"""Sampling: a run from noise."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .. import arguments
from ..errors import InvalidValue
from ..model.conditions import Labels
from ..model.hooked import HookedDiT
from ..model.kernels import Kernels
from ..model.state import State
from .guidance import n_passes
from .loop import Kept, denoise, prepared
from .noise import START, noise, run_dtype
from .parts import Splitter
from .run import Run, given_latents, made_of
from .schedulers import default_name
from .settings import Change, GuidedChannels, Progress, Seeds, checked_settings, item_seeds


def sample(
    model: Any,
    labels: Labels,
    seeds: Seeds = 0,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    eta: float = 0.0,
    guided_channels: GuidedChannels = "all",
    latents: Tensor | None = None,
    progress: Progress | None = None,
    batch: int | None = None,
) -> Run:
    """Sample one image a label and keep the trajectory.

        run = dit_lens.sample(model, labels=[3, 7], steps=50)
        run.images, run.x0[10], run.activations("resid_post", 5, step=12)

    Args:
        model: a `HookedDiT`, or what it wraps, which is then opened and stays so for the run's sake
            (`run.model.remove()`).
        labels: classes, one an item, or prompts, in words or by number (`model.conditions`); the
            null class is allowed, as is "".
        seeds: an int, item i then has seed + i, or one int an item. An item's noise depends on its
            seed and the step only.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 is none, and runs no null half. A distilled model is
            given it as an input.
        scheduler: "ddim", "ddpm", "dpm++", "sde-dpm++", "euler-flow", or a diffusers scheduler; by
            default DDIM, or Euler on a flow.
        eta: how stochastic DDIM, or Euler on a flow, is, 0 to 1.
        guided_channels: "all" (diffusers' DiTPipeline) or "first3" (the original DiT's samples).
        latents: the start, in place of noise from the seeds.
        progress: called with (steps done, steps in all).
        batch: images that go through the model at once, two an item with guidance; None is all.
            Results do not depend on it but for rounding. What is out of memory is halved, with a
            warning.

    Raises:
        ValueError: for what is out of range, in one sentence.
        RuntimeError: with `batch`, if an edit or probe is on that needs the whole batch at once;
            out of memory with a single image.
    """
    with HookedDiT.opening(model) as opened:
        return _sample(
            opened,
            labels,
            seeds,
            steps,
            guidance,
            scheduler,
            eta,
            guided_channels,
            latents,
            progress,
            batch,
        )


def _sample(
    model: HookedDiT,
    labels: Labels,
    seeds: Seeds,
    steps: int,
    guidance: float,
    scheduler: Any,
    eta: float,
    guided_channels: GuidedChannels,
    latents: Tensor | None,
    progress: Progress | None,
    batch: int | None,
) -> Run:
    """The same on an opened model."""
    # What is asked for fits the model.
    model.require_eval()
    scheduler = default_name(model.scheduler) if scheduler is None else scheduler
    settings = checked_settings(steps, guidance, guided_channels, scheduler, eta)
    batch = arguments.optional(arguments.whole, "batch", batch, 1)
    arguments.optional(arguments.function, "progress", progress, "progress(done, total)")
    if guided_channels == "first3" and len(model.cfg.grid) != 2:
        raise InvalidValue(
            "guided_channels='first3' is the original DiT's; a video model guides all channels: "
            "expected 'all'."
        )
    y = model.conditions.numbers(labels)
    own_seeds = item_seeds(seeds, len(y))
    plan = prepared(model, settings)
    fresh = copy.deepcopy(plan)

    # Where it starts.
    shape, dtype = model.cfg.latent_shape, run_dtype(model.dtype)
    if latents is None:
        latents = noise(own_seeds, START, shape, model.device, dtype)
    else:
        latents = given_latents(latents, model.device, dtype)
    if latents.shape != (len(y), *shape):
        raise InvalidValue(
            f"The latents have shape {list(latents.shape)}; expected {[len(y), *shape]} for "
            f"{len(y)} labels."
        )

    # The run itself.
    history = (Change(0, tuple(own_seeds)),)
    kept = Kept(model, latents, settings.steps)
    splitter = Splitter(batch, n_passes(model, settings.guidance))
    kernels, state = Kernels.of_sampling(model.device), State.of(model.transformer)
    with model.instrumentation.under(run=object()):
        for _ in denoise(model, latents, y, history, settings, plan, splitter=splitter, kept=kept):
            if progress is not None:
                progress(kept.done, settings.steps)
    return made_of(kept, model, y, history, settings, fresh, kernels, state, splitter.batch)
