"""What a value is, as text: equal for equal content, in any process."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidType


class _Plain:
    """Without anything that Python does not see."""


@singledispatch
def content(value: Any) -> str:
    """A text that is the same for the same content, and only for it.

    Args:
        value: an argument of a measurement: numbers, text, arrays, modules, functions, and
            collections and dataclasses of these.

    Raises:
        InvalidType: for anything whose content can't be seen.

    >>> content([1, "a"]) == content([1, "a"]) != content([1, "b"])
    True
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return f"{type(value).__qualname__}{content(fields)}"
    if hasattr(value, "config") and hasattr(value, "timesteps"):  # a scheduler of diffusers'
        config = {k: str(v) for k, v in sorted(value.config.items()) if k[:1] != "_"}
        return f"{type(value).__qualname__}{content(config)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    # an object of plain Python is its class and what it holds, as for pickle
    kind = type(value)
    own = {name for base in kind.__mro__[:-1] for name in vars(base)}
    if not own & {"__reduce_ex__", "__reduce__", "__getstate__"}:
        if hasattr(value, "__dict__") and kind.__basicsize__ == _Plain.__basicsize__:
            code = [f for f in vars(kind).values() if isinstance(f, types.FunctionType)]
            return f"{kind.__module__}.{kind.__qualname__}{content([*code, vars(value)])}"
    raise InvalidType(
        f"A {type(value).__name__} can't be told from another by what it holds, as a store of "
        "pieces needs; expected numbers, text, arrays, modules or functions."
    )


@content.register(type(None))
@content.register(bool)
@content.register(int)
@content.register(float)
@content.register(complex)
@content.register(str)
@content.register(bytes)
@content.register(range)
@content.register(slice)
@content.register(np.generic)
@content.register(torch.dtype)
@content.register(torch.device)
def _plain(value: Any) -> str:
    return f"{type(value).__name__}({value!r})"


@content.register(Path)
def _path(value: Path) -> str:
    return f"Path({str(value)!r})"


@content.register(list)
@content.register(tuple)
def _sequence(value: Any) -> str:
    return f"[{', '.join(map(content, value))}]"


@content.register(set)
@content.register(frozenset)
def _set(value: Any) -> str:
    return f"{{{', '.join(sorted(map(content, value)))}}}"


@content.register(Mapping)
def _mapping(value: Mapping[Any, Any]) -> str:
    return f"{{{', '.join(f'{content(k)}: {content(v)}' for k, v in value.items())}}}"


@content.register(Tensor)
def _tensor(value: Tensor) -> str:
    held = value.detach().to("cpu").contiguous()
    raw = held.reshape(-1).view(torch.uint8).numpy() if held.numel() else np.zeros(0, np.uint8)
    return f"Tensor({value.dtype}, {tuple(value.shape)}, {_hash(raw)})"


@content.register(np.ndarray)
def _array(value: np.ndarray[Any, Any]) -> str:
    if value.dtype == object:
        return f"Array({value.shape}, {content(value.tolist())})"
    raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
    return f"Array({value.dtype.str}, {value.shape}, {_hash(raw)})"


@content.register(nn.Module)
def _module(value: nn.Module) -> str:
    config = getattr(value, "config", None)
    settings = {} if config is None else {k: str(v) for k, v in config.items() if k[:1] != "_"}
    return f"{type(value).__qualname__}{content(settings)}{content(value.state_dict())}"


@content.register(types.FunctionType)
@content.register(types.MethodType)
@content.register(types.BuiltinFunctionType)
@content.register(partial)
def _function(value: Any) -> str:
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial):
        return f"partial({content(value.func)}, {content(value.args)}, {content(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{content(value.__func__)} of {content(value.__self__)}"
    closed = [cell.cell_contents for cell in value.__closure__ or ()]
    held = [value.__defaults__, value.__kwdefaults__, closed]
    return f"{value.__qualname__}({_code(value.__code__)}, {content(held)})"


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return _hash(code.co_code + repr((code.co_names, constants)).encode())


def _hash(raw: Any) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]


def digest(value: Any) -> str:
    """A digest of a value's content, 16 digits.

    Args:
        value: see `content`.

    >>> digest(1) == digest(1.0)
    False
    """
    try:
        return hashlib.sha256(content(value).encode()).hexdigest()[:16]
    except RecursionError:
        raise InvalidType(
            f"A {type(value).__name__} holds itself, so its content can't be told; expected "
            "numbers, text, arrays, modules or functions."
        ) from None
