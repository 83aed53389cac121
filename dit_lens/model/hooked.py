"""The hooked DiT: a diffusers transformer that answers to TransformerLens's names and methods."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidType, InvalidValue
from ..families.adapter import Adapter
from ..families.config import Condition, Size
from ..families.offloading import computing_device
from ..hooks.cache import ActivationCache, Caching
from ..hooks.names import NamesFilter, by_site, resolve, select
from ..hooks.points import (
    BackwardEditor,
    Editor,
    HookFunction,
    HookPoint,
    Listener,
    Observer,
    StopForward,
    pairs_of,
    takes_hook_by_keyword,
)
from ..pictures import notebook
from ..pieces.content import Tell, part_text
from ..pieces.kept import USUAL
from .conditions import Conditions
from .instrumentation import Handle, Instrumentation
from .kernels import Kernels
from .noise_schedule import predict_x0
from .partial import StoppedAtLayer
from .state import State
from .taken import Taken
from .trajectories import checked_place

Hooks = Sequence[tuple[NamesFilter, HookFunction]]


class HookedDiT:
    """A pipeline's transformer, or a bare one, with TransformerLens's hook points in it.

    The model is opened in place: your pipeline goes on working, through the same weights, and its
    output stays bit for bit what it was. `remove()` takes everything out again; leaving
    `with HookedDiT(pipe) as model` takes this view's hooks off, and if it was the only view, the
    hook points out.

        model = dit_lens.HookedDiT(pipe)                # or its transformer
        out, cache = model.run_with_cache(x, t, y)      # every activation, by name
        cache["resid_post", 5]                          # [batch, token, d_model]
        out = model.run_with_hooks(                     # the output without layer 5's attention
            x, t, y, fwd_hooks=[("blocks.5.hook_attn_out", lambda a, hook: 0 * a)]
        )
        with model.hooks([...]): ...                    # hooks for the length of a block
        out = model(x, t, y, start_at_layer=3)          # x is the residual stream there
        model.remove()                                  # the pipeline is what it was

    docs/families.md lists the transformers that can be opened.

    `x` are latents [batch, *model.cfg.latent_shape], unpacked; `t` is [batch], in the scheduler's
    units. `y` is the condition: labels [batch] (classes; for models that are given text, prompts in
    words or by number, see `model.conditions`), `model.cfg.null_class` for none; or a dict of the
    transformer's own further arguments. Wrapping a model twice gives two views of the same hook
    points. They stay until `remove()`, or until nobody holds a view any longer; so do a view's own
    hooks (`add_hook`), for as long as somebody holds it or their handles.

    Attributes:
        transformer: the wrapped module.
        cfg: its sizes (`n_layers`, `d_model`, `n_heads`, `d_head`, `grid`, `null_class`, ...).
        names: every hook name, in forward order.
        sites: the same with the names of the axes.
        scheduler: the pipeline's, or what `dit_lens.load` found, or None.
        vae: the same.
        conditions: what it can be asked for, by number.
        trajectories: where runs keep theirs; None is where the model computes.

    Args:
        pipe_or_transformer: a diffusers pipeline, its transformer, or a `HookedDiT`.
        scheduler: in place of the pipeline's.
        vae: in place of the pipeline's.
        size: (height, width) of the latents that are sampled, for video (frames, height, width); by
            default the model's own.
        blocks: for a transformer of your own (docs/own-models.md), the path of its blocks, such as
            "blocks", or several in the order in which they run.
        parts: paths within a block by the names that they get, such as {"attn": "attn"}; by default
            what is clearly its attention and MLP.
        adapter: how it is called, a `dit_lens.Adapter`; without it only a loop of yours calls it.
        trajectories: where runs keep their latents, x0 and outputs: by default where the model
            computes; "cpu" is the host's memory, a folder is for temporary files in it.

    Raises:
        TypeError: if there is no family for the model (a U-Net), with the ways on.
        RuntimeError: if it is compiled or wrapped by another tool.
        ValueError: if a feature is switched on that a hooked forward can't honour, or the weights
            are missing or quantised.
    """

    def __init__(
        self,
        pipe_or_transformer: Any,
        scheduler: Any = None,
        vae: Any = None,
        size: Size | None = None,
        blocks: str | Sequence[str] | None = None,
        parts: Mapping[str, str] | None = None,
        adapter: Adapter | None = None,
        trajectories: str | Path | None = None,
    ) -> None:
        arguments.require_cpu_by_default()
        pipe, self.trajectories = pipe_or_transformer, checked_place(trajectories)
        conditions: Conditions | None = None
        if isinstance(pipe, HookedDiT):
            conditions, size = pipe.conditions, pipe.size if size is None else size
            self.trajectories = self.trajectories or pipe.trajectories
            scheduler, vae, pipe = scheduler or pipe.scheduler, vae or pipe.vae, pipe.transformer
        self.transformer: Any = transformer_of(pipe)
        if any(given is not None for given in (blocks, parts, adapter)):
            Instrumentation.describe(self.transformer, blocks, parts, adapter)
        taken = Taken()
        try:
            self._open(taken)
            self._describe(pipe, conditions, scheduler, vae, size)
            taken.keep(None)
        except BaseException:
            taken.close()
            raise

    def _open(self, taken: Taken) -> None:
        """Look at the transformer's hook points, made if need be, for as long as this lives."""
        self.place = object()
        taken.undo(Instrumentation.let_go, self.transformer, self.place)
        self.instrumentation = Instrumentation.of(self.transformer, self.place)
        for _ in range(2):  # twice, as all that gives something back
            dropped = weakref.finalize(self, _dropped, weakref.ref(self.transformer), self.place)
            dropped.atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled view looks at its own copy of the model."""
        parts = (self.transformer, self.scheduler, self.vae, self.conditions, self.size)
        return _reopened, (type(self), *parts, self.trajectories)

    def close(self) -> None:
        """Look no more: this view's hooks are taken off, and the hook points out, unless somebody
        else looks at them too.
        """
        Instrumentation.let_go(self.transformer, self.place)

    def _describe(
        self, pipe: Any, conditions: Conditions | None, scheduler: Any, vae: Any, size: Size | None
    ) -> None:
        self.scheduler: Any = (
            scheduler if scheduler is not None else getattr(pipe, "scheduler", None)
        )
        self.vae: Any = vae if vae is not None else getattr(pipe, "vae", None)
        self.family = self.instrumentation.family
        self.instrumentation.count_time(self.scheduler, self.place)
        if size is not None:
            size = _checked_size(size, axes=len(self.family.config(self.transformer).grid))
        self.size: Size | None = size
        self.cfg = self.family.config(self.transformer, size)
        self.conditions: Conditions = conditions or Conditions(
            self.family, self.cfg, pipe if pipe is not self.transformer else None
        )
        if self.family.empty is not None:
            self.conditions.add({"": self.family.empty})
        self.sites = self.instrumentation.sites
        self.names = list(self.sites)

    @classmethod
    def of(cls, model: Any) -> HookedDiT:
        """The model itself if it is hooked already; otherwise opened.

        Args:
            model: a `HookedDiT`, a pipeline or a transformer.
        """
        return model if isinstance(model, HookedDiT) else cls(model)

    @classmethod
    @contextmanager
    def opening(cls, model: Any) -> Iterator[HookedDiT]:
        """The same for a `with` block; if that fails, what was opened for it is closed again.

        Args:
            model: a `HookedDiT`, a pipeline or a transformer.
        """
        found = cls.of(model)
        try:
            yield found
        except BaseException:
            if found is not model:
                found.close()
            raise

    # Running.

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        y: Any,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """The model's output [batch, *latent_shape], as its scheduler takes it (eps, v, ...).

        Args:
            x: latents [batch, *latent_shape], unpacked; with `start_at_layer` the residual stream
                [batch, token, d_model] that enters that block.
            t: timesteps [batch], in the scheduler's units.
            y: the condition.
            start_at_layer: the first block that is run; negative ones count from the end.
            stop_at_layer: the first block that is not run: the stream that would enter it is
                returned, as in TransformerLens.
        """
        self.require_installed()
        start = self._layer("start_at_layer", start_at_layer)
        stop = self._layer("stop_at_layer", stop_at_layer)
        if start is not None and stop is not None and stop < start:
            expected = f"one of {start} to {self.cfg.n_layers}, from start_at_layer={start} on"
            raise arguments.refusal("stop_at_layer", stop_at_layer, expected)
        if not arguments.tensor("x", x).ndim:
            raise arguments.refusal("x", x, "a batch")
        stream = None
        if start is not None:
            self._check_restart(x, start)
            stream, x = x, self._blank(x)
        condition = self._condition(y, x)
        beside = [
            name for name, value in condition.items() if "controlnet" in name and value is not None
        ]
        if beside and start is not None:
            raise InvalidValue(
                f"start_at_layer={start} can't be done with {beside[0]}, which diffusers adds "
                "between the blocks; expected a whole pass."
            )
        inputs = self.family.inputs(self.transformer, x, t, condition)
        if stream is not None and stop == start:
            return stream.clone()  # no block runs
        with (
            self.instrumentation.part((start, stop), stream),
            self.instrumentation.under(labels=condition.labels),
        ):
            try:
                answer = self.family.call(self.transformer, inputs)
            except StoppedAtLayer as halted:
                return halted.stream.clone()  # a record may hold the stream itself
        return self.family.output(self.transformer, answer, inputs)

    def _condition(self, y: Any, x: Tensor) -> Condition:
        if isinstance(y, dict):
            for name in y:
                arguments.text("y: the name of an argument", name)
            return y if isinstance(y, Condition) else Condition(y)
        if self.cfg.n_classes:
            if y is not None and not isinstance(y, Tensor):
                y = self.conditions.numbers(y, x.device)
            elif y is not None:
                self.family.check_labels(y, len(x), self.conditions.numbers)
            return Condition({self.family.labels_name: y})
        if not self.cfg.latent_shape and not self.family.read_only:
            raise InvalidValue(
                f"What {type(self.transformer).__name__} takes besides x_t and the time is not "
                "known; expected a dict of its further arguments, such as {'y': labels}, or "
                "HookedDiT(module, ..., adapter=dit_lens.Adapter(latents=..., labels=...)) (docs: "
                "Your own model)."
            )
        if y is None:
            raise InvalidValue(
                f"The condition is None; {type(self.transformer).__name__} expects prompts, in "
                "words or by number ('' or -1 for none), "
                "or a dict of its own further arguments."
            )
        # on the CPU: offloaded weights have no device to put them on
        labels = self.conditions.numbers(y)
        if len(labels) != len(x):
            raise InvalidValue(
                f"There are {len(labels)} prompts for a batch of {len(x)}; expected one for each "
                "item."
            )
        return self.conditions.of(labels)

    def _check_restart(self, x: Tensor, start: int) -> None:
        if x.ndim != 3 or x.shape[2] != self.cfg.d_model:
            raise InvalidValue(
                f"start_at_layer={start} takes the residual stream [batch, token, "
                f"{self.cfg.d_model}] in place of "
                f"latents, not shape {list(x.shape)}."
            )
        if not self.cfg.restartable and start != self.cfg.n_layers:
            raise InvalidValue(
                f"start_at_layer={start} can't be done with {type(self.transformer).__name__}, "
                "whose blocks are given more than the "
                "image's residual stream; expected a whole pass, with an edit at "
                "blocks.{i}.hook_resid_pre."
            )

    def _blank(self, stream: Tensor) -> Tensor:
        """Latents of the stream's grid, whose values do not matter."""
        shape, tokens = list(self.cfg.latent_shape), stream.shape[1]
        side = int(tokens**0.5)
        if tokens != self.cfg.tokens and len(self.cfg.grid) == 2 and side * side == tokens:
            p = self.cfg.pixels[0] // self.cfg.grid[0]
            shape[-2:] = side * p, side * p
        elif tokens != self.cfg.tokens:
            raise InvalidValue(
                f"The stream has {tokens} tokens; expected {self.cfg.tokens}, of the "
                f"{'x'.join(map(str, self.cfg.grid))} grid, or a square."
            )
        return stream.new_zeros(len(stream), *shape)

    def run_with_hooks(
        self,
        x: Tensor,
        t: Tensor,
        y: Any,
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        **span: int | None,
    ) -> Tensor:
        """One forward with temporary hooks.

        Args:
            x: latents, as for a call.
            t: timesteps, as for a call.
            y: the condition, as for a call.
            fwd_hooks: (names, fn(activation, hook)); what fn returns, if anything, goes on.
            bwd_hooks: (names, fn(gradient, hook)); to call backward, use `with model.hooks(...)`.
            **span: `start_at_layer`, `stop_at_layer`.

        >>> import dit_lens, torch; model = dit_lens.load("digits")
        >>> x, t, y = torch.zeros(1, 1, 16, 16), torch.tensor([9]), torch.tensor([3])
        >>> zero = lambda activation, hook: 0 * activation
        >>> model.run_with_hooks(x, t, y, fwd_hooks=[("attn_out", zero)]).shape
        torch.Size([1, 1, 16, 16])
        """
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(x, t, y, **span)

    def run_with_cache(
        self,
        x: Tensor,
        t: Tensor,
        y: Any,
        *,
        names_filter: NamesFilter = None,
        device: str | torch.device | None = None,
        **span: int | None,
    ) -> tuple[Tensor, ActivationCache]:
        """The output, and activations by name; gradients flow through both where they are on.

        Args:
            x: latents, as for a call.
            t: timesteps, as for a call.
            y: the condition, as for a call.
            names_filter: which hook points; None is all.
            device: where activations are kept; None is where they are.
            **span: `start_at_layer`, `stop_at_layer`.

        Raises:
            UnknownName: if the filter matches nothing.

        >>> import dit_lens, torch; model = dit_lens.load("digits")
        >>> x, t, y = torch.zeros(1, 1, 16, 16), torch.tensor([9]), torch.tensor([3])
        >>> model.run_with_cache(x, t, y, names_filter="resid_post")[1]["resid_post", 5].shape
        torch.Size([1, 64, 64])
        """
        names, kept = select(names_filter, self.names), Caching(device)
        with self.observing(names, kept.keep):
            out = self(x, t, y, **span)
        found = kept.values()
        in_order = {name: found[name] for name in names if name in found}
        return out, ActivationCache(in_order, self.cfg.n_layers)

    def activations(
        self, x: Tensor, t: Tensor, y: Any, names_filter: NamesFilter
    ) -> ActivationCache:
        """Like `run_with_cache` without the output: the pass ends at the last layer asked for.

        Args:
            x: latents [batch, *latent_shape].
            t: timesteps [batch].
            y: the condition, as for a call.
            names_filter: what to keep.
        """
        names = select(names_filter, self.names)
        kept = Caching()
        with self.observing(names, kept.keep), suppress(StopForward):
            with self.attached(self.instrumentation.stopping(names[-1])):  # after `keep`
                self(x, t, y)
        return ActivationCache(kept.values(), self.cfg.n_layers)

    def without_variance(self, output: Tensor) -> Tensor:
        """A model's output without the variance that some models predict in a second half of the
        channels, [batch, in_channels, ...].

        Args:
            output: what the model answered, [batch, out_channels, ...].
        """
        return output[:, : self.cfg.in_channels] if self.cfg.learned_sigma else output

    def predict_x0(self, output: Tensor, x: Tensor, t: Tensor, scheduler: Any = None) -> Tensor:
        """The clean latents that an output stands for, by the scheduler's prediction type.

        Args:
            output: what the model answered at x_t, or `unembed` gave, [batch, out_channels, ...].
            x: x_t, [batch, *latent_shape].
            t: timesteps, [batch] or a single one, in the scheduler's units.
            scheduler: of the run, such as `run.scheduler`; by default the model's own.

        Raises:
            ValueError: if there is no scheduler, or one of unknown prediction type.

        >>> import dit_lens, torch; model = dit_lens.load("digits"); x = torch.zeros(1, 1, 16, 16)
        >>> t = torch.tensor([500]); model.predict_x0(model(x, t, torch.tensor([3])), x, t).shape
        torch.Size([1, 1, 16, 16])
        """
        used = self.scheduler if scheduler is None else scheduler
        if used is None:
            raise InvalidValue(
                "The model has no scheduler, so x0 is unknown; give one: "
                "HookedDiT(transformer, scheduler=...), or scheduler/ in the model's folder."
            )
        if isinstance(used, type) or not hasattr(used, "config"):
            raise arguments.refusal("scheduler", scheduler, "a scheduler of diffusers, or None")
        arguments.tensor("x", x)
        arguments.tensor("output", output, (*x.shape[:1], None, *x.shape[2:]))
        return predict_x0(used, x, self.without_variance(output), t)

    def unembed(self, stream: Tensor, t: Tensor, y: Any) -> Tensor:
        """A residual stream read by the last layer: the lens.

        Fires no hooks, so that probes can use it in the middle of a forward. At the last layer's
        `resid_post` it is the model's output.

        Args:
            stream: [batch, token, d_model].
            t: timesteps [batch] of the conditioning.
            y: the condition, as for a call.

        Returns:
            What the model would have answered, [batch, out_channels, ...].

        Raises:
            RuntimeError: for a model that is opened read-only.
        """
        self.require_installed()
        if self.family.read_only:
            raise InvalidState(
                f"{type(self.transformer).__name__} is opened read-only, and its streams can't be "
                "read by its last layer; expected a model "
                "with a family of its own."
            )
        now = self.instrumentation.now
        x = None if now is None else self.family.latents(self.transformer, now)
        if x is None or len(x) != len(stream):
            x = self._blank(stream)
        return self.instrumentation.unembed(
            stream, self.family.inputs(self.transformer, x, t, self._condition(y, x))
        )

    # Hooks.

    def add_hook(
        self, name: NamesFilter, fn: HookFunction, dir: Literal["fwd", "bwd"] = "fwd"
    ) -> list[Handle]:
        """Attach a hook until `reset_hooks()`, or until the returned handles are removed.

        Args:
            name: which hook points.
            fn: fn(activation, hook), or fn(gradient, hook); what it returns, if anything, goes on.
            dir: "fwd" or "bwd".
        """
        arguments.choice("dir", dir, ["fwd", "bwd"])
        arguments.function("fn", fn, "fn(activation, hook)")
        make = Editor if dir == "fwd" else BackwardEditor
        wanted = [(each, make(fn)) for each in select(name, self.names)]
        taken = Taken()
        try:
            handles = [self._attach(each, listener, taken) for each, listener in wanted]
            for handle in handles:
                handle.view = self
            self.instrumentation.owned.setdefault(self.place, []).extend(wanted)
            return taken.keep(handles)
        except BaseException:
            taken.close()
            raise

    def _attach(self, name: str, listener: Listener, taken: Taken) -> Handle:
        taken.undo(self.instrumentation.detach, name, listener)
        return self.instrumentation.attach(name, listener)

    def reset_hooks(self) -> None:
        """Remove the hooks that `add_hook` of this object added, and no one else's."""
        self.instrumentation.drop_hooks(self.place)

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[HookedDiT]:
        """Hooks for the length of a `with` block, taken off again whatever happens in it.

        Args:
            fwd_hooks: (names, fn(activation, hook)).
            bwd_hooks: (names, fn(gradient, hook)).
        """
        wanted: list[tuple[str, Listener]] = []
        for make, hooks in ((Editor, fwd_hooks), (BackwardEditor, bwd_hooks)):
            for names, fn in pairs_of("hooks", hooks):
                wanted += [(name, make(fn)) for name in select(names, self.names)]
        with self.attached(wanted):
            yield self

    @contextmanager
    def observing(self, names: NamesFilter, fn: HookFunction) -> Iterator[HookedDiT]:
        """Call `fn(activation, hook)` at these hook points inside a `with` block, changing nothing.

        Unlike a hook function, `fn` is given the live tensor and no copy: read it, and neither keep
        nor change it. It sees the value after all edits.

        Args:
            names: which hook points.
            fn: what is called there.

        >>> import dit_lens, torch; model = dit_lens.load("digits"); seen = []
        >>> with model.observing("resid_post", lambda a, hook: seen.append(hook.layer())):
        ...     _ = model(torch.zeros(1, 1, 16, 16), torch.tensor([9]), torch.tensor([3]))
        >>> len(seen)
        28
        """
        arguments.function("fn", fn, "fn(activation, hook)")
        by_keyword = takes_hook_by_keyword(fn)

        def see(value: Tensor, point: HookPoint) -> None:
            fn(value, hook=point) if by_keyword else fn(value, point)

        with self.attached([(name, Observer(see)) for name in select(names, self.names)]):
            yield self

    @contextmanager
    def attached(self, listeners: Sequence[tuple[str, Listener]]) -> Iterator[None]:
        """Listeners for the length of a `with` block.

        Args:
            listeners: (hook name, listener).
        """
        self.require_eval()
        block = object()
        with Taken() as taken:
            taken.undo(self.instrumentation.blocks.discard, block)
            self.instrumentation.blocks.add(block)
            for name, listener in listeners:
                self._attach(name, listener, taken)
            yield

    @property
    def absent(self) -> list[str]:
        """The names of a DiT that this model has not, where it could only be opened read-only
        (docs/families.md); otherwise none.
        """
        return self.family.absent(self.transformer)

    @property
    def shares_steps(self) -> bool:
        """Whether the pipeline computes some of its steps with a second transformer, which is not
        opened with this one.
        """
        return self.family.shares_steps(self.transformer, self.conditions.pipe)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """TransformerLens's name for the hook points by name."""
        return self.instrumentation.points

    def resolve(self, *key: Any) -> str:
        """The full name that a shorthand stands for: `model.resolve("q", 5)`.

        Args:
            *key: a name, or a shorthand and its layer.
        """
        return resolve(key[0] if len(key) == 1 else key, self.names)

    # The wrapped module.

    def remove(self) -> None:
        """Take every hook point out, also from under other views: the wrapped model is bit for bit
        what it was.

        Raises:
            RuntimeError: while a trace of it is open, a plan on it, or a block of `hooks`.
        """
        if self.instrumentation.watchers or self.instrumentation.blocks:
            raise InvalidState(
                "A trace of this model is open, a plan on it, or a block of hooks, which would end "
                "unseen; leave its `with` block, then call remove()."
            )
        if self.instrumentation.installed:
            self.instrumentation.remove()

    def __enter__(self) -> HookedDiT:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is one more that looks at its own copy of the transformer."""
        self.__dict__ |= state
        taken = Taken()
        self._open(taken)
        taken.keep(None)

    @property
    def kernels(self) -> str:
        """What is chosen here of the settings that a run's numbers depend on, in words: autocast,
        attention, precision, the default dtype.
        """
        text, dtype = Kernels.of_sampling(self.device).text, torch.get_default_dtype()
        if dtype == torch.float32:
            return text
        odd = f"default dtype {str(dtype).removeprefix('torch.')}"
        return odd if text == USUAL else f"{text}, {odd}"

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its weights are, or where accelerate loads them to."""
        return computing_device(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, but for those that diffusers keeps in float32."""
        # diffusers' own `dtype` walks through all modules, and this is asked at every step
        kept = getattr(self.transformer, "_keep_in_fp32_modules", None) or ()
        named = self.transformer.named_parameters()
        own = (p.dtype for name, p in named if not any(part in name for part in kept))
        return next(own, torch.float32)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The wrapped module's parameters."""
        return iter(self.transformer.parameters())

    def to(self, *args: Any, **kwargs: Any) -> HookedDiT:
        """Move or cast the wrapped module, in place.

        Args:
            *args: as for `torch.nn.Module.to`.
            **kwargs: as for `torch.nn.Module.to`.
        """
        self.transformer.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        c = self.cfg
        if self.family.read_only:
            return (
                f"HookedDiT({type(self.transformer).__name__}, read-only: {c.n_layers} layers, "
                f"{len(self.names)} hook points; "
                f"{len(self.absent)} standard names are absent: model.absent)"
            )
        if not c.grid:
            return (
                f"HookedDiT({type(self.transformer).__name__}, {c.n_layers} layers, "
                f"{len(self.names)} hook points on the boundaries of its modules)"
            )
        return (
            f"HookedDiT({type(self.transformer).__name__}, {c.n_layers} layers, d_model "
            f"{c.d_model}, {f'{c.n_heads} heads, ' if c.n_heads else ''}"
            f"{'x'.join(map(str, c.grid))} tokens, {len(self.names)} hook points)"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the hook points too, the same one of every layer in one row."""
        rows = [
            (row, f"[{', '.join(self.sites[names[0]])}]", f"{len(names)} layers" * (len(names) > 1))
            for row, names in by_site(self.names).items()
        ]
        points = notebook.table("hook points", ("name", "axes", "of"), rows)
        return notebook.shown(repr(self), points)

    def _layer(self, name: str, layer: int | None) -> int | None:
        n = self.cfg.n_layers
        if layer is None:
            return None
        layer = arguments.whole(name, layer, -n, n)
        return layer + n if layer < 0 else layer

    def require_eval(self) -> None:
        """Raise RuntimeError if the model is in train mode, where labels are dropped at random."""
        if self.transformer.training:
            raise InvalidState(
                "The model is in train mode, where diffusers drops class labels at random; call "
                "model.eval() first."
            )

    def require_bare(self) -> None:
        """Raise InvalidState while hooks are on, which a store of pieces can't tell."""
        busy = self.instrumentation.busy
        if busy or State.of(self.transformer).hooks:
            what = "hooks or a trace" if busy else "module hooks"
            raise InvalidState(
                f"The model has {what} on, and a store of pieces can't tell what they do; take "
                "them off, or measure without a store and in this process."
            )

    def require_installed(self) -> None:
        """Raise RuntimeError if the hook points were taken out."""
        if not self.instrumentation.installed:
            raise InvalidState(
                "This model's hook points were removed; wrap it again with dit_lens.HookedDiT(...)."
            )


def _reopened(
    kind: type[HookedDiT],
    transformer: Any,
    scheduler: Any,
    vae: Any,
    conditions: Conditions,
    size: Size | None,
    trajectories: str | None,
) -> HookedDiT:
    """A copied or unpickled view."""
    made = kind(transformer, scheduler=scheduler, vae=vae, size=size, trajectories=trajectories)
    made.conditions = conditions
    return made


@part_text.register(HookedDiT)
def _content(model: HookedDiT, tell: Tell) -> str:
    """What a model computes, for stores of pieces: weights, configuration, adapters, scheduler."""
    model.require_bare()
    state = State.of(model.transformer)
    caches = [
        (name, {k: v for k, v in vars(hook).items() if isinstance(v, (bool, int, float, str))})
        for module in model.transformer.modules()
        for name, hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).items()
    ]
    parts = [model.transformer, state.adapters, caches, model.scheduler, model.vae]
    asked = model.conditions
    described = model.family.described  # which modules are blocks, and how it is called
    texts = [asked.prompts, asked.given, asked.encoders()]
    return f"HookedDiT{tell([*parts, model.size, *texts, described])}"


def _dropped(transformer: weakref.ref[nn.Module], place: object) -> None:
    """Nobody holds a HookedDiT any longer."""
    found = transformer()
    inst = None if found is None else Instrumentation.found(found)
    if found is not None and inst is not None:
        hooked = inst.drop_hooks(place)
        if hooked:
            warnings.warn(
                f"The hook at {hooked[0]!r} was taken off with its HookedDiT, which nobody holds "
                "any longer; hold that, or what add_hook returned, for as long as it should act.",
                stacklevel=3,
            )
        with suppress(InvalidState):  # another tool sits on our forwards
            Instrumentation.let_go(found, place)


def _checked_size(size: Any, axes: int) -> Size:
    """Height and width, for video maybe with frames first; raises InvalidValue otherwise."""
    frames = "(height, width) or (frames, height, width)" if axes == 3 else "(height, width)"
    if not isinstance(size, (tuple, list)) or not 2 <= len(size) <= max(2, axes):
        wrong_type = not isinstance(size, (tuple, list))
        raise arguments.refusal("size", size, f"{frames} of the latents", wrong_type=wrong_type)
    return tuple(arguments.whole(f"size[{i}]", n, 1, 2**15) for i, n in enumerate(size))


def transformer_of(model: Any) -> Any:
    """The transformer inside a pipeline, a HookedDiT, or itself; raises TypeError for anything
    else.
    """
    found = getattr(model, "transformer", None if hasattr(model, "components") else model)
    if found is None and hasattr(model, "unet"):
        found = model.unet
    if isinstance(found, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InvalidType(
            f"{type(found).__name__} runs copies of the model in threads or processes of its own, "
            "where hooks are not; open the model inside, and run that: HookedDiT(model.module)."
        )
    if not isinstance(found, nn.Module):
        named = f", or dit_lens.load({model!r:.60})" if isinstance(model, str) else ""
        raise InvalidType(
            f"{type(model).__name__} is neither a transformer nor a pipeline with one; expected "
            f"e.g. a DiTPipeline{named}."
        )
    return found
