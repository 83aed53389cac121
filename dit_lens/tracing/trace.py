"""The trace: a denoising run under observation.

A DiT's forward depends on nothing but its inputs, so a trace keeps those, a few KB a step, together
with the edits that were in force. Any activation at any step is recomputed when it is read, by one
forward that stops at the layer asked for, and is bit for bit what recording would have given.
Recording (`names=`) is for when many reads follow. What is recomputed is held against checksums of
every layer's stream, taken while the run ran: a recomputation that departs raises `NotReproduced`.

Steps are those of the run, counted from 0: of a replay from step 2 they begin with 2. A second run
in the same trace is read behind the first one, while edits act at its own steps. With guidance a
step's batch is [cond | uncond], as the pipeline made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, InvalidType, InvalidValue
from ..families.config import Config
from ..families.parts.sites import Axes
from ..hooks.edits import (
    Steering,
    Steps,
    ablation,
    checked_steps,
    patch_from_steps,
    patch_from_tensor,
    step_test,
    within,
)
from ..hooks.hold import Hold, check_steps, held_places
from ..hooks.names import Key, NamesFilter, layer_of, resolve, select
from ..hooks.points import Editor, HookFunction, HookPoint, Listener, Observer
from ..hooks.regions import Region
from ..hooks.stored_edits import edits_for
from ..model.hooked import HookedDiT
from ..model.instrumentation import Instrumentation
from ..model.state import State
from ..model.taken import Taken
from ..pictures.attention import AttentionMap
from . import files
from .attention_map import attention_map
from .dataset import timesteps, to_dataset
from .recompute import order_of, over_steps, read, read_branches, stacked
from .record import Record
from .recorder import Recorder
from .site import Observing


class Trace:
    """A run under observation, as `dit_lens.trace` gives it; open it with `with`, read it during
    the run or after.

        with dit_lens.trace(pipe) as t:
            t.edit("blocks.5.hook_attn_out", lambda a, hook: 0 * a, steps=range(10))
            pipe(class_labels=[207], num_inference_steps=50)
        t["resid_post", 5]                     # [step, batch, token, d_model]
        t.stack("resid_post", steps=[0, 49])   # [layer, step, batch, token, d_model]
        t.get(["q", "k"], branch="cond")       # several names in one pass

    Before the run: `edit`, `patch`, `ablate`, `steer`, `hold` say what is changed, at which steps
    and where. After it: `t[name]`, `get`, `stack`, `to_xarray` read, `save` writes.

    Of several runs within one block the steps count on: after one of 50, the second begins at step
    50 of what is read. `steps=` of an edit counts within each run, from 0. One run a trace is the
    rule; its block can be opened once.

    Attributes:
        model: the `HookedDiT`; None for a trace that was loaded without its model.
        probes: the probes that watch.
        record: what was kept, as data.
    """

    def __init__(
        self, model: HookedDiT | None, record: Record, probes: Sequence[Observing] = ()
    ) -> None:
        for probe in arguments.listed("probes", probes, "a list of probes", fewest=0):
            if isinstance(probe, type) or not isinstance(probe, Observing):
                raise InvalidType(
                    f"{arguments.shown(probe)} is not a dit_lens.Probe; pass instances, as in "
                    "probes=[SpectralSplit()]."
                )
        self.model, self.record, self.probes = model, record, list(probes)
        self._recorder = Recorder(record)
        self._undo: Taken | None = None  # while the trace is open
        self._over = bool(record.calls)  # closed, or out of a file
        self._waiting: list[tuple[str, Listener]] = []
        self._edit_steps: list[tuple[str, Steps, str | None]] = []

    # Opening and closing.

    def __enter__(self) -> Trace:
        if self._undo is not None or self._over:
            raise InvalidState(
                "This trace was opened before, and its block can be opened once. Call "
                "dit_lens.trace(model) again."
            )
        model = self._traced_model()
        model.require_eval()
        self._undo = taken = Taken()
        try:
            self._open(model, taken)
            return self
        except BaseException:
            self._undo = None
            taken.close()
            raise

    def _open(self, model: HookedDiT, taken: Taken) -> None:
        # A pipeline or bare transformer is opened for the length of the block only.
        taken.undo(Instrumentation.let_go, model.transformer, self._recorder)
        model.instrumentation = Instrumentation.of(model.transformer, self._recorder)

        # Watch every call, then let editors, recorders and probes listen, in this order.
        self.record.state = State.of(model.transformer)
        taken.undo(self._recorder.forget)
        taken.undo(model.instrumentation.unwatch, self._recorder)
        model.instrumentation.watch(self._recorder)
        for name, listener in self._waiting:
            self._attach(name, listener, taken)
        for name in self.record.names:
            recording = Observer(self._recorder.keep)
            recording.in_parts = True
            self._attach(name, recording, taken)
        for probe in self.probes:
            probe.start(model)
            if isinstance(probe.names, (list, tuple)) and not probe.names:
                raise InvalidValue(
                    f"{type(probe).__name__} observes no hook point, its names are empty; use "
                    "its run(model, ...)."
                )
            for name in select(probe.names, self.names):
                shown = Observer(self._recorder.showing(probe))
                shown.in_parts = bool(getattr(probe, "in_parts", False))
                self._attach(name, shown, taken)

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._undo is not None:
            self._undo.close()
            self._undo, self._over = None, True
        wanted = (
            (f"the edit at {self._edit_steps[0][0]!r} never acted" if self._edit_steps else "")
            or (f"{self.record.names[0]!r} was not recorded" if self.record.names else "")
            or (f"{type(self.probes[0]).__name__} saw nothing" if self.probes else "")
        )
        if wanted and kind is None and not self.record.calls_at:
            warnings.warn(
                f"Nothing was traced, so {wanted}: no forward of the "
                f"{type(self._traced_model().transformer).__name__} that the trace was given "
                "finished inside the `with` block.",
                stacklevel=2,
            )
        # a run that was broken off says nothing of the steps it did not come to
        branches = dict.fromkeys(w for c in self.record.calls for w in c.told.split(" | "))
        for name, steps, branch in [] if kind else self._edit_steps:
            seen = sorted(self._recorder.of_runs)
            if self.record.calls and not any(map(step_test(steps), seen)):
                warnings.warn(
                    f"The edit at {name!r} for steps={steps!r} never acted: the run had "
                    f"{len(seen)} steps, {seen[0]} to {seen[-1]}.",
                    stacklevel=2,
                )
            elif branches and branch not in (None, *branches):
                warnings.warn(
                    f"The edit at {name!r} for branch={branch!r} never acted: the run had "
                    f"{', '.join(map(repr, branches))}.",
                    stacklevel=2,
                )
        asked = [self.record.steps, *(steps for _, steps, _ in self._edit_steps)]
        by_step = any(steps is not None for steps in asked)
        if by_step and kind is None and (first := self.record.branches_as_steps()) is not None:
            warnings.warn(
                "steps= counted calls of the transformer, for in a loop of your own nothing tells "
                f"its steps, and calls {first} and {first + 1} are given one x_t at one timestep; "
                "expected both branches of guidance in one call, or steps= that counts calls.",
                stacklevel=2,
            )

    def _attach(self, name: str, listener: Listener, taken: Taken) -> None:
        instrumentation = self._traced_model().instrumentation
        taken.undo(instrumentation.detach, name, listener)
        instrumentation.attach(name, listener)

    def _traced_model(self) -> HookedDiT:
        if self.model is None:
            raise InvalidState(
                "This trace was loaded without its model; load it with load_trace(path, model)."
            )
        return self.model

    def _edited_model(self) -> HookedDiT:
        if self._over:
            raise InvalidState(
                "The run of this trace is over, and an edit would never act; give it inside the "
                "`with` block of a new trace, before the run."
            )
        return self._traced_model()

    # Interventions.

    def edit(
        self, name: NamesFilter, fn: HookFunction, steps: Steps = None, **region: Any
    ) -> Trace:
        """Apply `fn(activation, hook)` at hook points; `hook.step` is the step.

        Chains: `t.edit(...).ablate(...)`.

        Args:
            name: which hook points.
            fn: gets a copy of the activation and returns what goes on in its place, or None.
            steps: at which steps: an int, a slice, a range or a collection; None is all.
            **region: which part: `items`, `heads`, `tokens`, `band=(bands, b)`; `branch="cond"`,
                "uncond" or "skip": this branch of guidance alone, which fn is then given by itself.

        Raises:
            UnknownName: if nothing matches.
            ValueError: for an axis that the hook point does not have.
        """
        model = self._edited_model()
        arguments.function("fn", fn, "fn(activation, hook)")
        chosen, part, steps = select(name, self.names), Region.of(**region), checked_steps(steps)
        active, sizes = step_test(steps), model.cfg.axis_sizes()
        for each in chosen:
            part.check(each, model.sites[each], sizes)
        recorder = self._recorder
        editors = [
            Editor(within(fn, part, model.sites[each]), lambda: recorder.moment(active))
            for each in chosen
        ]
        self._noted(chosen[0], steps, part)
        for each, editor in zip(chosen, editors, strict=True):
            if self._undo is not None:
                self._attach(each, editor, self._undo)
            else:
                self._waiting.append((each, editor))
        return self

    def _noted(self, name: str, steps: Steps, part: Region) -> None:
        """At which steps an edit is asked for; all of them may not be what it reaches."""
        everywhere = any(each is None for _, each, _ in self._edit_steps)
        self._edit_steps.append((name, steps, part.branch))
        if steps is None and not everywhere and self._traced_model().shares_steps:
            warnings.warn(
                f"The edit at {name!r} acts in pipe.transformer only, and the pipeline computes "
                "its later steps with transformer_2; edit it there too, in "
                "dit_lens.trace(pipe.transformer_2).",
                stacklevel=3,
            )

    def patch(
        self,
        name: NamesFilter,
        source: Trace | Tensor | Callable[..., Tensor],
        steps: Steps = None,
        **region: Any,
    ) -> Trace:
        """Put other activations in place.

        Args:
            name: which hook points.
            source: another trace of one run, whose activations at the same step and branch of
                guidance are taken; a tensor of the activation's shape, or with one more axis in
                front, for the steps, of which a copy without gradients is kept; or a function
                fn(activation, hook).
            steps: at which steps.
            **region: which part, as for `edit`.

        Raises:
            UnknownName: if nothing matches.
            ValueError: for a trace of another model, or another shape.
            TypeError: for a source of another kind.
        """
        self._edited_model()
        if isinstance(source, Trace):
            mine, theirs = self.record.cfg, source.record.cfg
            if mine != theirs:
                raise InvalidValue(
                    f"The source trace is of another model: {theirs}; expected {mine}."
                )
            taken = read_branches(source.record, source.model, select(name, self.names))
            return self.edit(name, patch_from_steps(taken), steps, **region)
        if isinstance(source, Tensor):
            return self.edit(name, patch_from_tensor(source), steps, **region)
        if not callable(source):
            raise InvalidType(
                f"Can't patch from {arguments.shown(source)}; expected a trace, a tensor or a "
                "function fn(activation, hook)."
            )
        return self.edit(name, source, steps, **region)

    def ablate(
        self,
        name: NamesFilter,
        mode: Literal["zero", "mean", "resample"] = "zero",
        steps: Steps = None,
        **region: Any,
    ) -> Trace:
        """Knock activations out.

        Args:
            name: which hook points.
            mode: "zero"; "mean" over the batch; "resample", the activation of the item before (of
                the first item the last one's); the last two want several items, and take each
                branch of guidance by itself, where a pipeline or `sample` guides.
            steps: at which steps.
            **region: which part, as for `edit`.

        Raises:
            UnknownName: if nothing matches.
            ValueError: for an unknown mode; when run, for a batch of one item.
        """
        return self.edit(name, ablation(mode), steps, **region)

    def steer(
        self,
        name: NamesFilter,
        direction: Tensor,
        scale: float = 1.0,
        steps: Steps = None,
        **region: Any,
    ) -> Trace:
        """Add a direction to activations: `activation + scale * direction`.

        Chains. The direction is added as it is given: of length 1, `scale` is in the activation's
        own units. A copy is kept, through which no gradient flows: to learn a direction, use
        `edit(name, lambda a, hook: a + direction)`.

        Args:
            name: which hook points, such as ("resid_post", 12).
            direction: of the length of the activation's last axis, such as [d_model]; or any shape
                that broadcasts against the activation.
            scale: how much of it; negative ones turn it round.
            steps: at which steps.
            **region: which part, as for `edit`.

        Raises:
            UnknownName: if nothing matches.
            ValueError: for a direction of another length.

            t.steer(("resid_post", 12), smile / smile.norm(), scale=8.0, steps=range(10))
        """
        model = self._edited_model()
        along = arguments.tensor("direction", direction, finite=True).detach().clone()
        by, sizes = arguments.number("scale", scale), model.cfg.axis_sizes()
        for each in select(name, self.names):
            last = model.sites[each][-1]
            if along.ndim and along.shape[-1] not in (1, sizes.get(last, along.shape[-1])):
                raise InvalidValue(
                    f"direction has {along.shape[-1]} entries; expected {sizes[last]}, the length "
                    f"of the axis {last!r} of {each!r}."
                )
        return self.edit(name, Steering(along, by), steps, **region)

    def hold(
        self,
        name: NamesFilter,
        steps: Steps = None,
        lag: int = 1,
        order: Literal[0, 1] = 0,
        **region: Any,
    ) -> Trace:
        """Put in, for what is added at these steps, what was added at earlier ones.

        What is held may have been held itself: `steps=range(1, 16)` holds what step 0 added. Each
        branch of guidance is held from itself, in one batch or in calls of its own. An edit that is
        given before is part of what is held, one that is given after acts on what is put in.

        Args:
            name: what is held: hook points, such as "attn_out"; a block, "blocks.5", or all that it
                adds by its attention, "blocks.5.attn"; each block by itself, "blocks.*"; several
                blocks as one, "blocks.3:12", all of them, "blocks.:".
            steps: at which steps; the first ones have nothing to be held from.
            lag: from how many steps before.
            order: 0 for what was added `lag` steps before; 1 for the next point of the line through
                that and what was added `lag` steps before it.
            **region: which part of a hook point, as for `edit`.

        Raises:
            UnknownName: if nothing matches.
            ValueError: for steps that have nothing to be held from.
        """
        model = self._edited_model()
        lag = arguments.whole("lag", lag, 1, 1000)
        order = 1 if arguments.whole("order", order, 0, 1) else 0
        part, steps = Region.of(**region), checked_steps(steps)
        held = step_test(steps)
        check_steps(next(filter(held, range(2 * lag)), None), lag, order)
        places, sizes = held_places(name, self.names), model.cfg.axis_sizes()
        for place in places:
            part.check(place.name, model.sites[place.name], sizes)
        self._noted(places[0].name, steps, part)
        for place in places:
            axes = model.sites[place.name]
            hold = Hold(place, held, self._recorder.clock, lag, order, part, axes)
            for each, listener in hold.listeners:
                if self._undo is not None:
                    self._attach(each, listener, self._undo)
                else:
                    self._waiting.append((each, listener))
        return self

    def load_edits(self, path: str | Path) -> Trace:
        """Edits from a file, such as a repair that `dit_lens.experiments.diagnose` found, each at
        its own steps.

            with dit_lens.trace(pipe) as t:
                t.load_edits("repair.json")
                pipe(class_labels=[8], num_inference_steps=50)

        Args:
            path: of the file, `found.repair.save(path)`.

        Raises:
            MissingFile: if it is not there.
            InvalidValue: for a file that holds no edits, is damaged, or was made for another model;
                when run, for other timesteps than it was made for.
            UnknownName: for hook points that the model does not have.
        """
        model, recorder = self._edited_model(), self._recorder
        edits, times = edits_for(path, model.transformer, model.names)

        def at_its_time(fn: HookFunction) -> HookFunction:
            def edit(activation: Tensor, hook: HookPoint) -> Tensor | None:
                step, call = hook.step, recorder.call
                if call is not None and step == recorder.step and step < len(times):
                    now = float(call.t[0])
                    if abs(now - times[step]) > 1e-3 * max(1.0, abs(times[step])):
                        raise InvalidValue(
                            f"Step {step} is at timestep {now:g} here, and the edits of "
                            f"{str(path)!r} are for {times[step]:g}; expected a run of "
                            f"{len(times)} steps with the sampler that they were made for."
                        )
                return fn(activation, hook)

            return edit

        for each in edits:
            self.edit(each.name, at_its_time(each.fn(model.sites)), list(each.steps))
        return self

    # Reading.

    def __getitem__(self, key: Key) -> Tensor:
        name = resolve(key, self.names)
        return _stacked(name, read(self.record, self.model, [name])[name])

    def get(
        self, names: NamesFilter, steps: Steps = None, branch: str | None = None
    ) -> dict[str, Tensor]:
        """Several names at once, [step, batch, ...] each; what was not recorded shares one pass for
        each step.

        Args:
            names: which hook points.
            steps: which steps; by default those that were recorded.
            branch: only the items of one branch of guidance, "cond" or "uncond"; "skip" is the
                extra pass of skip-layer guidance.
        """
        found = self._read(names, steps, branch)
        return {name: _stacked(name, at) for name, at in found.items()}

    def stack(self, site: str, steps: Steps = None, branch: str | None = None) -> Tensor:
        """One site of every layer, [layer, step, batch, ...].

        Args:
            site: a hook point without its layer, such as "resid_post".
            steps: which steps; by default those that were recorded.
            branch: only the items of one branch of guidance, as for `get`.
        """
        if branch is not None:
            arguments.choice("branch", branch, ["cond", "uncond", "skip"])
        found_names = select(arguments.text("site", site), self.names)
        chosen = [n for n in found_names if layer_of(n) is not None]
        if not chosen:
            raise InvalidValue(f"site={site!r} is in no layer; expected one such as 'resid_post'.")
        whole = stacked(self.record, self.model, chosen, steps, branch)
        if whole is not None:
            return whole
        found = self._read(chosen, steps, branch)  # says what can't be stacked
        return torch.stack([_stacked(name, found[name]) for name in chosen])

    def read(
        self, names: NamesFilter, steps: Steps = None, branch: str | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """`{name: {step: activation}}`: as recorded where all of it was, recomputed otherwise.

        Args:
            names: which hook points.
            steps: which steps; by default those that were recorded.
            branch: only the items of one branch of guidance.
        """
        found = self._read(names, steps, branch)
        for at in found.values():
            for step, value in at.items():  # it may be the trace's own, or that of another name
                at[step] = value.clone()
        return found

    def _read(
        self, names: NamesFilter, steps: Steps = None, branch: str | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """The same without copies."""
        if branch is not None:
            arguments.choice("branch", branch, ["cond", "uncond", "skip"])
        return read(self.record, self.model, select(names, self.names), steps, branch)

    def attention_map(
        self,
        words: str | Sequence[str] | None = None,
        *,
        layers: Any = None,
        steps: Steps = None,
        heads: Any = None,
        over: Sequence[str] = ("layer", "step", "head"),
        prompt: str | None = None,
        branch: str = "cond",
    ) -> AttentionMap:
        """Where in the image its tokens attend to words of the prompt.

        The share of each image token's attention that goes to the word's tokens: summed over its
        sub-tokens, wherever it stands and in every text encoder. A pattern sums to 1 over all keys;
        in a joint attention these are the image's too. Padding, templates and marks are no words.

        Args:
            words: of the prompt: one, or several in a row, as "red fox"; a list of such; None is
                every word.
            layers: which layers; None is all with attention to the text.
            steps: which steps; None is those that were recorded.
            heads: which heads; None is all.
            over: what is averaged, of "layer", "step" and "head".
            prompt: what the text encoders were given, where it can't be known: a loop of your own,
                a trace out of a file.
            branch: of guidance.

        Returns:
            An `xr.DataArray` [word, layer, step, head, batch, frame, row, column], 0 to 1, without
            the axes that are averaged, `word` for one word and `frame` for images. The batch is
            those items whose prompt has all words, by number; attrs["prompts"] has a line for each
            prompt. Its `plot.words()` draws it.

        Raises:
            ValueError: for a model that is given no text, a word that is not in the prompt, or a
                prompt that is not known.
            RuntimeError: for a model without its tokenizers.

            t.attention_map(["red", "fox"], layers=range(10, 20)).plot.words()
        """
        return attention_map(
            self.record,
            self.model,
            words,
            layers=layers,
            steps=steps,
            heads=heads,
            over=over,
            prompt=prompt,
            branch=branch,
        )

    @property
    def names(self) -> list[str]:
        """Every hook name, in forward order."""
        return list(self.record.sites)

    @property
    def sites(self) -> dict[str, Axes]:
        """Every hook name with the names of its axes."""
        return self.record.sites

    @property
    def cfg(self) -> Config:
        """The model's sizes."""
        return self.record.cfg

    @property
    def exact(self) -> bool:
        """Whether all that was recomputed so far was so bit for bit, and not within rounding."""
        return self.record.exact

    @property
    def recorded_names(self) -> list[str]:
        """The names that are recorded as they happen."""
        return self.record.names

    @property
    def steps(self) -> list[int]:
        """The steps seen so far: of a replay those that were run again."""
        return sorted(self.record.calls_at)

    @property
    def timesteps(self) -> Tensor:
        """The diffusion timestep of each step, [step]; [step, batch] where the items of a step have
        different ones, as in a batch of training.
        """
        return timesteps(self.record, self.steps)

    @property
    def latents(self) -> Tensor:
        """What went into the model, x_t, [step, batch, *latent_shape]."""
        record = self.record
        found: dict[int, Tensor] = {}
        for s in self.steps:
            first = record.calls[record.calls_at[s][0]]
            if first.context.part is None:
                found[s] = first.x
            else:
                calls: dict[int, list[int] | None] = {c: None for c in record.calls_at[s]}
                x = torch.cat([record.calls[c].x for c in calls])
                order = order_of(record, calls)
                found[s] = x if order is None else x[order.to(x.device)]
        return over_steps("latents", found, "trace each run by itself")

    # Elsewhere.

    def to_xarray(self, names: NamesFilter = None, steps: Steps = None) -> xr.Dataset:
        """An `xarray.Dataset` with named axes: one variable a site, [layer, step, batch, ...].

        The coordinates are layer, step, timestep, log_snr, label, branch and twin. The last three
        are over [batch], and where they differ between steps, as in a second run, over [step,
        batch].

        Args:
            names: which hook points; by default those that were recorded.
            steps: which steps; by default those that were recorded.

        Raises:
            ValueError: if nothing was recorded and no names are given.
        """
        chosen = self.record.names if names is None else select(names, self.names)
        if not chosen:
            raise InvalidValue(
                "No names were recorded; say which to recompute: t.to_xarray('resid_post')."
            )
        return to_dataset(self.record, self._read(chosen, steps))

    def save(self, path: str | Path) -> Path:
        """Write inputs, records and what is needed to recompute into one safetensors file, which
        `dit_lens.load_trace(path, model)` reads.

        Args:
            path: the file; its folder is made.

        Returns:
            The path.

        Raises:
            RuntimeError: while the trace is open.
        """
        if self._undo is not None:
            raise InvalidState("The trace is still open; save it after the `with` block.")
        return files.save(self.record, arguments.path("path", path))

    def __reduce__(self) -> tuple[Any, ...]:
        raise InvalidState(
            "A trace can't be pickled, for it holds a model and its hooks; use trace.save(path) "
            "and dit_lens.load_trace(path, model)."
        )

    def __repr__(self) -> str:
        record = self.record
        tensors = {id(v): v for at in record.activations.values() for v in at.values()}
        tensors |= {id(v): v for call in record.calls for v in _tensors(call.inputs)}
        kept = sum(v.numel() * v.element_size() for v in tensors.values())
        state = "closed" if self._undo is None else "open"
        return (
            f"Trace({len(self.steps)} steps, {len(record.names)} names recorded, "
            f"{kept / 1e6:.1f} MB kept, {state})"
        )


def trace(
    model_or_pipe: Any,
    names: NamesFilter = None,
    steps: Steps = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    probes: Sequence[Observing] = (),
) -> Trace:
    """Watch everything that calls the transformer inside a `with` block.

        with dit_lens.trace(pipe) as t:
            pipe(class_labels=[207], num_inference_steps=50)
        t["resid_post", 5]                     # [step, batch, token, d_model]

    Args:
        model_or_pipe: a `HookedDiT`, a pipeline or a transformer; the last two are opened for the
            length of the block only.
        names: what to record as it happens; None records nothing and recomputes what is read.
        steps: which steps to record: an int, a slice, a range or a collection; None is all. In a
            loop of your own each call of the transformer is a step.
        device: where to keep records, such as "cpu"; None is where they are.
        dtype: as what to keep records, such as torch.float16; None is as they are.
        probes: `Probe` instances that observe.

    Raises:
        UnknownName: if `names` matches nothing.
        TypeError: if it is no DiT, or a probe is none.
        RuntimeError: in train mode, or in use by another thread.
    """
    steps = checked_steps(steps)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        wrong_type = not isinstance(dtype, torch.dtype)
        expected = "a floating-point dtype, such as torch.float16"
        raise arguments.refusal("dtype", dtype, expected, wrong_type=wrong_type)
    device = None if device is None else arguments.device("device", device)
    model = HookedDiT.of(model_or_pipe)
    try:
        model.require_eval()
        recorded = [] if names is None else select(names, model.names)
        record = Record(
            sites=model.sites,
            cfg=model.cfg,
            scheduler=None if model.family.read_only else model.scheduler,
            names=recorded,
            steps=steps,
            wanted=step_test(steps),
            device=device,
            dtype=dtype,
            activations={name: {} for name in recorded},
        )
        return Trace(model, record, probes)
    finally:
        if model is not model_or_pipe:
            model.close()  # until the `with` block


def observed(model: HookedDiT, probes: Sequence[Observing]) -> Trace:
    """A trace that only shows what it sees to probes, and keeps nothing: the run keeps itself.

    Args:
        model: the opened model.
        probes: `Probe` instances that observe.
    """
    found = trace(model, probes=probes)
    found.record.forgets = True
    return found


def load_trace(path: str | Path, model: Any = None) -> Trace:
    """Read a saved trace.

        t = dit_lens.load_trace(path)                  # what was recorded
        t = dit_lens.load_trace(path, model)           # and all else, recomputed and proven

    With the model everything can be recomputed, and all values are on its device; without, what was
    recorded can be read, on the CPU. Another model, or other weights, are noticed when something is
    recomputed.

    Args:
        path: a file written by `Trace.save`.
        model: the model that it came from, hooked or not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no trace, or a model of other sizes.
    """
    path = arguments.path("path", path)
    if model is None:
        return Trace(None, files.load(path))
    owner = HookedDiT.of(model)
    record = files.load(path, owner.device)
    theirs, ours = ({**vars(each.cfg), **each.sites} for each in (record, owner))
    differs = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
    if differs:
        name = differs[0]
        raise InvalidValue(
            f"{str(path)!r} was traced on another model, or one that was opened otherwise: its "
            f"{name} is {theirs.get(name, 'none')}, this one's {ours.get(name, 'none')}."
        )
    return Trace(owner, record)


def _stacked(name: str, at: dict[int, Tensor]) -> Tensor:
    return over_steps(name, at, "read one step at a time: t.get(name, steps=3)")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
