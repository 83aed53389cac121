"""The trace: a denoising run under observation.

A DiT's forward depends on nothing but its inputs, so a trace keeps those, a few KB a step, together
with the edits that were in force. Any activation at any step is recomputed when it is read, by one
forward that stops at the layer asked for, and is bit for bit what recording would have given.
Recording (`names=`) is for when many reads follow. What would make a recomputation wrong - weights
that changed since - is an error.

Each call of the transformer is one step, counted from 0; with guidance a step's batch is [cond |
uncond], as the pipeline made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidState, InvalidType, InvalidValue
from ..hooks.edits import Steps, ablation, patch_from_steps, patch_from_tensor, step_test, within
from ..hooks.names import Key, NamesFilter, layer_of, resolve, select
from ..hooks.points import Editor, HookFunction, HookPoint, Observer
from ..hooks.regions import Region
from ..model.call import Call, Copies
from ..model.fingerprint import fingerprint
from ..model.hooked import HookedDiT, transformer_of
from ..model.instrumentation import Handle, Instrumentation
from .probe import Probe, Site
from .recompute import read


class Trace:
    """What `dit_lens.trace` gives; open it with `with`, read it during the run or after.

    `t[name]` and `t["resid_post", 5]` are [step, batch, ...]; `t.stack("resid_post")` is [layer,
    step, batch, ...].

    Attributes:
        steps: the steps seen so far.
        timesteps: their diffusion timesteps.
        names: every hook name.
        probes: the probes that watch.
    """

    def __init__(
        self,
        model: HookedDiT,
        names: NamesFilter = None,
        steps: Steps = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        probes: Sequence[Probe] = (),
    ) -> None:
        self.model, self.device, self.dtype, self.probes = model, device, dtype, list(probes)
        self.names = model.names
        self.recorded_names = [] if names is None else select(names, model.names)
        self.recorded_steps, self.wanted_steps = steps, step_test(steps)
        self.calls: list[Call] = []
        # each step's calls: one, or one for each branch of guidance
        self.calls_at: list[list[int]] = []
        # by call
        self.records: dict[str, dict[int, Tensor]] = {name: {} for name in self.recorded_names}
        self._copies = Copies()
        self.weights: tuple[str, str] | None = None  # fingerprints on entering and on leaving
        self._open, self._current = False, 0
        self._handles: list[Handle] = []
        self._waiting: list[tuple[str, Editor]] = []
        self._edit_steps: list[tuple[str, Steps]] = []
        # of a loaded trace: where functions acted that a file can't hold
        self.lost_edits: list[str] = []
        for probe in self.probes:
            if not isinstance(probe, Probe):
                raise InvalidType(
                    f"{probe!r} is not a dit_lens.Probe; pass instances, as in "
                    "probes=[SpectralSplit()]."
                )

    # Opening and closing.

    def __enter__(self) -> Trace:
        if self._open or self.calls:
            raise InvalidState(
                "This trace was opened before; a trace watches one run. Call dit_lens.trace(model) "
                "again."
            )
        self.model._require_eval()
        # a pipeline or bare transformer is opened for the length of the block only
        if not self.model.instrumentation.installed:
            self.model.instrumentation, made = Instrumentation.of(self.model.transformer)
            self.model.instrumentation.temporary |= made
        self._before = fingerprint(self.model.transformer)
        self._open = True
        try:
            self.model.instrumentation.watch(self)
            for name, editor in self._waiting:
                self._attach(name, editor)
            for name in self.recorded_names:
                self._attach(name, Observer(self._record))
            for probe in self.probes:
                probe.start(self.model)
                for name in select(probe.names, self.names):
                    self._attach(name, Observer(_observation(probe, self)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.model.instrumentation.unwatch(self)
        self._open = False
        self._copies = Copies()  # lets go of the caller's tensors
        self.weights = (self._before, fingerprint(self.model.transformer))
        instrumentation = self.model.instrumentation
        # the last of the traces that share it
        if (
            instrumentation.temporary
            and not instrumentation.watchers
            and not instrumentation.listening
        ):
            instrumentation.remove()

        for name, steps in self._edit_steps:
            if self.calls and not any(map(step_test(steps), self.steps)):
                warnings.warn(
                    f"The edit at {name!r} for steps={steps!r} never acted: the run had "
                    f"{len(self.calls_at)} steps.",
                    stacklevel=2,
                )

    def _attach(self, name: str, listener: Any) -> None:
        self._handles.append(self.model.instrumentation.attach(name, listener))

    # Told by the instrumentation.

    def begin(self, call: Call) -> None:
        """A call is a step, unless its pipeline says that it is another branch of the step before."""
        same = call.place is not None and bool(self.calls) and self.calls[-1].place == call.place
        self._current = len(self.calls_at) - same
        self._call = call

    def end(self, call: Call, finished: bool) -> None:
        if not finished:  # a forward that failed is no step
            for record in self.records.values():
                record.pop(len(self.calls), None)
            return
        if self._current == len(self.calls_at):
            self.calls_at.append([])
        self.calls_at[-1].append(len(self.calls))
        self.calls.append(call.kept(self._copies))

    def _record(self, value: Tensor, point: HookPoint) -> None:
        if self.wanted_steps(self._current):
            self.records[point.name][len(self.calls)] = self._keep(value)

    def _keep(self, value: Tensor) -> Tensor:
        value = value.detach()
        return (
            value
            if self.device is None and self.dtype is None
            else value.to(self.device or value.device, self.dtype)
        )

    def site(self, name: str) -> Site:
        """Where the call under way is, for a probe."""
        return Site(name, self._current, self._call.grid, self._call, self.model.cfg.null_class)

    # Interventions.

    def edit(
        self, name: NamesFilter, fn: HookFunction, steps: Steps = None, **region: Any
    ) -> Trace:
        """Apply `fn(activation, hook)` at every hook point that `name` chooses, at these steps,
        inside this region.

        `hook.step` is the step. Region: `items`, `heads`, `tokens`, `band=(bands, b)`; see
        `dit_lens.hooks.regions.Region`. Chains: `t.edit(...).ablate(...)`. Raises UnknownName, or
        ValueError for an axis that the hook point does not have.
        """
        chosen, part, active = select(name, self.names), Region(**region), step_test(steps)
        for each in chosen:
            part.check(each, self.model.sites[each])
        self._edit_steps.append((chosen[0], steps))
        for each in chosen:
            editor = Editor(
                within(fn, part, self.model.sites[each]),
                lambda: (active(self._current), self._current),
            )
            if self._open:
                self._attach(each, editor)
            else:
                self._waiting.append((each, editor))
        return self

    def patch(
        self,
        name: NamesFilter,
        source: Trace | Tensor | Callable[..., Tensor],
        steps: Steps = None,
        **region: Any,
    ) -> Trace:
        """Put other activations in place: of another trace at the same step, a tensor, or what a
        callable returns.

        A tensor has the activation's shape, or one more axis in front, for the steps. Raises
        ValueError for traces of other models or shapes.
        """
        if isinstance(source, Trace):
            mine, theirs = self.model.cfg, source.model.cfg
            if mine != theirs:
                raise InvalidValue(
                    f"The source trace is of another model: {theirs}; expected {mine}."
                )
            return self.edit(
                name, patch_from_steps(source.read(select(name, self.names))), steps, **region
            )
        if isinstance(source, Tensor):
            return self.edit(name, patch_from_tensor(source), steps, **region)
        if not callable(source):
            raise InvalidType(
                f"Can't patch from {source!r}; expected a trace, a tensor or a function "
                "fn(activation, hook)."
            )
        return self.edit(name, source, steps, **region)

    def ablate(
        self,
        name: NamesFilter,
        mode: Literal["zero", "mean", "resample"] = "zero",
        steps: Steps = None,
        **region: Any,
    ) -> Trace:
        """Knock out: with zeros, the mean over the batch, or the next item's activation (resample)."""
        return self.edit(name, ablation(mode), steps, **region)

    # Reading.

    def __getitem__(self, key: Key) -> Tensor:
        name = resolve(key, self.names)
        return _stacked(name, self.read([name])[name])

    def get(
        self, names: NamesFilter, steps: Steps = None, branch: str | None = None
    ) -> dict[str, Tensor]:
        """Several names at once, [step, batch, ...] each; what was not recorded shares one pass for
        each step.

        `branch`: only the items of one branch of guidance, "cond" or "uncond"; "skip" is the extra
        pass of skip-layer guidance.
        """
        read = self.read(select(names, self.names), steps, branch)
        return {name: _stacked(name, at) for name, at in read.items()}

    def stack(self, site: str, steps: Steps = None) -> Tensor:
        """One site of every layer, [layer, step, batch, ...]."""
        chosen = [n for n in select(site, self.names) if layer_of(n) is not None]
        read = self.read(chosen, steps)
        return torch.stack([_stacked(name, read[name]) for name in chosen])

    def read(
        self, names: Sequence[str], steps: Steps = None, branch: str | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """`{name: {step: activation}}` of full names: as recorded where all of it was, recomputed
        otherwise.
        """
        return read(self, names, steps, branch)

    def _check_weights(self) -> None:
        now = fingerprint(self.model.transformer)
        if now != self._before or (self.weights is not None and self.weights[1] != self._before):
            raise InvalidState(
                "The model's weights have changed since this trace began, so what was not recorded "
                "can't be recomputed; "
                "trace again, with names= for what you will read."
            )

    @property
    def steps(self) -> range:
        return range(len(self.calls_at))

    @property
    def timesteps(self) -> Tensor:
        """The diffusion timestep of each step, [step]."""
        return (
            torch.stack([self.calls[c[0]].t[0] for c in self.calls_at])
            if self.calls
            else torch.zeros(0)
        )

    @property
    def latents(self) -> Tensor:
        """What went into the model, x_t, [step, batch, *latent_shape]."""
        return torch.stack([self.calls[c[0]].x for c in self.calls_at])

    # Elsewhere.

    def to_xarray(self, names: NamesFilter = None, steps: Steps = None) -> Any:
        """An `xarray.Dataset` with named axes and coordinates; by default what was recorded.

        See `dit_lens.tracing.files`.
        """
        from .files import to_xarray

        return to_xarray(self, names, steps)

    def save(self, path: str | Path) -> Path:
        """Write inputs, records and what is needed to recompute into one safetensors file."""
        from .files import save

        return save(self, path)

    def __repr__(self) -> str:
        tensors = {id(v): v for r in self.records.values() for v in r.values()}
        tensors |= {id(v): v for c in self.calls for v in _tensors(c.inputs)}
        kept = sum(v.numel() * v.element_size() for v in tensors.values())
        state = "open" if self._open else "closed"
        return f"Trace({len(self.calls_at)} steps, {len(self.recorded_names)} names recorded, {kept / 1e6:.1f} MB kept, {state})"


def trace(
    model_or_pipe: Any,
    names: NamesFilter = None,
    steps: Steps = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    probes: Sequence[Probe] = (),
) -> Trace:
    """Watch everything that calls the transformer inside a `with` block.

        with dit_lens.trace(pipe) as t:
            pipe(class_labels=[207], num_inference_steps=50)
        t["resid_post", 5]                                     # [step, batch, token, d_model]

    Args:
        model_or_pipe: a `HookedDiT`, a pipeline or a transformer; the last two are opened for the
            length of the block only.
        names: what to record as it happens; None records nothing and recomputes what is read.
        steps: which steps to record: an int, a slice, a range or a collection; None is all.
        device, dtype: where and how to keep records, for example "cpu" and torch.float16.
        probes: `Probe` instances that observe.

    Raises UnknownName, TypeError (not a DiT), RuntimeError (train mode, in use by another thread).
    """
    if isinstance(model_or_pipe, HookedDiT):
        return Trace(model_or_pipe, names, steps, device, dtype, probes)
    instrumentation, made = Instrumentation.of(transformer_of(model_or_pipe))
    temporary = made or instrumentation.temporary
    model = HookedDiT(model_or_pipe)
    instrumentation.temporary = temporary
    try:
        model._require_eval()
        return Trace(model, names, steps, device, dtype, probes)
    finally:
        if made:  # until the `with` block
            instrumentation.remove()


def load_trace(path: str | Path, model: Any = None) -> Any:
    """A saved trace; see `dit_lens.tracing.files.load_trace`."""
    from .files import load_trace as load

    return load(path, model)


def _observation(probe: Probe, trace: Trace) -> Callable[[Tensor, HookPoint], None]:
    return lambda value, point: probe.observe(value.detach(), trace.site(point.name))


def _stacked(name: str, at: dict[int, Tensor]) -> Tensor:
    shapes = {tuple(v.shape) for v in at.values()}
    if len(shapes) > 1:
        raise InvalidValue(
            f"{name!r} has different shapes at different steps "
            f"({', '.join(map(str, sorted(shapes)))}); "
            "read one step at a time: t.get(name, steps=3)."
        )
    return torch.stack([at[s] for s in sorted(at)])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
