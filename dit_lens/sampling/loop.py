"""The denoising loop: one step, many steps, and a scheduler made ready for them.

The scheduler does the arithmetic and draws its noise from per-item generators
(`dit_lens.sampling.noise`), a list of which every diffusers scheduler takes. A multistep
scheduler's memory is rebuilt for a replay by feeding it the stored model outputs again.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .. import arguments
from ..errors import DitLensError, InvalidState, InvalidValue
from ..hooks.hold import Holding
from ..hooks.passes import Part
from ..hooks.points import Editor
from ..model.hooked import HookedDiT
from ..model.noise_schedule import is_flow, log_snr, predict_x0, setting, signal_and_noise
from ..model.pinned import Fetched
from ..model.trajectories import room
from ..model.witness import Checksum, Witness
from .guidance import branches, guided, model_inputs, n_passes
from .noise import generators, noise
from .parts import Split, Splitter, is_out_of_memory, positions
from .schedulers import (
    MEMORYLESS,
    SAMPLERS,
    check_training,
    learns_variance,
    make_scheduler,
    takes_eta,
)
from .settings import Change, Edits, Settings, edits_at, seeds_at


class Step(NamedTuple):
    """What one denoising step leaves.

    Attributes:
        x0: the predicted clean latents, [batch, *latent_shape].
        output: what the scheduler was given, [batch, ...].
        following: the next x_t.
        witness: checksums of the streams in the model's passes.
        split: how the batch went through the model.
    """

    x0: Tensor
    output: Tensor
    following: Tensor
    witness: Witness
    split: Split


class Kept:
    """A trajectory as it grows, in memory that is taken once: on the device, or where the model's
    `trajectories` says. There each step is copied while the device computes the next one.

    Args:
        model: that is sampled.
        start: x_t before step `first`, [batch, *latent_shape], where the model computes.
        steps: how many there will be.
        first: the first step that is run; those before are taken over.

    Attributes:
        latents: [steps + 1, batch, ...].
        x0: [steps, batch, ...].
        outputs: [steps, batch, ...].
        witnesses: of each step so far.
        splits: of each step so far.
        now: the latest x_t, where the model computes.
    """

    def __init__(self, model: HookedDiT, start: Tensor, steps: int, first: int = 0) -> None:
        self.place, self.steps = model.trajectories, steps
        self.latents = room(self.place, (steps + 1, *start.shape), start)
        self.x0 = room(self.place, (steps, *start.shape), start)
        self.outputs = start.new_empty(0)  # its channels are known with the first
        self.witnesses: list[Witness] = []
        self.splits: list[Split] = []
        self._coming: list[tuple[Tensor, Fetched]] = []  # from the device, and where it goes
        self.now = self._put(self.latents[first], start)

    @property
    def done(self) -> int:
        """How many steps there are."""
        return len(self.witnesses)

    def moved(self, x0: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The step under way's x0 and output where they are kept, so that they can be let go of; as
        they are if that is elsewhere.
        """
        self._arrive()
        self._make_room(output)
        return self._put(self.x0[self.done], x0), self._put(self.outputs[self.done], output)

    def finish(self, following: Tensor, witness: Witness, split: Split) -> Tensor:
        """The step under way ends; gives the next x_t, likewise."""
        self.now = self._put(self.latents[self.done + 1], following)
        self.witnesses.append(witness)
        self.splits.append(split)
        if self.done == self.steps:
            self._arrive()
        return self.now

    def take_over(
        self,
        latents: Tensor,
        x0: Tensor,
        outputs: Tensor,
        witnesses: Sequence[Witness],
        splits: Sequence[Split],
    ) -> None:
        """The first steps of another trajectory: latents [steps, batch, ...], x0, outputs,
        witnesses and splits.
        """
        n = len(latents)
        if n:
            self._make_room(outputs[0])
            self.latents[:n], self.x0[:n], self.outputs[:n] = latents, x0, outputs
        self.witnesses, self.splits = list(witnesses), list(splits)

    def _make_room(self, output: Tensor) -> None:
        if not self.outputs.numel():
            self.outputs = room(self.place, (self.steps, *output.shape), output)

    def _put(self, kept: Tensor, value: Tensor) -> Tensor:
        if kept.device != value.device:
            self._coming.append((kept, Fetched(value)))
            return value
        kept.copy_(value)
        return kept

    def _arrive(self) -> None:
        """What is on its way from the device is kept."""
        for kept, fetched in self._coming:
            kept.copy_(fetched.arrived())
        self._coming.clear()


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
    t = scheduler.timesteps[step]
    if type(scheduler).__name__ in MEMORYLESS:  # which would look into a tensor several times
        t = scheduler.times[step]
    if type(scheduler) is DDIMScheduler:
        if eta:
            options["variance_noise"] = noise(seeds, step, x.shape[1:], x.device, output.dtype)
    # UniPC draws no noise and takes none
    elif "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generators(seeds, step)
    if takes_eta(scheduler):
        options["eta"] = real_eta(scheduler, t, eta)
    following: Tensor = scheduler.step(output, t, x, **options).prev_sample
    return following.to(x.dtype)


