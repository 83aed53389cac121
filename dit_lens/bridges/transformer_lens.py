"""The bridge to TransformerLens: a real `HookedRootModule` in front of a hooked DiT.

TransformerLens's functions ask a model for three things: a tree of its own `HookPoint` modules,
methods that run the model with functions on them, and a `cfg` of sizes. So the bridge is such a
tree, with dit_lens's names, and nothing is computed in it: the DiT runs as it always does, and for
the length of a forward an editor at each point with hooks sends the activation through
TransformerLens's point of that name and passes on what comes back. Where there are no hooks nothing
is attached: patterns are not computed, the output is bit for bit the model's own, and after the
forward the model is as it was.

Two habits of dit_lens are kept: a name that matches nothing raises, with the nearest
(TransformerLens records nothing and says nothing), and hooks get a copy, because the stream is
often one tensor under two names. TransformerLens takes 2.7 s to import, so the class is made on the
first call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InvalidState, InvalidType, InvalidValue
from ..hooks.names import select
from ..hooks.points import Editor, Listener
from ..model.hooked import HookedDiT

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule


def to_transformer_lens(model: Any) -> HookedRootModule:
    """TransformerLens's `HookedRootModule` for a DiT: `hook_dict`, `run_with_cache`,
    `run_with_hooks`, `hooks`, `add_hook`, `cfg`.

    The module is called as `HookedDiT` is: `tl(x, t, y)`, with `start_at_layer` and
    `stop_at_layer`, and gives the model's output. With `metric=fn` it gives `fn(output)`, which
    `run_with_cache(..., incl_bwd=True)` needs to be a number. `tl.to_tokens(x, t, y)` stands for
    `tokens` in functions that take one argument.

    Args:
        model: a `HookedDiT`, a pipeline or its transformer; it is opened in place and shared, not
            copied.

    Returns:
        The module. `tl.model` is the HookedDiT, `tl.transformer` the diffusers module.

    Raises:
        ImportError: if transformer-lens is not installed.
        TypeError: if `model` is no DiT.
        ValueError: as `HookedDiT(model)`, for a model that can't be opened.
        RuntimeError: as `HookedDiT(model)`, for one that is compiled.

    >>> import dit_lens, torch; tl = to_transformer_lens(dit_lens.load("digits"))
    >>> x, t, y = torch.zeros(1, 1, 16, 16), torch.tensor([9]), torch.tensor([3])
    >>> out, cache = tl.run_with_cache(x, t, y)
    >>> cache["pattern", 27].shape, cache.stack_activation("resid_post").shape
    (torch.Size([1, 4, 64, 64]), torch.Size([28, 1, 64, 64]))
    """
    return _bridge()(HookedDiT.of(model))


class Tokens:
    """A batch of inputs (x, t, y) under one name, for TransformerLens's functions that take
    `tokens`.

    Its shape is [batch, token]. Indexing chooses items of the batch: by a slice, a list, or a
    tensor of indices.
    """

    ndim = 2

    def __init__(self, model: HookedDiT, x: Tensor, t: Tensor, y: Any) -> None:
        self.model, self.inputs = model, (x, t, y)

    @functools.cached_property
    def shape(self) -> torch.Size:
        # what enters the first block, since every family counts its tokens its own way
        with torch.no_grad():
            return self.model(*self.inputs, stop_at_layer=0).shape[:2]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: Any) -> Tokens:
        chosen = [index] if isinstance(index, int) else index

        def pick(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: pick(each) for key, each in value.items()}
            return (
                value[chosen]
                if isinstance(value, Tensor) and value.ndim and len(value) == len(self)
                else value
            )

        return Tokens(self.model, *map(pick, self.inputs))

    def __repr__(self) -> str:
        return f"Tokens(a batch of {len(self)} inputs)"


class Through(Editor):
    """Sends the activation through TransformerLens's hook point of the same name; what its hooks
    make of it goes on.
    """

    def __init__(self, theirs: Any, instrumentation: Any) -> None:
        # Editor's own would look up the function's signature, which takes longer than the hook
        Listener.__init__(self)
        self.fn, self.now, self.by_keyword = self.through, None, True
        self.theirs, self.instrumentation = theirs, instrumentation

    def through(self, activation: Tensor, hook: Any) -> Tensor | None:
        # taken off again within a `with tl.hooks(...)`
        if not self.theirs.fwd_hooks and not self.theirs.bwd_hooks:
            return None
        if self.theirs.bwd_hooks and not activation.requires_grad:
            raise InvalidState(
                f"A backward hook waits at {hook.name!r}, but no gradient flows there: "
                "gradients are off, or neither the weights before it nor the input require them."
            )
        version = None if activation.is_inference() else activation._version
        before = (
            activation.detach().clone()
            if version is None or self.instrumentation.watchers
            else None
        )
        new = self.theirs(activation)
        # In TransformerLens a hook may also change its activation in place and return None.
        touched = new is not activation or (version is not None and activation._version != version)
        differs = before is not None and not torch.equal(before, new)
        if differs and self.instrumentation.watchers:
            raise InvalidState(
                f"A TransformerLens hook changed {hook.name!r} inside a trace, which could not "
                "repeat that edit when it recomputes: make it with "
                f"trace.edit({hook.name!r}, fn)."
            )
        return new if touched or differs else None

    def frozen(self) -> None:
        """None: a trace repeats nothing of this, for hooks that cache would cache once more."""


class Node(nn.Module):
    """A node of the tree of hook points, such as `blocks.5.attn`."""

    name: str

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError(
            f"{self.name!r} holds hook points and computes nothing: in a DiT a modulation by (t, "
            "y) follows each normalisation. To read a stream by the last layer use "
            "tl.model.unembed(stream, t, y); elsewhere record hook_normalized."
        )

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


def _attribute(module: Any, name: str) -> Any:
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        if name.startswith("_"):
            raise
        raise AttributeError(
            f"{name!r} is not part of the bridge: it gives TransformerLens a DiT's hook points and "
            "sizes, no vocabulary, and no weights under TransformerLens's names (tl.transformer "
            "has them, under diffusers')."
        ) from None


@functools.cache
def _bridge() -> Any:
    try:
        from transformer_lens import ActivationCache, HookedRootModule, TransformerBridgeConfig
        from transformer_lens.hook_points import HookPoint
    except ImportError as error:
        raise ImportError(
            "The bridge to TransformerLens needs transformer-lens, and importing it failed "
            f"({error}); use pip install 'dit_lens[transformer-lens]'."
        ) from error

    class TransformerLensDiT(HookedRootModule):
        """What `to_transformer_lens` returns; its docstring is the manual."""

        def __init__(self, model: HookedDiT) -> None:
            super().__init__()
            self.model = model
            self.attached: set[str] = set()
            for name in model.names:
                *path, last = name.split(".")
                place: nn.Module = self
                for part in path:
                    if part not in dict(place.named_children()):
                        place.add_module(part, nn.ModuleList() if part == "blocks" else Node())
                    place = place.get_submodule(part)
                place.add_module(last, HookPoint())
            self.setup()
            points: dict[str, Any] = dict(self.named_modules())
            self.hook_dict = {name: points[name] for name in model.names}  # in forward order
            self.train(model.transformer.training)
            # After `setup`, which would write a `name` on each of its modules, and `train`, which
            # would change their modes.
            self.transformer = model.transformer
            c, theirs = model.cfg, getattr(model.transformer, "config", None)
            self._cfg = TransformerBridgeConfig(
                n_layers=c.n_layers,
                d_model=c.d_model,
                n_heads=c.n_heads,
                d_head=c.d_head,
                d_mlp=c.d_mlp,
                n_ctx=math.prod(c.grid),
                model_name=type(model.transformer).__name__,
                attention_dir="bidirectional",
                act_fn=str(getattr(theirs, "activation_fn", "unknown")),
                use_attn_result=True,
                default_prepend_bos=False,
            )

        @property
        def cfg(self) -> TransformerBridgeConfig:
            """Sizes, device and dtype; what language models alone have stays at TransformerLens's
            defaults.
            """
            self._cfg.device, self._cfg.dtype = str(self.model.device), self.model.dtype
            return self._cfg

        # Running.

        def forward(
            self,
            x: Tensor | Tokens,
            t: Tensor | None = None,
            y: Any = None,
            *,
            metric: Any = None,
            **span: Any,
        ) -> Any:
            inputs: Any = x.inputs if isinstance(x, Tokens) else (x, t, y)
            with self.listening():
                out = self.model(*inputs, **span)
            return out if metric is None else metric(out)

        def to_tokens(self, x: Tensor | Tokens, t: Tensor | None = None, y: Any = None) -> Tokens:
            """(x, t, y) as the one argument that TransformerLens's functions call tokens, of shape
            [batch, token].
            """
            if isinstance(x, Tokens):
                return x
            if not isinstance(x, Tensor) or not isinstance(t, Tensor):
                kinds = ", ".join(type(each).__name__ for each in (x, t, y))
                raise InvalidType(
                    "to_tokens takes a DiT's inputs: latents x, timesteps t and condition y, not "
                    f"({kinds})."
                )
            return Tokens(self.model, x, t, y)

        def run_with_cache(
            self, *args: Any, return_cache_object: bool = True, **kwargs: Any
        ) -> tuple[Any, Any]:
            if kwargs.get("incl_bwd") and kwargs.get("metric") is None:
                raise InvalidValue(
                    "incl_bwd=True needs a number to take the gradient of, and a DiT's output is "
                    "an image; pass metric=fn, with fn(output) a scalar."
                )
            if args and isinstance(args[0], Tokens):
                args = (*args[0].inputs, *args[1:])
            out, kept = super().run_with_cache(*args, **kwargs)
            if return_cache_object:
                kept = ActivationCache(
                    kept, self, has_batch_dim=not kwargs.get("remove_batch_dim", False)
                )
            return out, kept

        # Hooks: names as everywhere in dit_lens, and listeners in the model only while they are
        # needed.

        def matching(self, names: Any) -> list[str]:
            """All hook names that a name, glob, shorthand, list or function chooses; raises for
            none. A whole name is found at once.
            """
            return (
                [names]
                if isinstance(names, str) and names in self.hook_dict
                else select(names, self.model.names)
            )

        @contextmanager
        def hooks(
            self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any
        ) -> Iterator[Any]:
            named = [
                [(n, fn) for f, fn in each for n in self.matching(f)]
                for each in (fwd_hooks, bwd_hooks)
            ]
            with super().hooks(*named, *args, **kwargs), self.listening():
                yield self

        @contextmanager
        def listening(self) -> Iterator[None]:
            """The listeners at all points with hooks; nested, those that are not there yet."""
            wanted = {n: p for n, p in self.hook_dict.items() if p.fwd_hooks or p.bwd_hooks}
            if wanted:
                self.model.require_eval()
            with ExitStack() as stack:
                for name, point in wanted.items():
                    if name in self.attached:
                        continue
                    stack.callback(
                        self.model.instrumentation.attach(
                            name, Through(point, self.model.instrumentation)
                        ).remove
                    )
                    self.attached.add(name)
                    stack.callback(self.attached.discard, name)
                yield

        def add_hook(self, name: Any, hook: Any, *args: Any, **kwargs: Any) -> None:
            for each in self.matching(name):
                super().add_hook(each, hook, *args, **kwargs)

        def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
            return super().add_caching_hooks(self.matching(names_filter), *args, **kwargs)

        def get_caching_hooks(
            self,
            names_filter: Any = None,
            *args: Any,
            cache: Any = None,
            pos_slice: Any = None,
            **kwargs: Any,
        ) -> Any:
            names = self.matching(names_filter)
            # TransformerLens would slice the last axis but one of each, which for a gate [batch,
            # d_model] is the batch.
            of_tokens = [n for n in names if {"token", "query"} & set(self.model.sites[n])]
            others = [n for n in names if n not in of_tokens]
            cache = {} if cache is None else cache
            _, fwd, bwd = super().get_caching_hooks(
                of_tokens, *args, cache=cache, pos_slice=pos_slice, **kwargs
            )
            _, more_fwd, more_bwd = super().get_caching_hooks(others, *args, cache=cache, **kwargs)
            return cache, fwd + more_fwd, bwd + more_bwd

        def __getattr__(self, name: str) -> Any:
            return _attribute(self, name)

        def __repr__(self) -> str:
            return f"TransformerLensDiT({self.model!r})"

        def __reduce__(self) -> Any:
            # a copied or unpickled model starts without listeners
            return to_transformer_lens, (self.model,)

    return TransformerLensDiT
