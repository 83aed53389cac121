"""A run: a denoising trajectory that is kept whole and can branch off from any step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..families.offloading import computing_device
from ..hooks.names import layer_of, select
from ..hooks.passes import Part
from ..hooks.points import Editor, Listener, Observer, StopForward, pairs_of
from ..model.hooked import HookedDiT
from ..model.kernels import Kernels
from ..model.noise_schedule import log_snr
from ..model.pinned import sent
from ..model.state import State
from ..model.trajectories import room
from ..model.witness import (
    Departure,
    NotReproduced,
    Proof,
    Witness,
    is_text,
    until,
)
from ..pictures import notebook
from .guidance import branches, model_inputs, n_passes
from .loop import Kept, advance, denoise
from .parts import Split, Splitter, positions, together
from .schedulers import MEMORYLESS
from .settings import (
    Change,
    Edits,
    Seeds,
    Settings,
    check_step,
    edits_at,
    item_seeds,
    seeds_at,
)

EDITED_OUTSIDE = (
    "it was made under a trace's edits or hooks, which are not in its history (those that "
    "run.replay(edits=...) is given are), or weights, adapters or module hooks have changed since"
)


@dataclass(frozen=True, repr=False)
class Run:
    """A denoising trajectory; step 0 is the noisiest.

        run = dit_lens.sample(model, labels=[3, 7], steps=50)
        run.images, run.x0[10]                             # decoded; the clean latents seen early
        run.activations("resid_post", 5, step=12)          # recomputed and proven
        run.replay(from_step=12, edits=[(name, fn)])       # branch off
        run.select([0])                                    # some items only

    Attributes:
        model: what was sampled.
        settings: steps, guidance, scheduler, eta.
        latents: x_t before each step and at the end, [steps + 1, batch, channel, height, width],
            float32 (float64 where the model computes in it). These three lie where
            `model.trajectories` says.
        x0: the clean latents predicted at each step, [steps, batch, ...].
        outputs: what the model answered (guided), [steps, batch, ...].
        timesteps: [steps].
        labels: [batch], on the host.
        history: where its noise comes from and what `replay` was told to edit, from step 0 and from
            each replay's step on. A trace's edits and hooks are not in it: a run made under them is
            recomputed in that trace, and its own `activations` and `replay` raise NotReproduced.
        witnesses: checksums of the streams in each step's pass, which prove a recomputation.
        scheduler: as it was before the first step, with the run's timesteps set.
        kernels: the settings that chose the kernels; what goes on from the run is run under them.
        state: a glance at the model, to name what changed since.
        selected: whether these are items of a batch of another size.
        splits: how each step's batch went through the model.
        batch: so many images go through the model at once; None is all.
        tied_until: before this step each item was coupled to its twin through attention, which a
            recomputation can't repeat.
    """

    model: HookedDiT
    labels: Tensor
    history: tuple[Change, ...]
    settings: Settings
    timesteps: Tensor
    latents: Tensor
    x0: Tensor
    outputs: Tensor
    witnesses: tuple[Witness, ...]
    scheduler: Any
    kernels: Kernels
    state: State = field(metadata={"told": False})  # where the weights lie
    splits: tuple[Split, ...]
    tied_until: int = 0
    selected: bool = False
    batch: int | None = None

    def __repr__(self) -> str:
        set_to, labels = self.settings, self.labels.tolist()
        shown = ", ".join(map(str, labels[:6])) + ", ..." * (len(labels) > 6)
        edits = sum(len(change.edits) for change in self.history)
        said = [f"{len(labels)} images", f"labels [{shown}]"]
        said.append(f"{set_to.steps} steps of {type(self.scheduler).__name__}")
        said += [f"guidance {set_to.guidance:g}"] * (set_to.guidance != 1)
        said += [f"eta {set_to.eta:g}"] * (set_to.eta != 0)
        said += [f"{edits} edit{'s' * (edits != 1)}"] * bool(edits)
        return f"Run({', '.join(said)})"

    def _repr_html_(self) -> str:
        """For notebooks: the finished images too, where nothing has to be decoded for them."""
        if self.model.vae is not None and "images" not in vars(self):
            return notebook.shown(repr(self))
        titles = self.model.conditions.words(self.labels.tolist())
        return notebook.shown(repr(self), notebook.strip(self.images.cpu().numpy(), titles))

    @property
    def log_snr(self) -> Tensor:
        """log SNR at each step, [steps], rising."""
        return log_snr(self.scheduler, self.timesteps)

    def here(self, kept: Tensor) -> Tensor:
        """A part of the run's latents, x0 or outputs, where the model computes.

        Args:
            kept: as it lies; it is not copied if that is there already.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=4)
        >>> run.here(run.x0[2]).device == run.model.device
        True
        """
        return sent(kept, self.model.device)

    @cached_property
    def finished(self) -> Tensor:
        """The finished latents, [batch, *latent_shape], where the model computes."""
        return self.here(self.latents[-1])

    @cached_property
    def images(self) -> Tensor:
        """The finished latents decoded, [batch, channel, height, width] in [0, 1]."""
        return decode(self.model, self.finished, self.batch)

    def activations(
        self, name: str, layer: int | None = None, *, step: int | None = None
    ) -> Tensor:
        """One activation, recomputed from the stored x_t, edits included.

        Args:
            name: a hook name, or a shorthand with `layer`.
            layer: the block, for a shorthand.
            step: one step, 0 the noisiest; None is all of them.

        Returns:
            [batch, ...] of one step, or [step, batch, ...]; with guidance the batch is
            [cond | null].

        Raises:
            ValueError: for a step outside the run, or while it was coupled.
            NotReproduced: if the model's pass is no longer what it was.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=4)
        >>> run.activations("resid_post", 5, step=2).shape
        torch.Size([1, 64, 64])
        """
        if step is not None:
            step = check_step(step, self.settings.steps)
        self.require_released(0 if step is None else step)
        key: Any = name if layer is None else (name, layer)
        full = self.model.resolve(key)
        if step is not None:
            return self._recomputed(step, full)
        first = self._recomputed(0, full)
        found = first.new_empty(self.settings.steps, *first.shape)  # filled as they come
        for s in range(self.settings.steps):
            found[s] = first if s == 0 else self._recomputed(s, full)
        return found

    def check(self, step: int) -> None:
        """Hold the model's pass at a step against the run's witness.

        Args:
            step: 0 is the noisiest.

        Raises:
            NotReproduced: if the pass is no longer what it was.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=4)
        >>> run.check(2)
        """
        step = check_step(step, self.settings.steps)
        self.require_released(step)
        self._recomputed(step, "hook_sample")

    def forward(self, step: int) -> Tensor:
        """The model's pass at a step once more, with this run's edits: what a probe can watch.

            with dit_lens.trace(run.model, probes=[probe]):
                for step in range(run.settings.steps):
                    run.forward(step)

        Args:
            step: 0 is the noisiest.

        Returns:
            What the model answered, [batch, ...]; with guidance the batch is [cond | null].

        Raises:
            ValueError: for a step outside the run, or while it was coupled.
            NotReproduced: if the pass is no longer what it was.
        """
        step = check_step(step, self.settings.steps)
        self.require_released(step)
        inst, split = self.model.instrumentation, self.splits[step]
        if split.copied:  # who watches wants to see both twins
            split = Splitter(self.batch, self.passes, pairs=True).at(step, split.size)
        if not split.whole:
            inst.require_parts()
        answers, departures = [], []
        for number, part in enumerate(split.parts):
            proof = self._proof(step, split, part, "hook_sample")
            rows = split.rows(part, self.passes)
            place = None if split.whole else Part(rows, split.size * self.passes, number > 0)
            with (
                inst.under(
                    step=step,
                    log_snr=float(self.log_snr[step]),
                    scheduler=self.scheduler,
                    part=place,
                    branch=branches(len(part), self.passes),
                ),
                self.model.hooks(edits_at(self.history, step)),
                self.model.attached(proof.listeners),
            ):
                answers.append(self._pass(step, part))
            departures.append(proof.departure())
        self._judge(step, departures)
        return self._whole(answers, split, ("batch",))

    def _recomputed(self, step: int, name: str) -> Tensor:
        """One activation at one step, held against the run's witness; hooks that are on now, and
        traces that are open, have no part in it.
        """
        model, split = self.model, self.splits[step]
        last = until(name, model.names, self.witnesses[step])
        if self.selected and is_text(name):  # with another padding only what follows proves it
            last = "hook_sample"
        found, departures = list[Tensor](), []
        for part in split.parts:
            proof = self._proof(step, split, part, last)
            listeners: list[tuple[str, Listener]] = [
                (each, Editor(fn))
                for names, fn in edits_at(self.history, step)
                for each in select(names, model.names)
            ]
            listeners += proof.listeners
            listeners.append((name, Observer(lambda value, hook: found.append(value.clone()))))
            listeners += model.instrumentation.stopping(last)
            with model.instrumentation.alone(listeners), suppress(StopForward):
                self._pass(step, part)
            departures.append(proof.departure())
            if proof.padded and layer_of(name) == model.cfg.n_layers - 1 and is_text(name):
                raise NotReproduced(
                    f"{name!r} of some items alone can't be proven: their texts are padded "
                    "otherwise than in the whole run, and nothing follows the last layer's; read "
                    "it from the whole run."
                )
        self._judge(step, departures)
        return self._whole(found, split, model.sites[name])

    @property
    def passes(self) -> int:
        """Images an item: 2 where guidance runs a null half."""
        return n_passes(self.model, self.settings.guidance)

    def _whole(self, found: list[Tensor], split: Split, axes: Sequence[str]) -> Tensor:
        """What the parts of a step gave, as the whole batch."""
        if split.whole:
            return found[0]
        value = together(found, axes)
        order = split.order(self.passes, value.device)
        return value if order is None else value[order]

    def _proof(self, step: int, split: Split, part: tuple[int, ...], last: str) -> Proof:
        """What holds a part of a step against its checksums."""
        self.require_here()
        texts = self.splits[step].texts
        texts = tuple(texts[i] for i in part) if texts else ()
        then = self.witnesses[step]
        if not split.whole:
            rows = torch.tensor(split.rows(part, self.passes), device=self.model.device)
            then = then.items_at(rows)
        return Proof(then, self.model.names, last, texts)

    def _pass(self, step: int, part: tuple[int, ...]) -> Tensor:
        """The model's pass at a step, from the stored x_t of some items."""
        x, t = self.here(self.latents[step]), self.timesteps[step]
        x = x[positions(part, x.device)]
        labels = self.labels[positions(part, self.labels.device)]
        inputs = model_inputs(self.model, x, t, labels, self.settings.guidance)
        with self.restored():
            return self.model(*inputs)

    def restored(self) -> AbstractContextManager[None]:
        """The settings that chose this run's kernels, for a `with` block: what goes on from the run
        is computed as it was, whatever is in force now. Gradients are off in it.
        """
        return self.kernels.restored(self.model.device.type)

    def _judge(self, step: int, departures: Sequence[Departure | None]) -> None:
        """Raise NotReproduced for another computation; warn of rounding."""
        seen = sorted((d for d in departures if d is not None), key=lambda d: d.rounding)
        if not seen:
            return
        departure = seen[0]
        changed = self.state.changes(State.of(self.model.transformer))
        if departure.is_other(changed):
            raise departure.error(step, changed or [EDITED_OUTSIDE])
        if not self.selected:  # some items alone are another batch size
            warnings.warn(departure.warning(step, changed), stacklevel=4)

    def require_here(self) -> None:
        """Raise InvalidState if the model was moved to another device since, whose kernels round
        otherwise, or if tensors are made on a device by default now.
        """
        arguments.require_cpu_by_default()
        then, now = next(iter(self.witnesses[0].values())).bits.device, self.model.device
        if then.type != now.type or (now.index is not None and then.index != now.index):
            raise InvalidState(
                f"The run was made on {str(then)!r} and its model is on {str(now)!r} now; expected "
                f"it there again, model.to({str(then)!r}), or a new run."
            )

    def require_released(self, step: int) -> None:
        """Raise ValueError if the run was still coupled to its twin at this step.

        Args:
            step: 0 is the noisiest.
        """
        if arguments.whole("step", step, 0) < self.tied_until:
            raise InvalidValue(
                f"Until step {self.tied_until} this run was coupled to its twin, and step {step} "
                f"alone would be another; expected a step from {self.tied_until} on, or new twins: "
                "dit_lens.twins(..., probes=[...])."
            )

    def select(self, items: arguments.Index) -> Run:
        """The same run for some of its items only; neighbours share its memory.

        Args:
            items: a number, a slice, indices or a boolean mask of the batch.

        Raises:
            ValueError: for items that are not there, or none.
            RuntimeError: if the model was moved to another device since.
        """
        self.require_here()
        chosen = arguments.positions("items", items, len(self.labels))
        wanted, first = chosen.tolist(), int(chosen[0])
        # neighbours, as one of two twins is, share the run's memory
        beside = wanted == list(range(first, first + len(wanted)))

        def part(kept: Tensor) -> Tensor:
            if beside:
                return kept[:, first : first + len(wanted)]
            own = room(self.model.trajectories, (len(kept), len(wanted), *kept.shape[2:]), kept)
            at = sent(chosen, kept.device)
            for mine, step in zip(own, kept, strict=True):
                mine.copy_(step[at])
            return own

        whole = len(self.labels)
        passes = n_passes(self.model, self.settings.guidance)
        rows = torch.cat([chosen + whole * i for i in range(passes)]).to(self.model.device)
        witnesses = tuple(witness.items_at(rows) for witness in self.witnesses)
        history = tuple(
            replace(c, seeds=tuple(c.seeds[i] for i in chosen.tolist())) for c in self.history
        )
        splits = self.splits
        if chosen.tolist() != list(range(whole)):
            own = Splitter(self.batch, passes)
            splits = tuple(
                replace(
                    own.at(step, len(chosen)),
                    edited=split.edited,
                    texts=tuple(split.texts[i] for i in wanted) if split.texts else (),
                )
                for step, split in enumerate(self.splits)
            )
        found = replace(
            self,
            labels=self.labels[chosen],
            history=history,
            witnesses=witnesses,
            splits=splits,
            selected=self.selected or len(chosen) != whole,
            latents=part(self.latents),
            x0=part(self.x0),
            outputs=part(self.outputs),
        )
        if beside:  # a copy of its own would be decoded again
            vars(found)["finished"] = self.finished[first : first + len(wanted)]
        return found

    def replay(
        self,
        from_step: int = 0,
        edits: Edits | Mapping[int, Edits] = (),
        *,
        until: int | None = None,
        seeds: Seeds | None = None,
        latents: Tensor | None = None,
        released: bool = False,
        batch: int | None = None,
    ) -> Run:
        """The same run from `from_step` on, with interventions, other noise, or other latents.

        Without any it is bit for bit this run, its own edits included. It is run on this run's
        kernels, under autocast where this run was.

        Args:
            from_step: the first step that is run again.
            edits: (name, fn(activation, hook)) that act from there on, beside the run's own; or
                {step: such edits}, which act at that step only.
            until: the first step at which they no longer act; None is the run's end.
            seeds: other ones make clones, which share the past and not the future.
            latents: x_t at `from_step`, [batch, *latent_shape], in place of the stored one.
            released: let twins that were coupled run on alone, also from before their release.
            batch: images at once; by default as in this run. An edit is then shown each part of the
                batch by itself, and must say that it may be: `fn.in_parts = True`.

        Raises:
            ValueError: for a step outside the run or while it was coupled, latents of another
                shape, or seeds that do not fit.
            NotReproduced: if the model's pass is no longer what it was.

        >>> import dit_lens; run = dit_lens.sample(dit_lens.load("digits"), [3], steps=4)
        >>> bool((run.replay(from_step=2).latents == run.latents).all())
        True
        """
        # What is asked for fits the run.
        from_step = check_step(from_step, self.settings.steps, "from_step")
        if until is not None:
            last = self.settings.steps
            until = arguments.whole("until", until, from_step + 1, last, "after from_step")
        mine = self._changes(from_step, edits, until)
        for names, _ in [edit for change in mine for edit in change.edits]:
            select(names, self.model.names)
        if not arguments.flag("released", released):
            self.require_released(from_step)
        start = self.here(self.latents[from_step])
        if latents is not None:
            start = given_latents(latents, start.device, start.dtype)
        if start.shape != self.latents[0].shape:
            raise InvalidValue(
                f"The latents have shape {list(start.shape)}; expected "
                f"{list(self.latents[0].shape)}."
            )
        fresh = None if seeds is None else tuple(item_seeds(seeds, len(self.labels)))
        batch = arguments.optional(arguments.whole, "batch", batch, 1)
        first = max(from_step, self.tied_until)
        edited = [s for s, split in enumerate(self.splits) if split.edited and s > first]
        for step in [*range(self.settings.steps)[first : first + 1], *edited]:
            self._recomputed(step, "hook_sample")

        # The history that the new run will have.
        history = self.history
        if fresh is not None:
            history = (
                *(c if c.from_step < from_step else replace(c, seeds=fresh) for c in history),
                Change(from_step, fresh),
            )
        if mine:
            mine = [replace(c, seeds=seeds_at(history, c.from_step)) for c in mine]
            history = tuple(sorted((*history, *mine), key=lambda change: change.from_step))

        # A model that is as it was gives the run again, if nobody edits it now either.
        again = fresh is None and latents is None and not (mine or released)
        ears = self.model.instrumentation.ears
        again = again and not any(isinstance(each, Editor) for _, each in ears)

        # The steps before are taken over, those after are run, split as they were if nothing is
        # different.
        batch = self.batch if batch is None else batch
        same = fresh is None and latents is None and not mine and batch == self.batch
        # who watches wants to see both twins
        same = same and not (self.model.instrumentation.busy and any(s.copied for s in self.splits))
        splitter = Splitter(batch, self.passes, given=self.splits if same else None)
        kept = Kept(self.model, start, self.settings.steps, from_step)
        kept.take_over(
            self.latents[:from_step],
            self.x0[:from_step],
            self.outputs[:from_step],
            self.witnesses[:from_step],
            self.splits[:from_step],
        )
        scheduler = self.scheduler_at(from_step)
        with self.restored(), self.model.instrumentation.under(run=object()):
            for _ in denoise(
                self.model,
                start,
                self.labels,
                history,
                self.settings,
                scheduler,
                from_step,
                splitter=splitter,
                kept=kept,
            ):
                pass
        if again:
            self._require_same(kept.witnesses, from_step)
        return replace(
            self,
            history=history,
            latents=kept.latents,
            x0=kept.x0,
            outputs=kept.outputs,
            witnesses=tuple(kept.witnesses),
            splits=tuple(kept.splits),
            batch=batch if splitter.batch is None else splitter.batch,
            tied_until=min(self.tied_until, from_step),
        )

    def _require_same(self, witnesses: Sequence[Witness], first: int) -> None:
        """Raise NotReproduced, or warn of rounding, where a replay of all departs from this run."""
        steps, odd = list[int](), list[Tensor]()
        for step in range(first, self.settings.steps):
            then, now = self.witnesses[step], witnesses[step]
            shared = [name for name in then if name in now]
            steps += [step] * len(shared)
            odd += [(then[name].bits != now[name].bits).any() for name in shared]
        departed = torch.stack(odd).tolist() if odd else []  # the device is waited for once
        if any(departed):
            self._recomputed(steps[departed.index(True)], "hook_sample")

    def _changes(self, from_step: int, edits: Any, until: int | None) -> list[Change]:
        """The edits that a replay is given, as changes."""
        if not isinstance(edits, Mapping):
            pairs = pairs_of("edits", edits)
            return [Change(from_step, (), tuple(pairs), until)] if pairs else []
        last = self.settings.steps - 1
        if until is not None:
            raise InvalidValue(
                f"until={until} with edits by step, each of which acts at its step only; expected "
                "one or the other."
            )
        found = []
        for step, own in edits.items():
            step = arguments.whole("edits", step, from_step, last, "steps from from_step on")
            found.append(Change(step, (), tuple(pairs_of("edits", own)), step + 1))
        return found

    def fresh_scheduler(self) -> Any:
        """A copy of the scheduler as it was before the run's first step, whatever became of the
        model's own since.
        """
        return copy.deepcopy(self.scheduler)

    def scheduler_at(self, step: int) -> Any:
        """A scheduler that remembers this run's earlier steps, as multistep ones need.

        Args:
            step: the next step to be made.
        """
        scheduler, step = (
            self.fresh_scheduler(),
            arguments.whole("step", step, 0, self.settings.steps),
        )
        with self.restored():
            for s in range(0 if type(scheduler).__name__ in MEMORYLESS else step):
                seeds, eta = self.seeds_at(s), self.settings.eta
                output, x = self.here(self.outputs[s]), self.here(self.latents[s])
                advance(scheduler, output, x, seeds, s, eta)
        return scheduler

    def seeds_at(self, step: int) -> tuple[int, ...]:
        """The seeds that this step's noise came from, one for each item.

        Args:
            step: 0 is the noisiest.
        """
        return seeds_at(self.history, arguments.whole("step", step, 0))