def real_eta(scheduler: Any, t: Any, eta: float) -> float:
    """`eta` as DDIM can step with it from a timestep without signal (`rescale_betas_zero_snr`):
    there eta = 1 draws all noise anew, and diffusers takes a root of 1 - abar less the variance
    drawn, both the same number, which rounding may leave below 0.
    """
    if type(scheduler) is not DDIMScheduler or not eta or scheduler.alphas_cumprod[int(t)]:
        return eta
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if before < 0:  # the only step, to the image
        return eta
    variance = 1 - scheduler.alphas_cumprod[before]
    return eta if (eta * variance**0.5) ** 2 <= variance else eta * (1 - 2**-22)


def denoise(
    model: HookedDiT,
    x: Tensor,
    labels: Tensor,
    history: tuple[Change, ...],
    settings: Settings,
    scheduler: Any,
    first: int = 0,
    last: int | None = None,
    splitter: Splitter | None = None,
    kept: Kept | None = None,
) -> Iterator[Step]:
    """From x_t at step `first` to before step `last`, one step after the other; each goes into
    `kept`, if that is given.
    """
    splitter = splitter or Splitter()
    with torch.no_grad():
        for step in range(first, settings.steps if last is None else last):
            output, witness, split = answered(
                model, x, step, labels, settings, scheduler, edits_at(history, step), splitter
            )
            t = scheduler.timesteps[step]
            x0 = predict_x0(scheduler, x, model.without_variance(output), t)
            if kept is not None:  # nothing is held twice
                x0, output = kept.moved(x0, output)
            x = advance(scheduler, output, x, seeds_at(history, step), step, settings.eta)
            if kept is not None:
                x = kept.finish(x, witness, split)
            yield Step(x0, output, x, witness, split)


def answered(
    model: HookedDiT,
    x: Tensor,
    step: int,
    labels: Tensor,
    settings: Settings,
    scheduler: Any,
    edits: Edits,
    splitter: Splitter,
) -> tuple[Tensor, Witness, Split]:
    """The model's guided answer at x_t [batch, ...], with its checksums, part by part."""
    inst, passes = model.instrumentation, n_passes(model, settings.guidance)
    split = splitter.at(step, len(x))
    waiting, done = deque(split.parts), list[tuple[int, ...]]()
    outputs, witnesses, tries = list[Tensor](), list[Witness](), 0
    others = [name for name, each in inst.ears if isinstance(each, Editor)]
    edited = any(isinstance(each, Holding) for _, each in inst.ears)  # a plan's leave points out
    if not split.whole:
        _require_parts(inst, edits)
    while waiting:
        part = waiting.popleft()
        index = positions(part, x.device)
        try:
            with (
                inst.under(
                    step=step,
                    steps=settings.steps,
                    log_snr=scheduler.levels[step],
                    scheduler=scheduler,
                    branch=branches(len(part), passes),
                    **_place(inst, split, part, passes, tries),
                ),
                model.hooks(edits),
                inst.witnessing() as witness,
            ):
                whole = len(part) == len(x)
                own = (x, labels) if whole else (x[index], labels[positions(part, labels.device)])
                output = model_output(model, own[0], step, own[1], settings, scheduler)
            edited = edited or any(inst.points[name].changed for name in others)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            output = None
        tries += 1
        if output is None:  # the exception is gone by now, and what it held
            _require_parts(inst, edits)
            waiting.extendleft(reversed(splitter.halved(part, splitter.pairs and not split.copied)))
            continue
        done.append(part)
        outputs.append(output)
        witnesses.append(witness)
    split = replace(split, parts=tuple(done), edited=edited)
    split = split.with_texts([witness.text_tokens for witness in witnesses])
    if split.whole:
        return outputs[0], witnesses[0], split
    return _joined(outputs, witnesses, split, passes)


def _require_parts(inst: Any, edits: Edits) -> None:
    """Raise RuntimeError where a hook, or an edit of the run's own, needs the whole batch."""
    inst.require_parts()
    for names, fn in edits:
        if not getattr(fn, "in_parts", False):
            raise InvalidState(
                f"The edit at {names!r:.60} sees a step's whole batch at once, and batch= would "
                "show it in parts; expected a batch of all images, or fn.in_parts = True on a "
                "function that treats each item by itself."
            )


def _place(
    inst: Any, split: Split, part: tuple[int, ...], passes: int, tries: int
) -> dict[str, Any]:
    """What a part's pass is told of its place in the step."""
    if len(part) == split.size and not tries:
        return {}
    rows, twin = split.rows(part, passes), inst.context.twin
    # of copies the originals are all that is run
    size = split.size * passes if not split.copied else len(part) * passes
    return {
        "part": Part(rows, size, later=tries > 0),
        "twin": None if twin is None else tuple(twin[row] for row in rows),
    }


