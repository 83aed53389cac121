"""Sampling: one loop over any of diffusers' schedulers, and the run it leaves behind.

`denoise` is the loop. `sample` starts it from noise and keeps x_t and the predicted x0 of every step, which is all that a DiT's
forward depends on: a `Run` can be read at any hook point afterwards, and taken up again from any step with other
noise, other latents or interventions. Twins that part at step k are a run and its `replay(from_step=k, seeds=others)`.

The noise belongs to (seed, step, item), see `dit_lens.noise`, so taking a run up again unchanged gives the same bits. A scheduler that
remembers earlier steps (DPM-Solver++) is kept as it was before each step. Latents are float32 whatever the model computes in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import schedules
from .fingerprint import fingerprint
from .hook_points import HookFunction
from .model import HookedDiT
from .names import NamesFilter
from .noise import INITIAL, noise
from .tracing import Steps, _step_test

Edits = Sequence[tuple[NamesFilter, HookFunction]]


@dataclass(frozen=True)
class Settings:
    """How a step is made, apart from its scheduler.

    Attributes:
        guidance: w in null + w (cond - null), Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with w one larger; 1 runs no null half.
        guidance_channels: "all" channels of the prediction, as diffusers does, or the "first3" only, as the original DiT does.
        eta: DDIM's noise (arXiv 2010.02502, eq. 16), from 0, none, to 1, as much as DDPM.
        batch_size: how many items go through the model at once; None is all. With guidance a forward has twice as many.

    Raises ValueError for values outside these.
    """

    guidance: float = 1.0
    guidance_channels: Literal["all", "first3"] = "all"
    eta: float = 0.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance} is not finite; expected a number, 1 for no guidance.")
        if self.guidance_channels not in ("all", "first3"):
            raise ValueError(f"guidance_channels={self.guidance_channels!r} is unknown; expected 'all' or 'first3'.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is outside 0 (deterministic) to 1 (as noisy as DDPM).")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} holds no item; expected at least 1, or None for all at once.")

    @property
    def branches(self) -> int:
        """2 with guidance, where the model's batch is [cond | null]; else 1."""
        return 1 if self.guidance == 1 else 2


@dataclass(frozen=True)
class Step:
    """One step of `denoise`: x at `timestep`, the clean x0 predicted from it, and the next x; all [batch, channel, height, width]."""

    index: int
    timestep: Tensor
    x: Tensor
    x0: Tensor
    x_next: Tensor


@torch.no_grad()
def denoise(
    model: HookedDiT, x: Tensor, labels: Tensor, scheduler: Any, seeds: Sequence[Sequence[int]], settings: Settings | None = None,
    edits: Sequence[Edits] | None = None, from_step: int = 0, to_step: int | None = None,
) -> Iterator[Step]:
    """Denoise x from one step up to another, a step at a time; nothing is kept.

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3, 7], steps=4)
    >>> for s in denoise(run.model, run.latents[0], run.labels, run.scheduler(0), run.noise_seeds, to_step=2): end = s.x_next
    >>> torch.equal(end, run.latents[2])
    True

    Args:
        x: [batch, channel, height, width] at `from_step`. labels: [batch].
        scheduler: with its timesteps set (`schedules.configure`), as it is before `from_step`. It is moved on.
        seeds: for each step of the whole run, one per item; `[mine] * steps` for the same throughout.
        edits: for each step of the whole run, hooks in force at that step.
    """
    how = settings or Settings()
    for i in range(from_step, len(scheduler.timesteps) if to_step is None else to_step):
        t = scheduler.timesteps[i]
        with model.hooks(edits[i] if edits else ()):
            output = _join([model(*inputs) for inputs in _inputs(model, x, t, labels, how)], how.branches).to(x.dtype)
        output = guided(output, how, x.shape[1])
        if not schedules.uses_learned_variance(scheduler):
            output = output[:, : x.shape[1]]
        x0 = schedules.predict_x0(scheduler, x, output, t)
        x_next = schedules.step(scheduler, output, t, x, i, seeds[i], how.eta)
        yield Step(i, t, x, x0, x_next)
        x = x_next


