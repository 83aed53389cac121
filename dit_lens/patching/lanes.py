"""Lanes: many patched versions of one run, advanced together, each exactly as it would go alone.

A *lane* is a trajectory that differs from the target's stored one, with all the patches that have
led to it so far. Patches that have done the same up to now share a lane (windows that begin alike,
the whole stream of the source in any layer), and it splits where they part. Nothing is run for a
patch before its window: the target's x_t is stored. In the step in which a lane leaves the target,
only the layers from the patched one on are run, from the target's own stream before it. Lanes are
stacked along the batch whether or not their windows are over: a patch edits its own rows only.

Each lane carries a scheduler of its own, a copy of its parent's, so that multistep schedulers
remember the right past. It also carries what it has added where it will be held; before it left the
target that is the target's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..hooks.hold import Added, after, before, line
from ..hooks.points import HookFunction, HookPoint
from ..sampling.guidance import guided, model_inputs, n_passes
from ..sampling.loop import advance, model_output
from ..sampling.run import Run
from ..sampling.schedulers import learns_variance
from ..sampling.settings import Edits, edits_at
from .patch import Planned

SOURCE = "the source's output"
"""What a patch of the whole stream does, in any layer, where source and target have the same labels
and no edits.
"""


Additions = dict[tuple[int, Added], Tensor]
"""What was added, by step and place."""


@dataclass
class Lane:
    """One trajectory: x_t [item, c, h, w] before the step, its scheduler, the patches that it
    stands for (numbers), and what it has added that will be held.
    """

    x: Tensor
    scheduler: Any
    patches: list[int]
    added: Additions = field(default_factory=dict)


@dataclass
class Job:
    """One step of one lane, yet to be run.

    Attributes:
        parent: the lane it comes from.
        patches: those that it stands for (numbers).
        act: what is done in this step; None is nothing.
        key: what tells `act` apart from other jobs'.
        leaves: whether it leaves the target's trajectory here.
        keep: where what it adds now will be held later.
        reach: how many steps back its patches will hold from, at most.
        output: the model's guided answer, once it is known.
        held: what it is held at now, by place, from earlier steps.
        added: what it has added at the places of `keep`.
    """

    parent: Lane
    patches: list[int]
    act: Planned | None
    key: str | None
    leaves: bool
    keep: list[Added]
    reach: int
    output: Tensor | None = field(default=None, repr=False)
    held: dict[Added, Tensor] = field(default_factory=dict, repr=False)
    added: dict[Added, Tensor] = field(default_factory=dict, repr=False)


class Lanes:
    """Advances patches of `source` into `target`.

    Args:
        source: the run that activations are taken from.
        target: the run that is patched.
        batch: images that run at once.

    Attributes:
        blocks: images x blocks run so far (with guidance an item is two images).
    """

    def __init__(self, source: Run, target: Run, batch: int) -> None:
        self.source, self.target, self.batch = source, target, batch
        self.model, self.settings = target.model, target.settings
        self.passes = n_passes(self.model, self.settings.guidance)
        self.items = len(target.labels)
        self.blocks = 0
        own, theirs = (run.model.conditions.words(run.labels.tolist()) for run in (source, target))
        self.same_labels = own == theirs
        self.scheduler = target.fresh_scheduler()

    @torch.no_grad()
    def run(self, patches: Sequence[Planned], tick: Callable[[int], object]) -> Tensor:
        """The finished latents of each patch, [patch, item, c, h, w].

        Args:
            patches: what to do.
            tick: called with each finished step.
        """
        target = self.target
        scheduler = target.fresh_scheduler()
        trunk = Lane(target.here(target.latents[0]), scheduler, list(range(len(patches))))
        lanes: list[Lane] = []
        for step in range(self.settings.steps):
            trunk.x = target.here(target.latents[step])
            jobs, staying = self._jobs(trunk, lanes, patches, step)
            self._outputs(jobs, step)
            lanes = [self._advanced(job, step) for job in jobs]
            trunk.patches = staying
            if staying:  # for the memory of multistep schedulers
                self._step(trunk.scheduler, target.here(target.outputs[step]), trunk.x, step)
            tick(step)
        found: dict[int, Tensor] = {p: target.finished for p in trunk.patches}
        found |= {p: lane.x for lane in lanes for p in lane.patches}
        return torch.stack([found[p] for p in range(len(patches))])

    def _jobs(
        self, trunk: Lane, lanes: list[Lane], patches: Sequence[Planned], step: int
    ) -> tuple[list[Job], list[int]]:
        """What to run in this step, lanes split by what their patches do now, and the patches that
        stay with the target.
        """
        plain = (
            self.source.model.transformer is self.target.model.transformer
            and not edits_at(self.source.history, step)
            and not edits_at(self.target.history, step)
            and self.same_labels
        )
        alike = plain and torch.equal(self.source.here(self.source.latents[step]), trunk.x)
        jobs, staying = [], []
        for lane in (trunk, *lanes):
            split: dict[str | None, list[int]] = {}
            for p in lane.patches:
                split.setdefault(
                    self._key(patches[p], step, plain, alike and lane is trunk), []
                ).append(p)
            for key, members in split.items():
                if lane is trunk and key is None:
                    staying = members
                else:
                    act = patches[members[0]] if key else None
                    holds = [p for p in map(patches.__getitem__, members) if p.reach]
                    reach = max((p.reach for p in holds), default=0)
                    keep = _kept(holds, step)
                    jobs.append(Job(lane, members, act, key, lane is trunk, keep, reach))
        return jobs, staying

    def _key(self, patch: Planned, step: int, plain: bool, alike: bool) -> str | None:
        """What the patch does now: None where nothing, as when the source's activations are the
        target's own (`alike`).
        """
        if step not in patch.steps or (alike and patch.patch.kind == "swap"):
            return None
        if patch.patch.dose == 0:
            return None
        # with a second stream the image's is not all
        whole = patch.whole_stream and self.model.cfg.restartable
        return SOURCE if plain and whole else patch.key

    # One step.

    def _outputs(self, jobs: list[Job], step: int) -> None:
        """Fill in every job's model output."""
        # The source's own forward, for what is taken from it.
        seen: dict[str, Tensor] = {}
        if any(job.act.from_source for job in jobs if job.act):
            names = {
                name
                for job in jobs
                if job.act and job.act.from_source and job.key != SOURCE
                for place in job.act.places
                for name in place
                if name
            }
            seen, output = self._look(self.source, "source", step, names)
            for job in jobs:
                job.output = output if job.key == SOURCE else None

        # What is held now, from earlier steps.
        self._recall([job for job in jobs if job.act and job.act.patch.kind == "hold"], step)

        # Lanes that have left the target before run from their own x_t.
        todo = [job for job in jobs if job.output is None]
        edits = edits_at(self.target.history, step)
        per = max(1, self.batch // (self.items * self.passes))
        if edits:
            per = 1  # the target's own edits see the target's own batch, from the first layer on
        for chunk in _chunks([job for job in todo if not job.leaves], per):
            self._forward(chunk, edits, step, seen)

        # Those that leave it now start from its stream, at the first layer that is patched.
        if any(job.leaves for job in jobs):
            begun = list(_chunks(sorted((job for job in todo if job.leaves), key=_layer), per))
            # more than the stream goes from block to block
            whole = edits or not self.model.cfg.restartable
            streams, _ = self._look(
                self.target, "target", step, set() if whole else {self._stream(c) for c in begun}
            )
            for chunk in begun:
                self._forward(
                    chunk, edits, step, seen, None if whole else streams[self._stream(chunk)]
                )

    def _recall(self, jobs: list[Job], step: int) -> None:
        """Fill in what these jobs are held at: what the lane added itself, or, before it left the
        target, what the target did.
        """
        wanted = {
            id(job): [(s, place) for place in job.act.places for s in self._sources(job.act, step)]
            for job in jobs
            if job.act
        }
        trunk: dict[int, set[Added]] = {}
        for job in jobs:
            for s, place in wanted[id(job)]:
                if (s, place) not in job.parent.added:
                    trunk.setdefault(s, set()).add(place)
        theirs: Additions = {}
        for s, places in trunk.items():
            names = {name for place in places for name in place if name}
            seen, _ = self._look(self.target, "target", s, names)
            theirs |= {(s, p): p.of(seen[p.name], seen.get(p.entered)) for p in places}
        for job in jobs:
            known = theirs | job.parent.added
            for place in job.act.places if job.act else ():
                sources = self._sources(job.act, step)
                job.held[place] = line([known[s, place] for s in sources])

    def _sources(self, act: Planned | None, step: int) -> list[int]:
        """The earlier steps that a held one is made of."""
        return [] if act is None else before(step, act.patch.lag, act.patch.order)

    def _stream(self, chunk: list[Job]) -> str:
        """The stream from which these lanes, sorted by layer, leave the target: before the earliest
        of their layers.
        """
        return f"blocks.{_layer(chunk[0])}.hook_resid_pre"

    def _forward(
        self,
        jobs: list[Job],
        edits: Edits,
        step: int,
        seen: Mapping[str, Tensor],
        stream: Tensor | None = None,
    ) -> None:
        """One forward for these lanes, stacked.

        Args:
            jobs: the lanes' steps, which are given their outputs.
            edits: the target's own.
            step: the denoising step.
            seen: the source's activations, by name.
            stream: the target's at the first of the lanes' layers, to start from; None starts from
                the lanes' x_t.
        """
        n, k = self.items, len(jobs)
        x = torch.cat([job.parent.x for job in jobs])
        time, labels = self.target.timesteps[step], self.target.labels.repeat(k)
        inputs, t, y = model_inputs(self.model, x, time, labels, self.settings.guidance)
        first = None
        if stream is not None:
            first = _layer(jobs[0])
            inputs = (
                stream.unflatten(0, (self.passes, 1, n))
                .expand(-1, k, *[-1] * stream.ndim)
                .flatten(0, 2)
            )
        with self.target.restored(), self.model.hooks([*edits, *self._edits(jobs, seen)]):
            output = self.model(inputs, t, y, start_at_layer=first)
        self.blocks += len(t) * (self.model.cfg.n_layers - (first or 0))
        learns = learns_variance(self.scheduler)
        answer = guided(output.to(x.dtype), self.model, self.settings, learns)
        for job, own in zip(jobs, answer.split(n), strict=True):
            job.output = own

    def _edits(
        self, jobs: list[Job], seen: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, HookFunction]]:
        """A hook for each hook point that is patched, which changes each lane's own rows."""
        rows = torch.arange(self.passes * len(jobs) * self.items, device=self.model.device).view(
            self.passes, len(jobs), -1
        )
        acting: dict[str, list[tuple[Any, Job, Added]]] = {}
        keeping: dict[str, list[tuple[Any, Job, Added]]] = {}
        for i, job in enumerate(jobs):
            own: Any = (
                slice(i * self.items, (i + 1) * self.items)
                if self.passes == 1
                else rows[:, i].flatten()
            )
            for place in job.act.places if job.act else ():
                acting.setdefault(place.name, []).append((own, job, place))
            for place in job.keep:
                keeping.setdefault(place.name, []).append((own, job, place))
        streams: dict[str, Tensor] = {}

        def enter(activation: Tensor, hook: HookPoint) -> None:
            streams[hook.name] = activation

        def entered(place: Added, own: Any) -> Tensor | None:
            return streams[place.entered][own] if place.entered else None

        def edit(activation: Tensor, hook: HookPoint) -> Tensor:
            for own, job, place in acting[hook.name]:
                act, held = job.act, job.held.get(place)
                assert act is not None
                source = None
                if act.from_source:
                    source = place.of(seen[place.name], seen.get(place.entered))
                activation[own] = act.new(
                    place, activation[own], source, entered(place, own), held, self.passes
                )
            return activation

        def keep(activation: Tensor, hook: HookPoint) -> None:
            for own, job, place in keeping[hook.name]:
                # what is held goes on to the bit; a sum less what entered does not
                added = job.held.get(place) if job.act and job.act.whole else None
                value = place.of(activation[own], entered(place, own)) if added is None else added
                job.added[place] = value

        ends = [place for at in (acting, keeping) for on in at.values() for *_, place in on]
        for name in dict.fromkeys(place.entered for place in ends if place.entered):
            yield name, enter
        for name in acting:
            yield name, edit
        for name in keeping:
            yield name, keep

    def _advanced(self, job: Job, step: int) -> Lane:
        """The lane after this step; the first child goes on with its parent's scheduler only if it
        is the only one.
        """
        assert job.output is not None
        alone = not job.leaves and len(job.patches) == len(job.parent.patches)
        scheduler = job.parent.scheduler if alone else copy.deepcopy(job.parent.scheduler)
        following = self._step(scheduler, job.output, job.parent.x, step)
        added = {at: value for at, value in job.parent.added.items() if at[0] > step - job.reach}
        added |= {(step, place): value for place, value in job.added.items()}
        return Lane(following, scheduler, job.patches, added)

    def _step(self, scheduler: Any, output: Tensor, x: Tensor, step: int) -> Tensor:
        seeds, eta = self.target.seeds_at(step), self.settings.eta
        with self.target.restored():
            return advance(scheduler, output, x, seeds, step, eta)

    # The model.

    def _look(
        self, run: Run, which: str, step: int, names: set[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A run's own forward at a step: the named activations, and the guided output.

        Raises ValueError if it is not what the run had.
        """
        kept: dict[str, Tensor] = {}

        def keep(value: Tensor, point: HookPoint) -> None:
            kept[point.name] = value.clone()

        model, x, then = run.model, run.here(run.latents[step]), run.here(run.outputs[step])
        observed = model.observing(sorted(names), keep) if names else nullcontext()
        with run.restored(), model.hooks(edits_at(run.history, step)), observed:
            output = model_output(model, x, step, run.labels, self.settings, self.scheduler)
        self.blocks += self.passes * len(x) * self.model.cfg.n_layers
        if not bool(output.isfinite().all()):
            raise InvalidValue(
                f"The model's answer at step {step} of the {which} run is not finite; expected a "
                "run of numbers, as with less guidance or dtype='float32'."
            )
        off = float((output - then).norm() / then.norm().clamp_min(1e-12))
        if not off <= max(1e-3, 3 * torch.finfo(self.model.dtype).eps ** (2 / 3)):
            raise InvalidValue(
                f"Step {step} of the {which} run can't be computed again from its x_t: the model's "
                f"answer is off by {off:.1%}; was it made under a trace's edits or hooks? Those "
                "that are given to run.replay(edits=...) are in its history."
            )
        return kept, output


def _kept(holds: Sequence[Planned], step: int) -> list[Added]:
    """Where what is added at a step will be held by one of these patches."""
    found = [
        place
        for planned in holds
        if any(s in planned.steps for s in after(step, planned.patch.lag, planned.patch.order))
        for place in planned.places
    ]
    return list(dict.fromkeys(found))


def _layer(job: Job) -> int:
    return job.act.layer if job.act else 0


def _chunks(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """The jobs in order, in as few parts as hold at most so many each, as equal as they can be."""
    n = -(-len(jobs) // most)
    for i in range(n):
        yield jobs[len(jobs) * i // n : len(jobs) * (i + 1) // n]
