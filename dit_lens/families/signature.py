"""How a forward is called: from a call to its arguments by name, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from ..errors import InvalidType

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """What a forward takes besides `self`.

    Args:
        forward: a function of a class.

    Attributes:
        names: of its arguments, up to a `*args`, behind which nothing has a place.
        any_name: whether it takes arguments of any name.

    >>> taken = Signature(lambda self, x, t, *rest: None)
    >>> taken.by_name((1, 2, 3), {})
    {'x': 1, 't': 2, 'rest': (3,)}
    >>> taken.spelled({'x': 1, 't': 2, 'rest': (3,)})
    ([1, 2, 3], {})
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        found = list(inspect.signature(forward).parameters.values())
        if found and found[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            found = found[1:]  # else a decorator's own, which takes `self` among its arguments
        self.parameters = inspect.Signature(found)
        kinds = {p.kind: p.name for p in found}
        self._more = kinds.get(inspect.Parameter.VAR_POSITIONAL, "")
        self._named = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        self._places = [p.name for p in found if p.kind in POSITIONAL]
        self._plain = not self._more and inspect.Parameter.POSITIONAL_ONLY not in kinds
        self.any_name = bool(self._named)
        keywords = [p.name for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY]
        self.names = self._places + ([] if self._more else keywords)

    def __str__(self) -> str:
        return str(self.parameters)

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; what `**kwargs` takes by its own names.

        Args:
            args: its positional arguments.
            kwargs: its arguments by name.

        Raises:
            TypeError: Python's own, for what can't be told apart.
        """
        if self._plain and len(args) <= len(self._places):
            found = dict(zip(self._places, args, strict=False))
            if kwargs.keys().isdisjoint(found):
                return found | dict(kwargs)
        found = dict(self.parameters.bind(*args, **kwargs).arguments)
        more = found.pop(self._named, {})
        if not found.keys().isdisjoint(more):
            same = next(name for name in more if name in found)
            raise InvalidType(f"{same!r} is given twice, by place and by name; expected one.")
        return found | more

    def spelled(self, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional arguments of a call and those by name, from all by name.

        Args:
            inputs: as `by_name` gives them.
        """
        args, rest = [], dict(inputs)
        for name in self._places:
            if name not in rest:
                break
            args.append(rest.pop(name))
        else:
            args += rest.pop(self._more, ())
        return args, rest


@cache
def signature_of(forward: Callable[..., Any]) -> Signature:
    """What a class's forward takes; asked at every call.

    Args:
        forward: a function of a class.
    """
    return Signature(forward)
