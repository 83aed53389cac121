"""Sampling: one loop on diffusers' schedulers that keeps the whole trajectory and can branch off
from any step of it.

The scheduler does the arithmetic and draws its noise from per-item generators
(`dit_lens.sampling.noise`), a list of which every diffusers scheduler takes. A multistep
scheduler's memory is rebuilt for a replay by feeding it the stored model outputs again.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidState, InvalidValue
from ..hooks.names import NamesFilter
from ..hooks.points import HookFunction
from ..model.conditions import Labels
from ..model.fingerprint import fingerprint
from ..model.hooked import HookedDiT
from .guidance import guided, means, model_inputs
from .noise import START, generators, noise
from .schedulers import (
    ETA,
    NAMES,
    default_name,
    learns_variance,
    log_snr,
    make_scheduler,
    predict_x0,
)

Edits = Sequence[tuple[NamesFilter, HookFunction]]
Seeds = int | Sequence[int]
GuidedChannels = Literal["all", "first3"]


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides model, labels and seeds."""

    steps: int = 50
    guidance: float = 1.0
    guided_channels: GuidedChannels = "all"
    scheduler: Any = "ddim"
    eta: float = 0.0


@dataclass(frozen=True)
class Change:
    """From a step on: each item's noise comes from these seeds, and these edits act beside the
    earlier ones.
    """

    from_step: int
    seeds: tuple[int, ...]
    edits: Edits = ()


