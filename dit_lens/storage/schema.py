"""Schemas: what a file says, as pydantic models, and pydantic's findings in one sentence of ours.

Imported only where files are read: pydantic takes a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..arguments import cut, shown
from ..errors import InvalidValue

Value = TypeVar("Value")
Described = TypeVar("Described", bound="Schema")


class Schema(BaseModel):
    """A dict with exactly these names, and values of exactly these types: true is no number.

    class Store(Schema):
        sweep: str
        blocks: Size
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Size = Annotated[int, Field(ge=0, le=1 << 40)]
"""A whole number that something may be counted by."""
Listed = Annotated[tuple[Value, ...], Field(strict=False)]
"""A list of JSON's, as a tuple. `strict` would have it a tuple already."""


def fits(test: Callable[[Any], object], words: str) -> AfterValidator:
    """A type's further condition: `Annotated[str, fits(str.islower, "be in small letters")]`.

    Args:
        test: whether a value of the type will do.
        words: what was expected, in words that follow "expected it to", such as "be a hook point".
    """

    def check(value: Any) -> Any:
        if not test(value):
            raise PydanticCustomError("fits", "Input should {words}", {"words": words})
        return value

    return AfterValidator(check)


def conform(value: Any, schema: type[Described], where: str) -> Described:
    """Hold what came out of a file against a schema.

    Args:
        value: what JSON gave.
        schema: what it has to be.
        where: the file, for the error.

    Returns:
        The value in the schema's types.

    Raises:
        InvalidValue: if it does not fit, with the place.

    >>> class Store(Schema):
    ...     blocks: Size
    >>> conform({"blocks": 3}, Store, "'file.json'").blocks
    3
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise InvalidValue(_sentence(error, value, where)) from None


def _sentence(error: ValidationError, value: Any, where: str) -> str:
    """The first thing that pydantic found, in our words."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "missing":
        *inside, name = first["loc"]
        return f"{where} has no {name!r} in {_place(inside, value) or 'its metadata'}."
    at = _place(first["loc"], value)
    if first["type"] == "extra_forbidden":
        return f"{where} has {at or 'metadata'}, which is not known here."
    # of a union there is one finding for each type that it may have
    same = [e["msg"] for e in found if e["input"] is first["input"]]
    expected = " or ".join(dict.fromkeys(re.sub(r"^\w+ should ", "", text) for text in same))
    return f"{where} has {at or 'metadata'} = {shown(first['input'])}; expected it to {expected}."


def _place(location: Sequence[int | str], value: Any) -> str:
    """A place as one writes it in Python; pydantic also names the types that it had tried there."""
    text = ""
    for key in location:
        if isinstance(value, dict) and key in value:
            text, value = f"{text}.{key:.60}", value[key]
        elif isinstance(value, list) and isinstance(key, int):
            text, value = f"{text}[{key}]", value[key]
    return cut(text.lstrip("."))


__all__ = ["Listed", "Schema", "Size", "conform", "fits"]
