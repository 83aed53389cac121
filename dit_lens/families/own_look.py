"""What running a transformer of the user's own once shows: its sizes, and whether its adapter fits.

The model runs on nothing, in the order of its blocks, and once more on something else with every
block left out and the same last stream, which tells whether that alone gives the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from .adapter import Adapter, Spoken
from .base import Skipped
from .boundaries import argument_of, given
from .config import Condition, Size
from .forward_slot import slot
from .offloading import computing_device
from .own_forwards import same_again


@dataclass(frozen=True)
class Seen:
    """What running the model once showed.

    Attributes:
        tokens: how many image tokens the stream has.
        beside: how many others.
        d_model: its width.
        channels: how many the output has.
        lens: whether the last stream alone gives the output.
        null: whether the model can be given the label for none.
    """

    tokens: int
    beside: int
    d_model: int
    channels: int
    lens: bool
    null: bool


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


def look(family: Spoken, transformer: nn.Module, adapter: Adapter) -> Seen:
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
    dtype = next((p.dtype for p in transformer.parameters()), torch.float32)
    x = torch.zeros(1, *adapter.latents, dtype=dtype, device=computing_device(transformer))
    empty = family.empty

    def inputs_of(x: Tensor, label: int = 0) -> dict[str, Any]:
        number = torch.full((1,), label, device=x.device)
        condition = Condition({family.labels_name: number}) if empty is None else empty
        return family.inputs(transformer, x, family.some_time(x), condition)

    def answer(x: Tensor, label: int = 0) -> Tensor:
        inputs = inputs_of(x, label)
        return family.output(transformer, family.call(transformer, inputs), inputs)

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
            with standing_in(transformer, blocks, seen), reading(transformer) as first_read:
                output = answer(x)
        except InvalidValue:
            raise
        except Exception as error:  # of a stranger's forward
            first = str(error).partition("\n")[0]
            raise InvalidValue(
                f"{type(transformer).__name__} can't be called as its adapter says "
                f"({type(error).__name__}: {first}); expected latents {list(adapter.latents)} and "
                f"the arguments {', '.join(map(repr, inputs_of(x)))} to fit."
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
        channels = adapter.latents[0]
        if output.shape[1] not in (channels, 2 * channels):
            raise InvalidValue(
                f"{type(transformer).__name__} answers with {output.shape[1]} channels to latents "
                f"{list(adapter.latents)}; expected {channels}, {2 * channels} with a variance in "
                "the second half, or Adapter(output=fn), which gives that."
            )

        image = last[:, adapter.tokens]
        noise = noise_like(x)
        alone = last_alone(family, transformer, answer, noise, image)
        if tokens < first.shape[1]:
            changed = {i: image.clone() for i in (0, tokens - 1)}
            for i, stream in changed.items():
                stream[:, i] += noise_like(stream[:, i])
            idle = [
                i
                for i, stream in changed.items()
                if torch.equal(last_alone(family, transformer, answer, noise, stream), alone)
            ]
            if len(idle) == 1:  # of a last layer that is 0, as before it was trained, it is all
                raise InvalidValue(
                    f"Token {range(first.shape[1])[adapter.tokens][idle[0]]} of the last stream is "
                    f"one of the image's by tokens={adapter.tokens}, and the answer does not "
                    "depend on it; expected the tokens of which the last layer makes the answer."
                )
        null = True
        if isinstance(adapter.labels, int) and adapter.labels:
            null = has_null(transformer, blocks, lambda y: answer(x, y), adapter.labels, first_read)
    found = Seen(
        tokens=tokens,
        beside=first.shape[1] - tokens,
        d_model=first.shape[2],
        channels=output.shape[1],
        lens=torch.equal(alone, output),
        null=null,
    )
    grid_of(adapter, tokens)
    return found


Read = dict[nn.Module, int]
"""Tables of a model, and the number that each was read at."""


@contextmanager
def reading(transformer: nn.Module) -> Iterator[Read]:
    """The tables that are read at one number in a `with` block.

    Args:
        transformer: the transformer.
    """
    found: Read = {}

    def see(table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = args[0] if args else kwargs.get("input")
        if isinstance(at, Tensor) and not at.is_floating_point() and at.unique().numel() == 1:
            found[table] = int(at.flatten()[0])

    with ExitStack() as stack:
        for module in transformer.modules():
            if isinstance(module, nn.Embedding):
                handle = module.register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
        yield found


def has_null(
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    answer: Callable[[int], Tensor],
    n: int,
    first_read: Read,
) -> bool:
    """Whether a model can be given the label for no class, which comes behind the classes.

    On a CPU that label is tried. On an accelerator an index out of range ends the process, so that
    another label is, and what tables show counts.

    Args:
        transformer: the transformer.
        blocks: its blocks.
        answer: what calls it with a label.
        n: how many classes it is said to have.
        first_read: the tables that were read as it was called with label 0.

    Raises:
        InvalidValue: for more labels than it can be given.
    """
    tried = n if computing_device(transformer).type == "cpu" else min(1, n - 1)

    def own(i: int) -> Callable[..., Any]:
        return partial(type(blocks[i]).forward, blocks[i])

    def fails(label: int) -> Exception | None:
        try:
            answer(label)
        except Exception as error:  # of a stranger's forward
            return error
        return None

    with standing_in(transformer, blocks, own):
        with reading(transformer) as read:
            failed = fails(tried)
        of_labels = [t for t, at in read.items() if at == tried and first_read.get(t) == 0]
        rows = min((len(t.weight) for t in of_labels), default=None)  # type: ignore[arg-type]
        if rows is not None and rows < n:
            raise arguments.refusal("labels", n, f"at most {rows}, the rows of the table of labels")
        error = fails(n - 1) if failed and tried == n else failed
    if error is not None:
        raise arguments.refusal(
            "labels",
            n,
            f"fewer: {type(transformer).__name__} can't be given label "
            f"{n - 1 if tried == n else tried} ({type(error).__name__}: {error})",
        )
    return failed is None and (rows is None or rows > n)


def noise_like(x: Tensor) -> Tensor:
    """Seeded noise of a tensor's shape and dtype, on its device.

    Args:
        x: the tensor.
    """
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def last_alone(
    family: Spoken,
    transformer: nn.Module,
    answer: Callable[[Tensor], Tensor],
    x: Tensor,
    last: Tensor,
) -> Tensor:
    """What a model answers whose blocks do nothing, but for the last, which leaves a given stream:
    the same for every x, if that stream alone gives it.

    Args:
        family: its family.
        transformer: the transformer.
        answer: what calls it with latents.
        x: the latents.
        last: the image's tokens of that stream.
    """
    blocks = family.blocks(transformer)

    def skipped(i: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            streams, returned = family.skip_block({}, args, kwargs)
            return returned(streams if i < len(blocks) - 1 else {"": last})

        return run

    with standing_in(transformer, blocks, skipped):
        return answer(x)


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
            holder, key = slot(block)
            if key in holder:
                stack.callback(holder.__setitem__, key, holder[key])
            else:
                stack.callback(holder.pop, key, None)
            holder[key] = make(i)
        yield
