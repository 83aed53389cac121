"""What running a transformer of the user's own once shows: its sizes, and whether its adapter fits.

The model runs on nothing, in the order of its blocks, and once more on something else with every
block left out and the same last stream, which tells whether that alone gives the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import InvalidState, InvalidValue
from .adapter import Adapter, Spoken
from .base import Skipped
from .boundaries import argument_of, given
from .config import Condition, Size
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
        labels: how many labels the model's table has; None where none is seen.
    """

    tokens: int
    beside: int
    d_model: int
    channels: int
    lens: bool
    labels: int | None


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
    weight = next(transformer.parameters())
    x = torch.zeros(1, *adapter.latents, dtype=weight.dtype, device=weight.device)
    label = torch.zeros(1, dtype=torch.long, device=x.device)
    empty = family.empty
    condition = Condition({family.labels_name: label}) if empty is None else empty

    def answer(x: Tensor) -> Tensor:
        inputs = family.inputs(transformer, x, family.some_time(x), condition)
        return family.output(transformer, family.call(transformer, inputs), inputs)

    names = family.inputs(transformer, x, family.some_time(x), condition)
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
            with standing_in(transformer, blocks, seen), reading(transformer, label) as tables:
                output = answer(x)
        except InvalidValue:
            raise
        except Exception as error:  # of a stranger's forward
            first = str(error).partition("\n")[0]
            raise InvalidValue(
                f"{type(transformer).__name__} can't be called as its adapter says "
                f"({type(error).__name__}: {first}); expected latents {list(adapter.latents)} and "
                f"the arguments {', '.join(map(repr, names))} to fit."
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

        image = last[:, adapter.tokens]
        alone = last_alone(family, transformer, answer, noise_like(x), image)
    found = Seen(
        tokens=tokens,
        beside=first.shape[1] - tokens,
        d_model=first.shape[2],
        channels=output.shape[1],
        lens=torch.equal(alone, output),
        labels=min(tables, default=None),
    )
    grid_of(adapter, tokens)
    if found.labels is not None and found.labels < family.n_classes:
        raise arguments.refusal(
            "labels", adapter.labels, f"at most {found.labels}, the rows of the table of labels"
        )
    return found


@contextmanager
def reading(transformer: nn.Module, label: Tensor) -> Iterator[list[int]]:
    """The sizes of the tables that are read at a label in a `with` block.

    Args:
        transformer: the transformer.
        label: [1].
    """
    found: list[int] = []

    def see(table: nn.Module, given: tuple[Any, ...]) -> None:
        at = given[0] if given else None
        if isinstance(at, Tensor) and at.dtype == label.dtype and at.shape == label.shape:
            found.append(len(table.weight))  # type: ignore[arg-type]

    with ExitStack() as stack:
        for module in transformer.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(see).remove)
        yield found


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
            own = vars(block)
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward", None)
            own["forward"] = make(i)
        yield