def guided(output: Tensor, settings: Settings, channels: int) -> Tensor:
    """[cond | null] outputs under guidance, [batch, channel, height, width]; a predicted variance, and what is not guided, is cond's."""
    if settings.branches == 1:
        return output
    n = channels if settings.guidance_channels == "all" else min(3, channels)
    cond, null = output.chunk(2)
    return torch.cat([null[:, :n] + settings.guidance * (cond[:, :n] - null[:, :n]), cond[:, n:]], dim=1)


def _inputs(model: HookedDiT, x: Tensor, t: Tensor, y: Tensor, how: Settings) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the model is called with at one step: pieces of `batch_size` items, each [cond | null] with guidance."""
    size = how.batch_size or len(x)
    for part, label in zip(x.to(model.dtype).split(size), y.split(size), strict=True):
        if how.branches == 2:
            part, label = torch.cat([part, part]), torch.cat([label, torch.full_like(label, model.cfg.null_class)])
        yield part, t.expand(len(part)), label


def _join(pieces: Sequence[Tensor], branches: int) -> Tensor:
    """The pieces as one batch, [cond | null] of all items with guidance."""
    parts = [piece.chunk(branches) for piece in pieces]
    return torch.cat([part[b] for b in range(branches) for part in parts])


def decode(model: HookedDiT, latents: Tensor, batch_size: int | None = None) -> Tensor:
    """Latents as images, [batch, channel, height, width] from 0 to 1: through the model's VAE, or as pixels where it has none."""
    vae = model.vae
    if vae is not None:
        z = 1 / vae.config.scaling_factor * latents + (getattr(vae.config, "shift_factor", None) or 0)
        with torch.no_grad():
            latents = torch.cat([vae.decode(part.to(vae.dtype)).sample for part in z.split(batch_size or len(z))])
    return (latents / 2 + 0.5).clamp(0, 1)