def given_latents(latents: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latents that a user gave as a run keeps them: in the run's dtype, without gradients.

    Args:
        latents: as given.
        device: of the run.
        dtype: of the run.
    """
    found = arguments.tensor("latents", latents).detach().to(device, dtype)
    return arguments.tensor("latents", found, finite=True)


def made_of(
    kept: Kept,
    model: HookedDiT,
    labels: Tensor,
    history: tuple[Change, ...],
    settings: Settings,
    scheduler: Any,
    kernels: Kernels,
    state: State,
    batch: int | None,
    tied_until: int = 0,
) -> Run:
    """The run that a finished trajectory makes."""
    return Run(
        model=model,
        labels=labels,
        history=history,
        settings=settings,
        timesteps=scheduler.timesteps.cpu(),
        latents=kept.latents,
        x0=kept.x0,
        outputs=kept.outputs,
        witnesses=tuple(kept.witnesses),
        splits=tuple(kept.splits),
        scheduler=scheduler,
        kernels=kernels,
        state=state,
        tied_until=tied_until,
        batch=batch,
    )


def require_finite(run: Run, which: str) -> None:
    """Raise InvalidValue for a run that can't be measured, since its latents do not stay finite.

    Args:
        run: all of it is looked at if its end is not finite.
        which: it is, in the sentence.
    """
    if bool(run.finished.isfinite().all()):
        return
    steps = [bool(x.isfinite().all()) for x in run.latents]
    raise InvalidValue(
        f"The latents of {which} are not finite from step {steps.index(False)} of "
        f"{run.settings.steps} on; expected a run of numbers, as with less guidance or "
        "dtype='float32'."
    )


def decode(model: HookedDiT, latents: Tensor, batch: int | None = None) -> Tensor:
    """Latents as images in [0, 1]: through the VAE where there is one, otherwise they are pixels in
    [-1, 1]. They stay on their device, whichever the VAE is on.

    Args:
        model: whose latents they are.
        latents: [batch, *latent_shape].
        batch: so many go through the VAE at once; None is all.
    """
    if model.vae is not None:
        here, there = latents.device, computing_device(model.vae)
        with torch.no_grad():
            parts = latents.split(len(latents) if batch is None else batch)
            found = [model.family.decode(model.vae, part.to(there)).to(here) for part in parts]
            latents = found[0] if len(found) == 1 else torch.cat(found)
    return (latents / 2 + 0.5).clamp(0, 1)