@dataclass(frozen=True)
class Run:
    """A denoising trajectory; step 0 is the noisiest.

    Attributes:
        latents: x_t before each step and at the end, [steps + 1, batch, channel, height, width],
            float32.
        x0: the clean latents predicted at each step, [steps, batch, ...].
        outputs: what the model answered (guided), [steps, batch, ...].
        timesteps: [steps].
        labels: [batch].
        history: where its noise comes from and what was edited, from step 0 and from each replay's
            step on.
        tied_until: before this step each item was coupled to its twin through attention, which a
            recomputation can't repeat.
    """

    model: HookedDiT = field(repr=False)
    labels: Tensor
    history: tuple[Change, ...]
    settings: Settings
    timesteps: Tensor = field(repr=False)
    latents: Tensor = field(repr=False)
    x0: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)
    weights: str = field(repr=False)
    tied_until: int = 0

    @property
    def log_snr(self) -> Tensor:
        """log SNR at each step, [steps], rising."""
        return log_snr(
            make_scheduler(self.settings.scheduler, self.model.scheduler), self.timesteps
        )

    @property
    def images(self) -> Tensor:
        """The finished latents decoded, [batch, channel, height, width] in [0, 1]."""
        return decode(self.model, self.latents[-1])

    def activations(
        self, name: str, layer: int | None = None, *, step: int | None = None
    ) -> Tensor:
        """One activation, recomputed from the stored x_t, edits included: [batch, ...], or [step,
        batch, ...] if no step is given.

        With guidance the batch is [cond | null]. Raises ValueError for a step outside the run or
        while it was coupled, RuntimeError if the weights changed.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=4)
        >>> run.activations("resid_post", 5, step=2).shape
        torch.Size([1, 64, 64])
        """
        self._check_weights()
        if step is not None:
            check_step(step, self.settings.steps)
        self._check_alone(0 if step is None else step)
        key: Any = name if layer is None else (name, layer)
        found = []
        for s in range(self.settings.steps) if step is None else [step]:
            inputs = model_inputs(
                self.model, self.latents[s], self.timesteps[s], self.labels, self.settings.guidance
            )
            with torch.no_grad(), self.model.hooks(edits_at(self.history, s)):
                found.append(self.model.activations(*inputs, [key])[key])
        return torch.stack(found) if step is None else found[0]

    def _check_weights(self) -> None:
        if fingerprint(self.model.transformer) != self.weights:
            raise InvalidState(
                "The model's weights have changed since this run, so it can't be recomputed; "
                "sample again."
            )

    def _check_alone(self, step: int) -> None:
        if step < self.tied_until:
            raise InvalidValue(
                f"Until step {self.tied_until} this run was coupled to its twin, and step {step} "
                "alone would be another; "
                f"expected a step from {self.tied_until} on, or new twins: dit_lens.twins(..., "
                "probes=[...])."
            )

    def select(self, items: slice | Sequence[int] | Tensor) -> Run:
        """The same run for some of its items only."""
        chosen = torch.arange(len(self.labels))[items]
        parts = {name: getattr(self, name)[:, chosen] for name in ("latents", "x0", "outputs")}
        history = tuple(
            replace(c, seeds=tuple(c.seeds[i] for i in chosen.tolist())) for c in self.history
        )
        return replace(self, labels=self.labels[chosen], history=history, **parts)

    def replay(
        self,
        from_step: int = 0,
        edits: Edits = (),
        *,
        seeds: Seeds | None = None,
        latents: Tensor | None = None,
        released: bool = False,
    ) -> Run:
        """The same run from `from_step` on, with interventions, or other noise, or other latents at
        that step.

        Without any it is bit for bit this run, its own edits included. Other `seeds` make clones:
        they share the past and not the future. Twins coupled through attention can be replayed from
        their release on, or, with `released`, from any step, alone. Raises ValueError for a step
        outside the run, latents of another shape, or seeds that do not fit.
        """
        check_step(from_step, self.settings.steps)
        if not released:
            self._check_alone(from_step)
        start = self.latents[from_step] if latents is None else latents
        if start.shape != self.latents[0].shape:
            raise InvalidValue(
                f"The latents have shape {list(start.shape)}; expected "
                f"{list(self.latents[0].shape)}."
            )
        self._check_weights()
        history = self.history
        if seeds is not None:
            fresh = tuple(item_seeds(seeds, len(self.labels)))
            history = (
                *(c if c.from_step < from_step else replace(c, seeds=fresh) for c in history),
                Change(from_step, fresh),
            )
        if edits:
            mine = Change(from_step, seeds_at(history, from_step), tuple(edits))
            history = tuple(sorted((*history, mine), key=lambda change: change.from_step))
        scheduler = prepared(self.model, self.settings)
        for step in range(from_step):  # only for the memory of multistep schedulers
            noise_seeds = self.seeds_at(step)
            advance(
                scheduler,
                self.outputs[step],
                self.timesteps[step],
                self.latents[step],
                noise_seeds,
                step,
                self.settings.eta,
            )
        later = denoise(
            self.model, start, self.labels, history, self.settings, scheduler, from_step
        )
        x0, outputs, following = (torch.stack(part) for part in zip(*later, strict=True))
        return replace(
            self,
            history=history,
            latents=torch.cat([self.latents[:from_step], start[None], following]),
            x0=torch.cat([self.x0[:from_step], x0]),
            outputs=torch.cat([self.outputs[:from_step], outputs]),
            tied_until=min(self.tied_until, from_step),
        )

    def seeds_at(self, step: int) -> tuple[int, ...]:
        """The seeds that this step's noise came from, one for each item."""
        return seeds_at(self.history, step)


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
    progress: Callable[[int], object] | None = None,
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
        guidance: classifier-free guidance; 1 is none, and runs no null half. A distilled model is
            given it as an input.
        scheduler: "ddim", "ddpm", "dpm++", "sde-dpm++", "euler-flow", or a diffusers scheduler; by
            default DDIM, or Euler on a flow.
        eta: how stochastic DDIM, or Euler on a flow, is, 0 to 1.
        guided_channels: "all" (diffusers' DiTPipeline) or "first3" (the original DiT's samples).
        latents: the start, in place of noise from the seeds.
        progress: called with the number of each finished step.

    Raises:
        ValueError: for what is out of range, in one sentence.
    """
    model = model if isinstance(model, HookedDiT) else HookedDiT(model)
    model._require_eval()
    settings = Settings(
        steps,
        float(guidance),
        guided_channels,
        scheduler or default_name(model.scheduler),
        float(eta),
    )
    check_settings(settings)
    if guided_channels == "first3" and len(model.cfg.grid) != 2:
        raise InvalidValue(
            "guided_channels='first3' is the original DiT's; a video model guides all channels: "
            "expected 'all'."
        )
    y = model.conditions.numbers(labels, model.device)
    own_seeds = item_seeds(seeds, len(y))
    plan = prepared(model, settings)
    shape = model.cfg.latent_shape
    if latents is None:
        latents = noise(own_seeds, START, shape, model.device)
    elif latents.shape != (len(y), *shape):
        raise InvalidValue(
            f"The latents have shape {list(latents.shape)}; expected {[len(y), *shape]} for "
            f"{len(y)} labels."
        )
    seen, history, weights = [], (Change(0, tuple(own_seeds)),), fingerprint(model.transformer)
    for step, kept in enumerate(denoise(model, latents, y, history, settings, plan)):
        seen.append(kept)
        if progress is not None:
            progress(step)
    x0, outputs, later = (torch.stack(part) for part in zip(*seen, strict=True))
    return Run(
        model,
        y,
        history,
        settings,
        plan.timesteps.cpu(),
        torch.cat([latents[None], later]),
        x0,
        outputs,
        weights,
    )


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
    """The loop: from x_t at step `first` to before step `last`, yielding (predicted x0, model
    output, next x_t) at every step.
    """
    with torch.no_grad():
        for step in range(first, settings.steps if last is None else last):
            t = scheduler.timesteps[step]
            inputs, ts, ys = model_inputs(model, x, t, labels, settings.guidance)
            with model.hooks(edits_at(history, step)):
                output = guided(model(inputs, ts, ys).to(x.dtype), model, settings)
            if not learns_variance(scheduler):
                output = means(model, output)
            x0 = predict_x0(scheduler, x, means(model, output), t)
            x = advance(scheduler, output, t, x, seeds_at(history, step), step, settings.eta)
            yield x0, output, x


def seeds_at(history: tuple[Change, ...], step: int) -> tuple[int, ...]:
    """The seeds in force at a step: those of the latest change."""
    return [change.seeds for change in history if change.from_step <= step][-1]


def edits_at(history: tuple[Change, ...], step: int) -> Edits:
    """The edits in force at a step: those of every change so far."""
    return [edit for change in history if change.from_step <= step for edit in change.edits]


def advance(
    scheduler: Any,
    output: Tensor,
    t: Tensor,
    x: Tensor,
    seeds: Sequence[int],
    step: int,
    eta: float,
) -> Tensor:
    """One step of the scheduler with each item's own noise."""
    options: dict[str, Any] = {}
    # UniPC draws no noise and takes none
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generators(seeds, step)
    if type(scheduler).__name__ in ETA:
        options["eta"] = eta
    following: Tensor = scheduler.step(output, t, x, **options).prev_sample
    return following.to(x.dtype)


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
    if settings.eta and name not in ETA:
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
            "variance-preserving or flow-matching "
            f"scheduler, such as {', '.join(map(repr, NAMES))}."
        )
    return scheduler