@dataclass(eq=False, repr=False)
class Run:
    """A denoising run: what `sample` gives.

    Attributes:
        latents: x_t before every step, and the result: [step + 1, batch, channel, height, width].
        x0: the clean x0 predicted at every step (clipped where the scheduler clips): [step, batch, channel, height, width].
        labels: [batch]. seeds: one per item, of the initial noise. noise_seeds: [step][item], of the noise that steps add.
        edits: for each step, the hooks that were in force. settings: guidance, eta, ...
        model: the model it ran on. states: the scheduler as it was before each step, and at the end.
    """

    model: HookedDiT
    latents: Tensor
    x0: Tensor
    labels: Tensor
    seeds: tuple[int, ...]
    noise_seeds: list[tuple[int, ...]]
    edits: list[Edits]
    settings: Settings
    states: list[Any]
    weights: str

    @property
    def timesteps(self) -> Tensor:
        """[step], what the model was told."""
        found: Tensor = self.states[0].timesteps
        return found

    @property
    def abar(self) -> Tensor:
        """[step], the share of signal: SNR/(1 + SNR)."""
        return schedules.abar(self.states[0], self.timesteps)

    @property
    def log_snr(self) -> Tensor:
        """[step]."""
        return schedules.log_snr(self.states[0], self.timesteps)

    @property
    def images(self) -> Tensor:
        """The result, decoded: [batch, channel, height, width] from 0 to 1."""
        return decode(self.model, self.latents[-1], self.settings.batch_size)

    def scheduler(self, step: int) -> Any:
        """A scheduler of your own, as it was before this step; for `denoise`."""
        return copy.deepcopy(self.states[self._step(step)])

    @torch.no_grad()
    def activations(self, name: str, layer: int | None = None, step: int | None = None) -> Tensor:
        """Any hook point, recomputed bit for bit, edits included: [batch, ...] at one step, [step, batch, ...] without `step`.

        With guidance the batch is [cond | null].

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3, 7], steps=4)
        >>> run.activations("resid_post", 5, step=2).shape
        torch.Size([2, 64, 64])

        Raises:
            UnknownName: no such hook point. ValueError: no such step. RuntimeError: the weights have changed since.
        """
        full = self.model.resolve(name) if layer is None else self.model.resolve(name, layer)
        wanted = range(len(self.x0)) if step is None else [self._step(step)]
        self._check_weights()
        found = []
        for s in wanted:
            inputs = _inputs(self.model, self.latents[s], self.timesteps[s], self.labels, self.settings)
            with self.model.hooks(self.edits[s]):
                pieces = [self.model.activations(*i, [full])[full] for i in inputs]
            found.append(_join(pieces, self.settings.branches))
        return torch.stack(found) if step is None else found[0]

    def replay(
        self, from_step: int = 0, edits: Edits | None = None, latents: Tensor | None = None, seeds: int | Sequence[int] | None = None,
        steps: Steps = None, callback: Callable[[Step], object] | None = None,
    ) -> Run:
        """The same run taken up at a step, with whatever you change; what you don't is as it was, bit for bit.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3, 7], steps=4, eta=1.0)
        >>> torch.equal(run.replay(from_step=2).latents, run.latents), torch.equal(run.replay(2, seeds=9).latents, run.latents)
        (True, False)

        Args:
            from_step: the first step that is run again.
            edits: [(name, fn)], with fn(activation, hook), in force from there on in place of the run's own; [] is none.
            latents: x at `from_step`, in place of the run's. seeds: for the noise from there on; as in `sample`.
            steps: at which steps the edits act (numbers, a slice, a range); None is all.

        Raises:
            ValueError: a step outside the run, latents of another shape, seeds that don't match, edits that never act.
            RuntimeError: the weights have changed since.
        """
        total, k = len(self.x0), self._step(from_step)
        self._check_weights()
        x = self.latents[k] if latents is None else _latents(latents, self.latents[k])
        noise_seeds = self.noise_seeds
        if seeds is not None:
            noise_seeds = noise_seeds[:k] + [_seeds(seeds, len(self.labels))] * (total - k)
        mine = self.edits
        if edits is not None:
            acts = _step_test(steps)
            mine = self.edits[:k] + [tuple(edits) if acts(s) else () for s in range(k, total)]
            if edits and not any(mine[k:]):
                raise ValueError(f"The edits never act: steps={steps!r} has no step from {k} to {total - 1}.")
            with self.model.hooks(edits):  # a wrong name is found before anything runs
                pass
        elif steps is not None:
            raise ValueError(f"steps={steps!r} says when edits act, and there are no edits; pass edits=[(name, fn)] too.")
        return _record(
            self.model, x, self.labels, self.scheduler(k), self.seeds, noise_seeds, self.settings, mine, callback, self.weights, k, self
        )

    def _step(self, step: int) -> int:
        total = len(self.x0)
        if not 0 <= step < total:
            raise ValueError(f"There is no step {step}; the run has {total}, 0 (the noisiest) to {total - 1}.")
        return step

    def _check_weights(self) -> None:
        if fingerprint(self.model.transformer) != self.weights:
            raise RuntimeError("The model's weights have changed since this run; sample again, or put them back.")

    def __repr__(self) -> str:
        s, b, *shape = self.x0.shape
        return f"Run({s} steps of {type(self.states[0]).__name__}, {b} items of {'x'.join(map(str, shape))}, {self.settings})"


