"""The bridge to nnsight: a model whose modules are the hook points.

nnsight reads and edits what goes into modules and what comes out, and for that replaces the
`forward` of every module it wraps, for good. But most of a DiT's quantities are not at the border
of a module (`hook_resid_mid`, `hook_attn_out`, `hook_pattern`), and a model that dit_lens opened
must be left as it was. So nnsight gets a tree of its own: one identity module for each hook point,
under its name. While a trace runs, listeners send the values of hook points through these modules,
and there nnsight does whatever it does with modules: reads, edits, skips, counts, caches. The
transformer itself it never touches.

Three things keep that exact:

- a hook point is listened to only once nnsight's code waits for its value, so patterns that are not
  read are not computed;
- nnsight tells denoising steps apart by counting visits, so points that the model passed without a
  listener are counted too;
- what is served is a copy, as it is for dit_lens's own editors: the stream is often one tensor
  under two names.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidState, InvalidType, InvalidValue
from ..hooks.points import HookPoint, Listener, checked
from ..model.hooked import HookedDiT
from ..model.instrumentation import Handle

KINDS = ("input", "skip", "output")  # where nnsight stops at a module, and what it counts


def to_nnsight(model: Any) -> Any:
    """An `nnsight.NNsight` whose modules are the hook points of `model`, under their names.

    `m.trace(x, t, y)` runs the transformer once; a pipeline is run by
    `m.generate(class_labels=[207], num_inference_steps=50)`, where `tracer.iter` counts the
    denoising steps. Values have the shapes of `m.dit.sites`; with guidance the batch is
    [cond | null], and an invoke sees its rows of both.

        with m.trace(x, t, y):
            stream = m.blocks[5].hook_resid_post.output.save()  # [batch, token, d_model]

    Args:
        model: a `HookedDiT`, a transformer or a pipeline; it is opened in place.

    Returns:
        The `nnsight.NNsight`. Two attributes lead back: `m.dit`, the HookedDiT (`m.dit.remove()`
        takes the hook points out again), and `m.pipe`, the pipeline.

    Raises:
        ImportError: if nnsight is not installed.
        TypeError: if `model` is no DiT.
        ValueError: as `HookedDiT(model)`, for a model that can't be opened.
        RuntimeError: as `HookedDiT(model)`, for one that is compiled.

    >>> import dit_lens; m = to_nnsight(dit_lens.load("digits"))
    >>> m.get("blocks.5.attn.hook_q")
    Point(batch, token, head, d_head)
    """
    root, interleaver = _nnsight_classes()
    is_pipe = not isinstance(model, (HookedDiT, nn.Module))
    tree = HookPoints(HookedDiT(model), model if is_pipe else None)
    return root(tree, interleaver=interleaver(tree))


class Point(nn.Module):
    """The identity; nnsight's stand-in for a hook point."""

    def __init__(self, axes: Sequence[str]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return ", ".join(self.axes)


class HookPoints(nn.Module):
    """The tree of points, `blocks[5].attn.hook_q` and all; calling it runs the transformer or the
    pipeline.

    Neither is a child of it, or nnsight would wrap their modules too; but it has their parameters,
    so `m.device` and `m.to(...)` work.
    """

    def __init__(self, dit: HookedDiT, pipe: Any) -> None:
        super().__init__()
        self.dit, self.pipe = dit, pipe
        self.points: dict[str, Point] = {}
        for name, axes in dit.sites.items():
            self.points[name] = self._grow(name.split("."), Point(axes))

    def _grow(self, path: list[str], point: Point) -> Point:
        here: nn.Module = self
        for part, after in zip(path, path[1:], strict=False):
            if part not in here._modules:
                here.add_module(part, nn.ModuleList() if after.isdigit() else nn.Module())
            here = here.get_submodule(part)
        here.add_module(path[-1], point)
        return point

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(args, kwargs)(*args, **kwargs)

    def target(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What such arguments are for: the pipeline, or the transformer when there is none or when
        latents are given.
        """
        latents = "x" in kwargs or (len(args) > 0 and isinstance(args[0], Tensor))
        return self.dit.__call__ if self.pipe is None or latents else self.pipe.__call__

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        signature = inspect.signature(self.target(args, kwargs))
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            hint = (
                " (for denoising runs, give to_nnsight the pipeline itself)"
                if self.pipe is None
                else ""
            )
            raise InvalidType(f"{error}; expected the arguments {signature}{hint}.") from None
        return dict(bound.arguments)

    def parameters(self, recurse: bool = True) -> Any:
        return self.dit.transformer.parameters(recurse)

    def _apply(self, fn: Any, recurse: bool = True) -> HookPoints:
        self.dit.transformer._apply(fn, recurse)
        return self


class PointListener(Listener):
    """Sends a hook point's value through its module, where nnsight's code waits for it."""

    def __init__(self, listeners: PointListeners) -> None:
        super().__init__()
        self.listeners = listeners

    def __call__(self, x: Tensor, point: HookPoint) -> Tensor:
        copy = x.clone()
        before = _version(copy)
        new = self.listeners.serve(point.name, copy)
        edited = new is not copy or (
            not torch.equal(copy, x) if before is None else _version(copy) != before
        )
        if not edited:
            return copy if copy.requires_grad else x  # gradients are asked for at what was served
        if self.listeners.dit.instrumentation.watchers:
            raise InvalidState(
                f"nnsight edited {point.name!r} inside a dit_lens.trace, which could not replay "
                "that when it recomputes; edit with t.edit(...), or run the two one after the "
                "other."
            )
        point.changed = True
        return checked(new, x, point)


class PointListeners:
    """The listeners of one run: put on when nnsight waits for a point, taken off after the forward
    in which it was served.
    """

    def __init__(self, tree: HookPoints, interleaver: Any) -> None:
        self.dit, self.points, self.interleaver = tree.dit, tree.points, interleaver
        self.places = {f"model.{name}.{kind}": name for name in tree.points for kind in KINDS}
        self.handles: dict[str, Handle] = {}
        self.served: set[str] = set()
        self.forward_hook: Any = None

    def start(self) -> None:
        self.dit.require_eval()
        # refused here, before nnsight has begun, and not by `attach` in the midst of its beginning
        self.dit.instrumentation.claim()
        self.forward_hook = self.dit.transformer.register_forward_hook(self.step)

    def stop(self) -> None:
        if self.forward_hook is not None:
            self.forward_hook.remove()
        self.forward_hook = None
        self.keep(())
        self.served.clear()

    def listen(self, places: Collection[str]) -> None:
        """Listen where nnsight's code waits.

        Nothing is taken off here: an edit of a pattern counts only while its listener is on.
        """
        for name in {
            self.places[place] for place in places if place in self.places
        } - self.handles.keys():
            self.handles[name] = self.dit.instrumentation.attach(name, PointListener(self))

    def keep(self, places: Collection[str]) -> None:
        """Take off the listeners everywhere else."""
        for name in self.handles.keys() - {self.places.get(place) for place in places}:
            self.handles.pop(name).remove()

    def serve(self, name: str, value: Tensor) -> Tensor:
        self.served.add(name)
        value = self.points[name](value)
        if self.interleaver.batcher is not None:
            self.interleaver.batcher.settle()
        return value

    def step(self, *_: Any) -> None:
        """A forward is over: points that it passed without a listener count as visited."""
        counts = self.interleaver.counts
        for place, name in self.places.items():
            if name not in self.served:
                counts[place] = counts.get(place, 0) + 1
        self.served.clear()
        self.keep({*self.interleaver.parked, *self.interleaver.observers})


@cache
def _nnsight_classes() -> tuple[Any, Any]:
    """Our subclasses of nnsight's model and interleaver.

    nnsight is imported only here, because that puts `.save` on every object there is.
    """
    try:
        from diffusers.utils import BaseOutput
        from nnsight import NNsight
        from nnsight.intervention.envoy import Envoy, traceable
        from nnsight.intervention.interleaver import Interleaver
        from nnsight.modeling.diffusion import DiffusionBatcher
    except ImportError as error:
        raise ImportError(
            f"nnsight can't be imported ({error}); pip install 'dit_lens[nnsight]'."
        ) from error

    class HookPointInterleaver(Interleaver):
        """The listeners follow what nnsight waits for (`parked`, `observers`)."""

        def __init__(self, tree: HookPoints) -> None:
            self.listeners = PointListeners(tree, self)
            super().__init__()

        @property
        def parked(self) -> set[str]:
            return self._parked

        @parked.setter
        def parked(self, places: set[str]) -> None:
            self._parked = places
            self.listeners.listen(places)

        def reindex(self) -> None:
            super().reindex()
            self.listeners.listen(self.observers)

        def __enter__(self) -> Any:
            self.listeners.start()
            return super().__enter__()

        def cancel(self) -> None:  # nnsight calls this however a run ends
            try:
                super().cancel()
            finally:
                self.listeners.stop()

    class Batcher(DiffusionBatcher):
        """Which rows of a batch are an invoke's.

        With guidance they lie in two places, so nnsight serves a copy: edits in place are written
        back from there. A pipeline's output, which nnsight can't take apart, is cut by images.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.lent: list[tuple[Tensor, Any, Tensor, int | None]] = []

        def narrow(self, value: Any, group: Any) -> Any:
            if not (self.batching and group and isinstance(value, BaseOutput)):
                return super().narrow(value, group)
            start, size = self.image_groups[group[0]]
            parts = {
                k: v[start : start + size] if _rows_of(v) == self.image_total else v
                for k, v in value.items()
            }
            return type(value)(**parts)

        def widen(self, full: Any, group: Any, edited: Any) -> Any:
            if self.batching and group and isinstance(full, BaseOutput):
                raise InvalidValue(
                    "A pipeline's output can't be replaced for one of several invokes; edit "
                    "hook_sample."
                )
            return super().widen(full, group, edited)

        def _narrow_tensor(self, tensor: Tensor, group: Any) -> Tensor:
            self.put_back()
            rows = super()._narrow_tensor(tensor, group)
            if rows._base is None and rows is not tensor:
                self.lent.append((tensor, group, rows, _version(rows)))
            return rows

        def _widen_tensor(self, full: Tensor, group: Any, edited: Tensor) -> Tensor:
            self.put_back()
            return super()._widen_tensor(full, group, edited)

        def put_back(self) -> None:
            for i, (tensor, group, rows, version) in enumerate(self.lent):
                if version is None or _version(rows) != version:
                    tensor.copy_(super()._widen_tensor(tensor, group, rows))
                    self.lent[i] = (tensor, group, rows, _version(rows))

        def settle(self) -> None:
            self.put_back()
            self.lent.clear()

    class Named(Envoy):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                pass
            near = difflib.get_close_matches(name, list(self.__dict__.get("_child_map", ())), n=3)
            hint = (
                f"nearest: {', '.join(map(repr, near))}"
                if near
                else "m.dit.names lists all hook points"
            )
            raise AttributeError(f"{self.__dict__.get('path')} has no {name!r}; {hint}.")

    class NNsightDiT(Named, NNsight):
        """nnsight's root: how the arguments of several invokes become one batch."""

        _batcher_class = Batcher

        def __init__(self, tree: HookPoints, interleaver: Any) -> None:
            super().__init__(tree, interleaver=interleaver, envoys=Named)

        @traceable
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """Run the pipeline; `with m.generate(...) as tracer:` traces it."""
            return self._module(*args, **kwargs)

        def _batch_size(self, *args: Any, **kwargs: Any) -> int:
            return _rows(self._module.bind(args, kwargs))

        def _batch(self, invokes: list[tuple[Any, Any]], _fn: Any) -> tuple[Any, Any]:
            if len(invokes) == 1:
                return invokes[0]
            each = [self._module.bind(args, kwargs) for args, kwargs in invokes]
            return (), _joined(each, [_rows(one) for one in each]) if each else {}

    return NNsightDiT, HookPointInterleaver


def _rows(arguments: dict[str, Any]) -> int:
    """How many images the arguments are for; 0 if they are only settings."""
    for key in ("x", "class_labels", "prompt", "prompt_embeds"):
        if arguments.get(key) is not None:
            return _rows_of(arguments[key])
    return 0


def _rows_of(value: Any) -> int:
    return 1 if isinstance(value, str) or not hasattr(value, "__len__") else len(value)


def _joined(each: list[dict[str, Any]], rows: list[int]) -> dict[str, Any]:
    """The arguments of several calls as those of one batch."""
    keys = {key: None for one in each for key in one}
    return {key: _join(key, [one.get(key) for one in each], rows) for key in keys}


def _join(key: str, values: list[Any], rows: list[int]) -> Any:
    """What is given for each image one after the other; of all else there is one, and the calls
    must agree on it.
    """
    given = list(zip(values, rows, strict=True))
    if all(isinstance(v, Tensor) and len(v) in (1, n) for v, n in given):
        return torch.cat([v if len(v) == n else v.expand(n, *v.shape[1:]) for v, n in given])
    if all(isinstance(value, dict) for value in values):
        return _joined(values, rows)
    if (key in ("y", "class_labels", "generator") or "prompt" in key) and all(
        value is not None for value in values
    ):
        return [one for v, n in given for one in (v if isinstance(v, (list, tuple)) else [v] * n)]
    tensors = all(isinstance(value, Tensor) for value in values)
    if not all(
        torch.equal(value, values[0]) if tensors else value == values[0] for value in values
    ):
        shown = ", ".join(str(list(value.shape) if tensors else value) for value in values)
        raise InvalidValue(
            f"The invokes differ in {key} ({shown}), and one batch has one; trace them apart."
        )
    return values[0]


def _version(x: Tensor) -> int | None:
    """Grows with every edit in place; inference tensors have none."""
    return None if x.is_inference() else x._version
