"""What a model returns, where that is not one tensor: the values in it, and which of them its
adapter makes the answer of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor


def members(returned: Any) -> dict[Any, Any]:
    """The values in what a model returned, by their place in it; empty where that is not known.

    Args:
        returned: a dict, a tuple, a list or a dataclass.

    >>> members((1, 2))
    {0: 1, 1: 2}
    """
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, (tuple, list)):
        return dict(enumerate(returned))
    fields = dataclasses.fields(returned) if dataclasses.is_dataclass(returned) else ()
    return {field.name: getattr(returned, field.name) for field in fields}


def with_members(returned: Any, new: Mapping[Any, Any]) -> Any:
    """The same with other values in it.

    Args:
        returned: as for `members`.
        new: the values by their place.

    >>> with_members([1, 2], {1: 3})
    [1, 3]
    """
    if isinstance(returned, (tuple, list)):
        make = getattr(type(returned), "_make", type(returned))
        return make(new.get(i, value) for i, value in enumerate(returned))
    found = copy(returned)
    for place, value in new.items():
        if isinstance(returned, Mapping):
            found[place] = value
        else:
            object.__setattr__(found, place, value)  # of a frozen one too
    return found


def source_of(output: Callable[[Any], Any], returned: Any) -> Any:
    """The place of the only tensor that an answer is made of; None where there are several, or
    none. Found by trying: which of them change it?

    Args:
        output: from what the model returned to the answer, an `Adapter`'s.
        returned: what the model returned.

    >>> source_of(lambda returned: -returned[1], (torch.ones(1), torch.ones(2)))
    1
    """
    tensors = {k: v for k, v in members(returned).items() if isinstance(v, Tensor)}

    def answer(changed: Any = None) -> Tensor:
        new = {
            k: ~v if v.dtype == torch.bool else 1 - 2 * v
            for k, v in tensors.items()
            if k == changed
        }
        # copies, for it may change them in place
        return output(with_members(returned, {k: v.clone() for k, v in tensors.items()} | new))

    with torch.no_grad():
        plain = answer()
        found = [place for place in tensors if not torch.equal(answer(place), plain)]
    return found[0] if len(found) == 1 else None