def sample(
    model: Any, labels: int | Sequence[int], seeds: int | Sequence[int] = 0, steps: int = 50, guidance: float = 1.0,
    scheduler: Any = "ddim", eta: float = 0.0, guidance_channels: Literal["all", "first3"] = "all", latents: Tensor | None = None,
    batch_size: int | None = None, callback: Callable[[Step], object] | None = None,
) -> Run:
    """Draw one item per label, and keep the whole run.

    >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), labels=[3, 7], steps=10)
    >>> run.latents.shape, run.images.shape
    (torch.Size([11, 2, 1, 16, 16]), torch.Size([2, 1, 16, 16]))

    Args:
        model: a `HookedDiT`, or what it can wrap (a pipeline then stays wrapped, with the same output).
        labels: class labels; `model.cfg.null_class` is no class.
        seeds: one per label, or one number: item i then has seed + i. An item's noise depends on nothing else, and its
            result is the same up to rounding in any batch (bit for bit in one of the same shape).
        scheduler: "ddim", "ddpm", "dpm++", "sde-dpm++", "euler-flow", made from the model's own, or a diffusers scheduler.
        guidance, guidance_channels, eta, batch_size: see `Settings`. Inside a trace leave batch_size None: every call is a step there.
        latents: what to start from, [batch, channel, height, width], in place of the seeds' noise.
        callback: called with each `Step`, for a progress bar.

    Raises:
        ValueError: for any argument that makes no sense, in one sentence. RuntimeError: the model is in train mode.
    """
    model = model if isinstance(model, HookedDiT) else HookedDiT(model)
    c, device = model.cfg, model.device
    settings = Settings(guidance, guidance_channels, eta, batch_size)
    y = torch.tensor(_labels(labels, c.null_class), device=device)
    item_seeds = _seeds(seeds, len(y))
    made = schedules.configure(scheduler, model.scheduler, steps, device)
    if eta and not schedules.takes_eta(made):
        raise ValueError(f"eta={eta} is a setting of DDIM; {type(made).__name__} has none, leave it 0.")
    if schedules.uses_learned_variance(made) and not c.learned_sigma:
        raise ValueError(f"The scheduler's variance_type is {made.variance_type!r}, but the model predicts no variance; use 'fixed_small'.")
    x = noise(item_seeds, INITIAL, (c.in_channels, c.sample_size, c.sample_size), device)
    if latents is not None:
        x = _latents(latents, x)
    n = len(made.timesteps)
    weights = fingerprint(model.transformer)
    return _record(model, x, y, made, item_seeds, [item_seeds] * n, settings, [()] * n, callback, weights)


def _record(
    model: HookedDiT, x: Tensor, labels: Tensor, scheduler: Any, seeds: tuple[int, ...], noise_seeds: list[tuple[int, ...]],
    settings: Settings, edits: list[Edits], callback: Callable[[Step], object] | None, weights: str,
    start: int = 0, before: Run | None = None,
) -> Run:
    """Run to the end, keeping everything; the steps before `start` are those of another run."""
    xs, x0s, states = ([], [], []) if before is None else (
        list(before.latents[:start]), list(before.x0[:start]), before.states[:start]
    )
    xs, states = [*xs, x], [*states, copy.deepcopy(scheduler)]
    for step in denoise(model, x, labels, scheduler, noise_seeds, settings, edits, start):
        xs.append(step.x_next)
        x0s.append(step.x0)
        states.append(copy.deepcopy(scheduler))
        if callback is not None:
            callback(step)
    return Run(model, torch.stack(xs), torch.stack(x0s), labels, seeds, noise_seeds, edits, settings, states, weights)


def _labels(labels: int | Sequence[int], null_class: int) -> list[int]:
    found = _numbers(labels, "labels")
    if not found:
        raise ValueError("There are no labels; expected one for each item.")
    for y in found:
        if not 0 <= y <= null_class:
            raise ValueError(f"Label {y} is out of range; expected 0 to {null_class - 1}, or {null_class} for no class.")
    return found


def _seeds(seeds: int | Sequence[int], items: int) -> tuple[int, ...]:
    found = _numbers(seeds, "seeds")
    if getattr(seeds, "ndim", 0) == 0 and not isinstance(seeds, Sequence):
        found = [found[0] + i for i in range(items)]
    if len(found) != items:
        raise ValueError(f"There are {len(found)} seeds for {items} items; expected one for each, or a single number to count from.")
    if min(found) < 0:
        raise ValueError(f"{min(found)} is not a seed; expected whole numbers from 0.")
    return tuple(found)


def _numbers(given: Any, what: str) -> list[int]:
    """Whole numbers out of a number, a sequence, an array or a tensor."""
    values = given.tolist() if hasattr(given, "tolist") else given
    values = list(values) if isinstance(values, (list, tuple, range)) else [values]
    for v in values:
        if isinstance(v, bool) or not hasattr(v, "__index__"):
            raise ValueError(f"{v!r} in {what} is not a whole number.")
    return [v.__index__() for v in values]


def _latents(latents: Tensor, like: Tensor) -> Tensor:
    if latents.shape != like.shape:
        raise ValueError(f"The latents have shape {list(latents.shape)}; expected {list(like.shape)}, one for each label.")
    return latents.detach().to(like.device, like.dtype)