def decode(model: HookedDiT, latents: Tensor) -> Tensor:
    """Latents as images in [0, 1]: through the VAE where there is one, otherwise they are pixels in
    [-1, 1].
    """
    if model.vae is not None:
        with torch.no_grad():
            latents = model.family.decode(model.vae, latents)
    return (latents / 2 + 0.5).clamp(0, 1)


def is_stochastic(model: HookedDiT, settings: Settings) -> bool:
    """Whether the sampler draws noise after the start: seen by one step with two seeds."""
    x = torch.zeros(1, *model.cfg.latent_shape)
    ends = []
    for seed in (0, 1):
        scheduler = prepared(model, settings)
        output = torch.cat([x] * (2 if learns_variance(scheduler) else 1), 1)
        ends.append(advance(scheduler, output, scheduler.timesteps[0], x, [seed], 0, settings.eta))
    return not torch.equal(*ends)


def check_settings(settings: Settings) -> None:
    if (
        not isinstance(settings.steps, int)
        or isinstance(settings.steps, bool)
        or settings.steps < 1
    ):
        raise InvalidValue(
            f"steps={settings.steps!r} is no number of denoising steps; expected 1 or more."
        )
    if not math.isfinite(settings.guidance):
        raise InvalidValue(
            f"guidance={settings.guidance} is not a number to scale with; expected 1 (none) or "
            "more."
        )
    if not 0 <= settings.eta <= 1:
        raise InvalidValue(
            f"eta={settings.eta} is out of range; expected 0 (deterministic) to 1 (as stochastic "
            "as DDPM)."
        )
    if settings.guided_channels not in ("all", "first3"):
        near = difflib.get_close_matches(
            str(settings.guided_channels), ["all", "first3"], n=1, cutoff=0
        )[0]
        raise InvalidValue(
            f"guided_channels={settings.guided_channels!r} is no convention; did you mean {near!r}?"
        )


def check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise InvalidValue(
            f"Step {step} is outside the run; it has {steps} steps, 0 (the noisiest) to "
            f"{steps - 1}."
        )


def item_seeds(seeds: Seeds, items: int) -> list[int]:
    """One seed an item: seed, seed + 1, ...

    of an int; ValueError for another number of them than of items.
    """
    own = [seeds + i for i in range(items)] if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(own) != items or min(own) < 0:
        raise InvalidValue(
            f"There are {len(own)} seeds, {own[:3]}...; expected {items}, one for each label, none "
            "negative."
        )
    return own
