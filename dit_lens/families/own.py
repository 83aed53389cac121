"""A transformer of the user's own, opened by the paths of its blocks.

    HookedDiT(module, blocks="blocks", adapter=Adapter(latents=(4, 32, 32), labels=10))

Nothing is known here of how a block computes. Its own forward runs, and the hook points lie where
torch's module hooks do: what a block, and a part of it that is named, is given and what it returns.
What a hook returns goes on in its place, exactly as from a module hook. With an `Adapter` the model
is run once as it is opened, which gives its sizes and holds the adapter against the model: how the
blocks run, where the image's tokens lie, whether the last layer can be read alone.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from ..hooks.passes import Pass
from .adapter import Adapter, Spoken, SpokenTransformer, arguments_of, heard, tensor_of, through
from .base import Skipped
from .boundaries import Argument, argument_of, given, parts
from .config import Condition, Config, Size
from .forwards import Forward, Points, TransformerForward
from .parts.joint import Joint, JointPoint, Point
from .parts.sites import RESID, SAMPLE, Axes, Sites

SEQUENCE: Axes = ("batch", "sequence", "d_model")
LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks_at(transformer: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The blocks that module paths stand for: of a list of modules its items.

    Args:
        transformer: the transformer.
        paths: such as ["blocks"], or ["in_blocks", "mid_block", "out_blocks"].

    Raises:
        InvalidValue: for a path that leads nowhere, or a block that stands there twice.
    """
    found: list[nn.Module] = []
    for path in paths:
        at = module_at(transformer, path, "blocks")
        found += list(at.children()) if isinstance(at, LISTS) else [at]
    if not found or len({id(block) for block in found}) < len(found):
        what = "no block" if not found else "a block more than once"
        raise InvalidValue(
            f"blocks={list(paths)} holds {what}; expected the paths of lists of different modules, "
            "in the order in which they run."
        )
    return found


def module_at(root: nn.Module, path: str, name: str) -> nn.Module:
    """The module at a path.

    Args:
        root: from where.
        path: such as "model.blocks".
        name: of the argument that says it.

    Raises:
        InvalidValue: if there is none, with the nearest.
    """
    try:
        if path:
            return root.get_submodule(path)
    except AttributeError:
        pass
    known = [n for n, m in root.named_modules() if n and (name != "blocks" or isinstance(m, LISTS))]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.3) or known[:1]
    raise InvalidValue(
        f"{type(root).__name__} has no module at {name}={path!r}"
        + (f" (nearest: {near[0]!r})." if near else "; expected the path of one.")
    )


