"""Weights that lie elsewhere between passes: accelerate's and diffusers' hooks on modules load them
for a forward, and put them away after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn

HOOKS = {"_hf_hook", "_diffusers_hook"}
"""Where accelerate and diffusers keep their hooks on a module."""


def looked_after(
    transformer: nn.Module, blocks: Iterable[nn.Module], layer: int | None = None
) -> bool:
    """Whether somebody does something after the forward of a module that is under way when a pass
    ends in a layer. An exception would pass over it.

    What is seen are the transformer, its parts, its blocks, and all that is in the block where the
    pass ends: what is deeper in other blocks is finished by then, or has not begun.

    Args:
        transformer: the transformer.
        blocks: its blocks, in forward order.
        layer: the block in which the pass ends; None is behind them, where everything is looked at.
    """
    parts = list(transformer.children())
    if layer is None:
        deeper: Iterable[nn.Module] = chain.from_iterable(map(within, parts))
    else:
        blocks = list(blocks)
        deeper = chain(parts, blocks, within(blocks[layer]))
    return not all(map(HOOKS.isdisjoint, map(vars, chain([transformer], deeper))))


def within(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, each once. By plain attributes: its own way of asking is several
    times slower.

    Args:
        module: with its children.
    """
    found, seen = [module], {module}
    for each in found:
        for child in vars(each)["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def computing_device(transformer: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate loads them to.

    Args:
        transformer: the transformer, or a part of it.
    """
    weight = next(transformer.parameters(), None)
    away = "_hf_hook" in vars(transformer) or (weight is not None and weight.is_meta)
    for module in transformer.modules() if away else ():
        hook = vars(module).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):  # of several, put one behind the other
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu") if weight is None else weight.device