def _joined(
    outputs: list[Tensor], witnesses: list[Witness], split: Split, passes: int
) -> tuple[Tensor, Witness, Split]:
    """Parts as the whole batch, in its order."""
    output = torch.cat(outputs)
    order, rows = (split.order(n, output.device) for n in (1, passes))
    witness = Witness()
    for name in witnesses[0]:
        parts = [each[name] for each in witnesses]
        sums = Checksum(*(torch.cat(each)[None] for each in zip(*parts, strict=True)))
        witness.add([name], sums)
    witness = witness if rows is None else witness.items_at(rows)
    return output if order is None else output[order], witness, split


def prepared(model: HookedDiT, settings: Settings) -> Any:
    """A fresh scheduler with its timesteps set.

    Raises ValueError if it does not fit the model, the steps or eta; RuntimeError for a model whose
    pipeline does some steps with another.
    """
    arguments.require_cpu_by_default()
    if model.shares_steps:
        raise InvalidState(
            "The pipeline computes its later steps with a second transformer, transformer_2, and "
            "dit_lens's own loop would compute all of them with the first; trace the pipeline "
            "itself instead, dit_lens.trace(pipe.transformer) or "
            "dit_lens.trace(pipe.transformer_2), and call pipe(...) inside."
        )
    if model.scheduler is None:
        raise InvalidValue(
            "The model has no scheduler, so its noise schedule is unknown; give one: "
            "HookedDiT(transformer, scheduler=...), or scheduler/ in the model's folder."
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
    # as numbers, which nobody has to wait for
    scheduler.times = scheduler.timesteps.tolist()
    _refuse_unfit(scheduler, settings)
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise InvalidValue(
            f"{name} scales its latents by sigma, which is not supported; expected a "
            "variance-preserving or flow-matching scheduler, such as "
            f"{', '.join(map(repr, SAMPLERS))}."
        )
    _refuse_broken(scheduler, settings)
    check_training(scheduler, model.scheduler)
    scheduler.levels = log_snr(scheduler, scheduler.timesteps).tolist()
    return scheduler


def remembers(scheduler: Any) -> bool:
    """Whether a scheduler's steps depend on earlier ones. It is asked by what it does: its config
    can hold what it was made from and does not read.

    Args:
        scheduler: with its timesteps set.
    """
    going, draw = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
    shape = (1, 8 if learns_variance(scheduler) else 4, 8, 8)
    x = torch.randn(1, 4, 8, 8, generator=draw)
    for step in range(len(scheduler.timesteps)):
        output = torch.randn(shape, generator=draw)
        fresh = advance(copy.deepcopy(scheduler), output, x, [0], step, 0.0)
        x = advance(going, output, x, [0], step, 0.0)
        if not torch.allclose(x, fresh, atol=1e-4):
            return True
    return False


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
    if setting(scheduler, "stochastic_sampling"):
        raise InvalidValue(
            f"{name} has stochastic_sampling=True, whose noise can't be that of the run; expected "
            "scheduler='euler-flow' with eta=1."
        )
    if setting(scheduler, "thresholding"):
        raise InvalidValue(
            f"{name} has thresholding=True, for pixels, by which each step's clean latents depend "
            "on all of an image's values; expected thresholding=False."
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
    signal, _ = signal_and_noise(scheduler, scheduler.timesteps)
    if not is_flow(scheduler) and scheduler.config.prediction_type == "epsilon":
        if not bool(signal.all()):
            raise InvalidValue(
                f"{name} has a step without any signal, as rescale_betas_zero_snr=True makes it, "
                "from which a model that predicts the noise can't go on; expected "
                "prediction_type='v_prediction', or rescale_betas_zero_snr=False."
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
    """Whether the sampler draws noise after the start, as its first step tells."""
    return next(drawing(model, settings, range(1)), None) is not None


def drawing(model: HookedDiT, settings: Settings, steps: range) -> Iterator[int]:
    """Those of some steps at which the sampler draws noise: seen by taking each with two seeds.

    Args:
        model: that is sampled.
        settings: the run's.
        steps: that are looked at, in a row.
    """
    scheduler = prepared(model, settings)
    x = torch.zeros(1, *model.cfg.latent_shape)
    output = torch.cat([x] * (2 if learns_variance(scheduler) else 1), 1)
    for step in range(steps.stop):
        if step in steps:
            trials = ((copy.deepcopy(scheduler), seed) for seed in (0, 1))
            ends = (advance(each, output, x, [seed], step, settings.eta) for each, seed in trials)
            if not torch.equal(*ends):
                yield step
        advance(scheduler, output, x, [0], step, settings.eta)  # which may remember its steps
