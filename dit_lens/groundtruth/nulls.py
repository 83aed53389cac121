"""Null models (E5 in docs/checks.md): nothing to find, so a tool that finds something is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin

from .. import arguments
from ..errors import InvalidValue
from . import construction as build
from .models import GroundTruth, plain_scheduler


def random_weights(
    seed: int,
    n_layers: int = 28,
    *,
    sample_size: int = 8,
    patch_size: int = 1,
    in_channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> GroundTruth:
    """A model whose weights are all drawn from N(0, 1 / fan-in), its biases 0; no layer is special
    (E5 in docs/checks.md).

    Args:
        seed: of the draw.
        n_layers: blocks of the model.
        sample_size: height and width of the latents.
        patch_size: rows and columns of a patch.
        in_channels: channels of the latents.
        dtype: torch.float32 or torch.float64.

    Returns:
        The model, which knows class 0 only.

    >>> random_weights(0, n_layers=2).description
    'Random weights, seed 0: no layer makes a gap.'
    """
    seed = arguments.seed("seed", seed)
    build.check_dtype(dtype)
    transformer = build.blank(n_layers, sample_size, patch_size, in_channels)
    draw = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        parameter.zero_()
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.copy_(
                torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / fan_in**0.5
            )
    answer: dict[str, Any] = {"kind": "null", "layers": [], "onset": None}
    description = f"Random weights, seed {seed}: no layer makes a gap."
    return GroundTruth(build.finish(transformer, dtype), plain_scheduler(), answer, description)


def shuffle_layers(
    transformer: Any, seed: int, blocks: Callable[[Any], Sequence[torch.nn.Module]] | None = None
) -> Any:
    """A copy of a model with its blocks in another order: what a layer does no longer depends on
    its depth (E5 in docs/checks.md).

    Blocks change places with blocks of the same kind only. The final layer of a
    `DiTTransformer2DModel` is conditioned through whichever block comes first, as always in
    diffusers. The copy shares nothing with the original and carries none of its hooks.

    Args:
        transformer: a diffusers transformer.
        seed: of the order, which is never the original one.
        blocks: its blocks in forward order; by default its `transformer_blocks`.

    Returns:
        The copy.

    Raises:
        ValueError: for a model without two blocks of one kind, or that is offloaded.

    >>> truth = random_weights(0, n_layers=3)
    >>> shuffle_layers(truth.transformer, seed=1).config.num_layers
    3
    """
    order = shuffled_order(transformer, seed, blocks)
    of = blocks or _blocks
    # not made anew from the configuration, which says nothing of adapters
    shuffled = copy.deepcopy(transformer)
    for module in shuffled.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    old = list(of(transformer))
    for new, i in zip(of(shuffled), order, strict=True):
        new.load_state_dict(old[i].state_dict())
    return shuffled


def shuffled_order(
    transformer: Any, seed: int, blocks: Callable[[Any], Sequence[torch.nn.Module]] | None = None
) -> list[int]:
    """The order of the blocks in `shuffle_layers`, of which nothing is copied yet.

    Args:
        transformer: as for `shuffle_layers`, as are `seed` and `blocks`.
        seed: of the order.
        blocks: in forward order.

    Raises:
        ValueError: as `shuffle_layers`.

    >>> sorted(shuffled_order(random_weights(0, n_layers=3).transformer, seed=1))
    [0, 1, 2]
    """
    arguments.instance("transformer", transformer, ModelMixin, "a diffusers transformer")
    arguments.optional(arguments.function, "blocks", blocks, "of the transformer")
    seed = arguments.seed("seed", seed)
    if blocks is None and not hasattr(transformer, "transformer_blocks"):
        raise InvalidValue(
            f"{type(transformer).__name__} has no transformer_blocks; say with blocks= which "
            "modules its blocks are."
        )
    if away := [name for name, value in transformer.state_dict().items() if value.is_meta]:
        raise InvalidValue(
            f"The layers can't be shuffled: {away[0]} is on the meta device, as under accelerate's "
            "offload; expected a model whose weights are loaded."
        )
    old = list((blocks or _blocks)(transformer))
    kinds: dict[Any, list[int]] = {}
    for i, block in enumerate(old):
        shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
        kinds.setdefault((type(block), shapes), []).append(i)
    if max(map(len, kinds.values()), default=0) < 2:
        raise InvalidValue(
            f"transformer has {len(old)} block{'s' * (len(old) != 1)}, no two of one kind; "
            "expected 2 or more of a kind to shuffle."
        )
    draw, order = torch.Generator().manual_seed(seed), list(range(len(old)))
    while order == list(range(len(old))):
        for places in kinds.values():
            drawn = torch.randperm(len(places), generator=draw).tolist()
            for place, i in zip(places, drawn, strict=True):
                order[place] = places[i]
    return order


def _blocks(transformer: Any) -> list[torch.nn.Module]:
    return list(transformer.transformer_blocks)