class OwnTransformer(SpokenTransformer):
    """The whole model, whose attention nobody knows.

    Args:
        module: the transformer.
        points: all hook points.
        current_pass: the pass.
        x_name: the argument that holds x_t.
        turned: the adapter's `output`; None where there is none.
    """

    def __init__(
        self,
        module: Any,
        points: Points,
        current_pass: Pass,
        x_name: str,
        turned: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__(module, points, current_pass)
        self.x_name, self.turned = x_name, turned

    def run(self, inputs: dict[str, Any]) -> Any:
        if self.current_pass.couplings:
            raise InvalidState(
                f"{type(self.module).__name__} is opened by its modules' boundaries, and its "
                "attention can't couple twins; expected tie='noise', or a family of its own "
                "(docs/own-models.md)."
            )

        def meant(answers: Mapping[str, Any]) -> Tensor | None:
            tensors = [each for each in answers.values() if isinstance(each, Tensor)]
            turned = None if self.turned is None else self.turned(answers)
            if any(each is turned for each in tensors):
                return turned
            x = inputs[self.x_name]
            like = [e for e in tensors if e.ndim == x.ndim and e.shape[2:] == x.shape[2:]]
            return like[0] if len(like) == 1 and "sample" not in answers else None

        return through(self.sample, self.own(**inputs), pick=meant)


class OwnBlock(Forward):
    """A block, with hook points on the stream that enters and leaves it.

    Args:
        module: the block.
        points: its hook points.
        current_pass: the pass.
        layer: the block's number.
        order: which block of a pass came last, the arguments of that pass, and what that block was
            given, if it returned something else.
        x_name: the model's argument that holds x_t.
    """

    repeats = False

    def __init__(
        self,
        module: Any,
        points: Mapping[str, Point],
        current_pass: Pass,
        layer: int,
        order: list[Any],
        x_name: str,
    ) -> None:
        super().__init__(module)
        self.current_pass, self.layer, self.order = current_pass, layer, order
        self.x_name = x_name
        entering = ("hook_embed", "hook_resid_pre")
        self.before = [points[name] for name in entering if name in points]
        self.after, self.argument = points["hook_resid_post"], argument_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self.current_pass.now
        x = stream = given(self.argument, args, kwargs)
        if any(point.listeners for point in (*self.before, self.after)):
            last = self.order[1] if self.order[0] is now else -1
            if last >= self.layer:
                raise InvalidState(
                    f"Block {self.layer} runs after block {last}, so that layer numbers would "
                    "mislead; expected blocks that run once each, in the order of blocks=."
                )
            heard_before = any(point.listeners for point in self.before)
            if heard_before and last >= 0 and stream is not None and self.order[2]() is stream:
                raise InvalidState(same_again(self.layer, self.module, self.argument))
        items = items_of(now, self.x_name)
        for point in self.before:
            x = heard(point, x, items)
        if x is not stream:
            args, kwargs = put(x, self.argument, args, kwargs)
        returned = self.own(*args, **kwargs)
        kept = isinstance(stream, Tensor) and returned is not stream and returned is not x
        # weak, so that no activation is kept for it
        self.order[:] = now, self.layer, weakref.ref(stream) if kept else nothing
        return through(self.after, returned, x, items)


def nothing() -> None:
    """In place of a weak reference to what is not to be found again."""


def same_again(layer: int, block: nn.Module, argument: Argument) -> str:
    """What is said of a block whose first argument is no stream.

    Args:
        layer: its number.
        block: the block.
        argument: its first argument.
    """
    return (
        f"Block {layer} is given as {argument[0]!r} the very tensor that the block before was "
        f"given, and not what that returned; expected the stream as the first argument of "
        f"{type(block).__name__}.forward, or as 'hidden_states' (docs/own-models.md)."
    )


def items_of(inputs: Mapping[str, Any] | None, x_name: str) -> int:
    """How many items a model is called with; 0 where that is not known.

    Args:
        inputs: its arguments by name.
        x_name: of the one that holds x_t.
    """
    x = (inputs or {}).get(x_name)
    return len(x) if isinstance(x, Tensor) and x.ndim else 0


class OwnPart(Forward):
    """A part of a block, with hook points on what enters and leaves it.

    Args:
        module: the part.
        before: the hook point on its first argument, wherever that stands among the arguments.
        after: the hook point on what it returns.
        current_pass: the pass.
        x_name: the model's argument that holds x_t.
    """

    repeats = False

    def __init__(
        self, module: Any, before: Point, after: Point, current_pass: Pass, x_name: str
    ) -> None:
        super().__init__(module)
        self.current_pass, self.x_name = current_pass, x_name
        self.before, self.after, self.argument = before, after, argument_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, items = given(self.argument, args, kwargs), items_of(self.current_pass.now, self.x_name)
        new = heard(self.before, x, items)
        if new is not x:  # queries, keys and values may be given one by one
            args = tuple(new if arg is x else arg for arg in args)
            kwargs = {name: new if arg is x else arg for name, arg in kwargs.items()}
        return through(self.after, self.own(*args, **kwargs), new, items)


def put(
    x: Tensor, argument: Argument, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another stream."""
    name, position = argument
    if name in kwargs:
        return args, {**kwargs, name: x}
    return (*args[:position], x, *args[position + 1 :]), kwargs


@dataclass(frozen=True)
class Seen:
    """What running the model once showed.

    Attributes:
        tokens: how many image tokens the stream has.
        beside: how many others.
        d_model: its width.
        channels: how many the output has.
        lens: whether the last stream alone gives the output.
    """

    tokens: int
    beside: int
    d_model: int
    channels: int
    lens: bool


class OwnFamily(Spoken):
    """How dit_lens opens one transformer by the paths of its blocks.

    Args:
        transformer: the transformer.
        blocks: paths of its blocks, or of lists of them, in the order in which they run.
        inside: paths within a block by the names that they get, such as {"attn": "attn"}; None is
            what the block's source shows to be its attention and MLP.
        adapter: how it is called; None where only a loop of the user's own calls it.

    Attributes:
        seen: what running it once showed; None without an adapter.
    """

    differs = "opened by the paths of its modules, with the names that lie on their boundaries"
    computes: dict[str, tuple[str, ...]] = {}

    def __init__(
        self,
        transformer: nn.Module,
        blocks: Sequence[str],
        inside: Mapping[str, str] | None,
        adapter: Adapter | None,
    ) -> None:
        self.model_class = type(transformer).__name__
        names = () if adapter is None else adapter.names
        if adapter is not None and not adapter.latents:
            raise arguments.refusal(
                "latents", adapter.latents, "the shape of one item's x_t, such as (4, 32, 32)"
            )
        super().__init__(*arguments_of(transformer, names), adapter)
        if not self.n_classes:
            self.labels_name = ""  # what the third argument is given is no class
        self.paths = list(blocks)
        found = blocks_at(transformer, self.paths)
        self.inside = None if inside is None else dict(inside)
        for name, path in (self.inside or {}).items():
            for block in found:
                module_at(block, path, f"parts[{name!r}]")
        self.streams = {argument_of(block)[0] for block in found}
        self.order: list[Any] = [None, -1, nothing]
        self.seen = None if adapter is None else look(self, transformer, adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnFamily:
        return self  # the same for a copy of the model

    @property
    def stream(self) -> Axes:
        """The axes of the stream: of tokens, if it is known which are the image's."""
        return SEQUENCE if self.seen is None else RESID

    @property
    def pads(self) -> bool:  # type: ignore[override]
        return self.seen is not None and self.seen.beside > 0

    @property
    def first_sites(self) -> Sites:  # type: ignore[override]
        return {"hook_embed": self.stream}

    @property
    def last_sites(self) -> Sites:  # type: ignore[override]
        of_image = self.adapter is not None and len(self.adapter.latents) == 3
        return {"hook_sample": SAMPLE if of_image else ("batch", "output")}

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return blocks_at(transformer, self.paths)

    def parts_of(self, block: nn.Module) -> dict[str, str]:
        """Paths within a block by the prefix of their names.

        Args:
            block: the block.
        """
        if self.inside is None:
            return dict(parts(block))
        return {f"{name}.": path for name, path in self.inside.items()}

    def block_sites(self, block: Any) -> Sites:
        ends = [f"{prefix}hook_{end}" for prefix in self.parts_of(block) for end in ("in", "out")]
        return dict.fromkeys(("hook_resid_pre", *ends, "hook_resid_post"), self.stream)

    def block_forwards(
        self, block: Any, points: Points, current_pass: Pass, layer: int
    ) -> Sequence[Forward]:
        hook: dict[str, Point] = dict(points)
        if self.pads:
            hook = {n: JointPoint(p, None, current_pass, self.layout) for n, p in points.items()}
        forwards: list[Forward] = [
            OwnBlock(block, hook, current_pass, layer, self.order, self.x_name)
        ]
        for prefix, path in self.parts_of(block).items():
            before, after = hook[f"{prefix}hook_in"], hook[f"{prefix}hook_out"]
            forwards.append(
                OwnPart(block.get_submodule(path), before, after, current_pass, self.x_name)
            )
        return forwards

    def layout(self, inputs: dict[str, Any], length: int, transformer: Any) -> Joint:
        """Where the image's tokens lie in the stream.

        Args:
            inputs: the transformer's arguments.
            length: how many tokens the stream has.
            transformer: the transformer.
        """
        return Joint(self.image_tokens, slice(0, 0))

    def whole_forward(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> TransformerForward:
        return OwnTransformer(transformer, points, current_pass, self.x_name, self.turned)

    def outer_forwards(
        self, transformer: Any, points: Points, current_pass: Pass
    ) -> Sequence[Forward]:
        return []

    def config(self, transformer: Any, size: Size | None = None) -> Config:
        n, adapter, seen = len(self.blocks(transformer)), self.adapter, self.seen
        if adapter is None or seen is None:
            return Config(n, 0, 0, 0, 0, 0, 0, 0, latent_shape=(), grid=(), restartable=False)
        if size is not None and tuple(size) != adapter.latents[-len(size) :]:
            raise arguments.refusal(
                "size", size, f"{adapter.latents[1:]}, the adapter's latents, or another adapter"
            )
        grid = grid_of(adapter, seen.tokens)
        return Config(
            n_layers=n,
            d_model=seen.d_model,
            n_heads=0,
            d_head=0,
            d_mlp=0,
            patch_size=adapter.latents[-1] // grid[-1],
            in_channels=adapter.latents[0],
            out_channels=seen.channels,
            latent_shape=adapter.latents,
            grid=grid,
            n_classes=self.n_classes,
            restartable=False,
        )

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> Size:
        if self.adapter is None or self.seen is None:
            return ()
        return grid_of(self.adapter, self.seen.tokens)

    def final(
        self, transformer: Any, stream: Tensor, inputs: dict[str, Any], memo: dict[str, Any]
    ) -> Tensor | None:
        if self.seen is None or not self.seen.lens:
            why = (
                "how it is called is not known; expected an adapter"
                if self.seen is None
                else "the output depends on more than that stream; expected a family of its own"
            )
            raise InvalidState(
                f"{self.model_class}'s streams can't be read by its last layer: {why} "
                "(docs/own-models.md)."
            )
        return None

    def skip_block(self, inputs: dict[str, Any], args: Any, kwargs: Any) -> Skipped:
        x = next((kwargs[name] for name in self.streams if name in kwargs), None)
        return skipping(args[0] if x is None else x, self.image_tokens)

    def stream_out(self, block: Any, inputs: dict[str, Any], returned: Any) -> Tensor:
        return tensor_of(returned, type(block).__name__)[:, self.image_tokens]

    @property
    def image_tokens(self) -> slice:
        """Where the image's tokens lie in the stream."""
        return slice(None) if self.adapter is None else self.adapter.tokens


def skipping(x: Tensor, tokens: slice) -> Skipped:
    """What takes the place of a block that is left out; see `Family.skip_block`.

    Args:
        x: the stream that enters it.
        tokens: where the image's tokens lie in it.
    """
    image = x[:, tokens]

    def returned(streams: dict[str, Tensor]) -> Tensor:
        if streams[""] is image:
            return x
        found = x.clone()
        found[:, tokens] = streams[""]
        return found

    return {"": image}, returned


def grid_of(adapter: Adapter, tokens: int) -> Size:
    """The grid of the image's tokens: the adapter's, or that of square patches.

    Args:
        adapter: how the model is called.
        tokens: how many there are.

    Raises:
        InvalidValue: if so many tokens are no such grid.
    """
    if adapter.grid is not None:
        if torch.Size(adapter.grid).numel() != tokens:
            raise arguments.refusal(
                "grid", adapter.grid, f"one of the {tokens} image tokens in the stream"
            )
        return adapter.grid
    height, width = adapter.latents[-2:]
    patch = max(1, round((height * width / tokens) ** 0.5))
    grid = height // patch, width // patch
    if len(adapter.latents) != 3 or grid[0] * grid[1] != tokens or height % patch or width % patch:
        raise InvalidValue(
            f"The stream has {tokens} tokens, which are no grid of square patches of "
            f"{'x'.join(map(str, adapter.latents[1:]))}; expected Adapter(tokens=...), which says "
            "where the image's are, or Adapter(grid=...)."
        )
    return grid


def look(family: OwnFamily, transformer: nn.Module, adapter: Adapter) -> Seen:
    """Run the model once on nothing, without gradients, its random numbers given back.

    Args:
        family: its family under construction.
        transformer: the transformer.
        adapter: how it is called.

    Raises:
        InvalidState: for a model in train mode, or one that fails.
        InvalidValue: for an adapter that is not this model's.
    """
    if transformer.training:
        raise InvalidState(
            f"{type(transformer).__name__} is in train mode; call model.eval() before it is opened "
            "with an adapter."
        )
    weight = next(transformer.parameters())
    x = torch.zeros(1, *adapter.latents, dtype=weight.dtype, device=weight.device)
    label = torch.zeros(1, dtype=torch.long, device=x.device)
    empty = family.empty
    condition = Condition({family.labels_name: label}) if empty is None else empty
    inputs = family.inputs(transformer, x, torch.full((1,), 500.0, device=x.device), condition)
    blocks, streams = family.blocks(transformer), []
    order: list[int] = []

    def seen(i: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            order.append(i)
            entering = given(argument_of(blocks[i]), args, kwargs)
            returned = type(blocks[i]).forward(blocks[i], *args, **kwargs)
            streams.append((entering, returned))
            return returned

        return run

    with torch.no_grad(), torch.random.fork_rng():
        try:
            with standing_in(transformer, blocks, seen):
                output = family.output(transformer, family.call(transformer, inputs), inputs)
        except InvalidValue:
            raise
        except Exception as error:  # of a stranger's forward
            first = str(error).partition("\n")[0]
            raise InvalidValue(
                f"{type(transformer).__name__} can't be called as its adapter says "
                f"({type(error).__name__}: {first}); expected latents {list(adapter.latents)} and "
                f"the arguments {', '.join(map(repr, inputs))} to fit."
            ) from error
        _check_order(order, len(blocks))
        first, last = streams[0]
        for i, (entering, returned) in enumerate(streams):
            if not isinstance(entering, Tensor) or entering.ndim != 3 or len(entering) != 1:
                got = list(entering.shape) if isinstance(entering, Tensor) else type(entering)
                raise InvalidValue(
                    f"A block is given {got} for one item; expected a stream [1, token, d_model] "
                    "as its first argument."
                )
            if not isinstance(returned, Tensor) or returned.shape != first.shape:
                raise InvalidValue(
                    f"A block returns {arguments.shown(returned)} where the stream that enters the "
                    f"first has shape {list(first.shape)}; expected one stream through all blocks. "
                    "Without adapter= it can be traced all the same."
                )
            if i and entering is streams[i - 1][0] is not streams[i - 1][1]:
                raise InvalidValue(same_again(i, blocks[i], argument_of(blocks[i])))
            last = returned
        tokens = first[:, adapter.tokens].shape[1]
        if tuple(output.shape[2:]) != adapter.latents[1:]:
            raise InvalidValue(
                f"{type(transformer).__name__} answers with shape {list(output.shape[1:])} to "
                f"latents {list(adapter.latents)}; expected that height and width, or "
                "Adapter(output=fn), which gives it."
            )

        # whether anything but the last stream and the conditioning reaches the output
        def skipped(i: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                x = given(argument_of(blocks[i]), args, kwargs)
                if i < len(blocks) - 1:
                    return x
                return skipping(x, adapter.tokens)[1]({"": last[:, adapter.tokens]})

            return run

        with standing_in(transformer, blocks, skipped):
            alone = family.output(transformer, family.call(transformer, inputs), inputs)
    found = Seen(
        tokens=tokens,
        beside=first.shape[1] - tokens,
        d_model=first.shape[2],
        channels=output.shape[1],
        lens=torch.equal(alone, output),
    )
    grid_of(adapter, tokens)
    return found


def _check_order(order: Sequence[int], n: int) -> None:
    if list(order) != list(range(n)):
        raise InvalidValue(
            f"The blocks run in the order {', '.join(map(str, order[:12])) or 'none at all'}"
            f"{', ...' if len(order) > 12 else ''}; expected each of the {n} once, one after the "
            "other: give blocks= in the order in which they run."
        )


@contextmanager
def standing_in(
    transformer: nn.Module, blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Other forwards on the blocks, and nobody's module hooks anywhere, in a `with` block.

    Args:
        transformer: the transformer.
        blocks: its blocks.
        make: from a block's number to its forward.
    """
    with ExitStack() as stack:
        for module in transformer.modules():
            own = vars(module)
            for kind in ("_forward_hooks", "_forward_pre_hooks"):
                if own.get(kind):
                    stack.callback(own.__setitem__, kind, own[kind])
                    own[kind] = type(own[kind])()
        for i, block in enumerate(blocks):
            own = vars(block)
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward", None)
            own["forward"] = make(i)
        yield
