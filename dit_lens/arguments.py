"""Checks of arguments at the door of every public function, one function for each kind of argument.

Each gives the value back in Python's own type, or raises before anything is run. NumPy's and
torch's scalars are numbers, bools are not, and a whole number may be written as a float without a
fraction nowhere: `layer=0.5` and `layer=1.0` are both slips. Every refusal is one sentence: the
argument with its value, what was expected, the nearest right thing.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import DitLensError, InvalidState, InvalidType, InvalidValue

MANY = 10**8
"""Nothing that is counted here (pairs, steps, resamples, images) is more than this."""
LAST_SEED = 2**63 - 1
Word = TypeVar("Word", bound=str)


def refusal(
    name: str, value: Any, expected: str, nearest: object = None, *, wrong_type: bool = False
) -> DitLensError:
    """The error for an argument, to be raised.

    >>> str(refusal("steps", 0, "a whole number of 1 or more", 1))
    "steps=0 can't be used; expected a whole number of 1 or more (nearest: 1)."
    """
    near = "" if nearest is None else f" (nearest: {nearest})"
    kind = InvalidType if wrong_type else InvalidValue
    return kind(f"{name}={shown(value)} can't be used; expected {expected}{near}.")


def shown(value: Any) -> str:
    """A value in a few words: tensors and arrays by their shape.

    >>> shown("abc"), shown(torch.zeros(2, 3))
    ("'abc'", 'a tensor [2, 3] of float32')
    """
    if isinstance(value, (Tensor, np.ndarray)):
        plain = isinstance(value, np.ndarray) or (
            value.layout == torch.strided and not value.is_meta
        )
        if plain and (value.ndim == 0 or (value.ndim == 1 and len(value) <= 8)):
            return str(value.tolist())
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        if isinstance(value, Tensor) and value.layout != torch.strided:
            kind = "a sparse tensor"
        return f"{kind} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if type(value) in (tuple, list, dict) and len(value) <= 8:
        held = value.values() if type(value) is dict else value
        if any(isinstance(each, Tensor) for each in held):
            return f"a {type(value).__name__} of {', '.join(map(shown, held))}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a stranger's repr
        text = f"a {type(value).__name__}"
    return cut(text)


def cut(text: str, most: int = 80) -> str:
    """A text of at most so many characters, the last three dots where it is longer.

    Args:
        text: one line.
        most: how many.

    >>> cut("a photograph", 8)
    'a pho...'
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of Python's, NumPy's or torch's."""
    if isinstance(value, bool) or _shape(value) or _is_bool(value):
        return False
    return hasattr(type(value), "__index__") and not _is_float(value)


def whole(
    name: str, value: Any, least: int | None = None, most: int | None = MANY, why: str = ""
) -> int:
    """A whole number.

    Args:
        name: of the argument.
        value: of the argument.
        least: the smallest that is allowed, if there is one.
        most: the largest.
        why: behind the bounds, what they are there for.

    >>> whole("steps", np.int64(3), 1), whole("steps", torch.tensor(3), 1)
    (3, 3)
    """
    if least is None:
        expected = "a whole number" if most in (None, MANY) else f"a whole number up to {most}"
    elif most in (None, MANY, LAST_SEED):
        expected = f"a whole number of {least} or more"
    else:
        expected = f"a whole number from {least} to {most}"
    expected += why and f", {why}"
    if not is_whole(value):
        found = _as_float(value)
        near = None if found is None else _within(round(found), least, most)
        raise refusal(name, value, expected, near, wrong_type=not _is_number(value))
    found = operator.index(value)
    if found != _within(found, least, most):
        raise refusal(name, found, expected, _within(found, least, most))
    return found


def seed(name: str, value: Any) -> int:
    """A seed: a whole number from 0."""
    return whole(name, value, 0, LAST_SEED)


def number(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    why: str = "",
) -> float:
    """A finite number.

    Args:
        name: of the argument.
        value: of the argument.
        least: the smallest that is allowed, if there is one.
        most: the largest, if there is one.
        above: in place of `least`, a bound that is not allowed itself.
        why: behind the bounds, what they mean.

    >>> number("eta", np.float32(0.5), 0, 1)
    0.5
    """
    expected = "a finite number"
    if above is not None:
        expected += f" above {above:g}"
    if least is not None:
        expected += f" from {least:g} to {most:g}" if most is not None else f" of {least:g} or more"
    elif most is not None:
        expected += f" and at most {most:g}" if above is not None else f" of at most {most:g}"
    expected += why and f", {why}"
    if not _is_number(value):
        raise refusal(name, value, expected, wrong_type=True)
    found = _as_float(value)
    if found is None or (above is not None and found <= above):
        raise refusal(name, value, expected)
    if found != _within(found, least, most):
        raise refusal(name, value, expected, f"{_within(found, least, most):g}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False, in Python's or NumPy's type."""
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, value, "True or False", wrong_type=True)
    return bool(value)


def choice(name: str, value: Word, options: Iterable[Word]) -> Word:
    """One of a few words.

    >>> try: choice("form", "mixed", ["mix", "joint"])
    ... except ValueError as error: print(error)
    form='mixed' can't be used; expected one of 'mix', 'joint' (nearest: 'mix').
    """
    words = list(options)
    if isinstance(value, str) and value in words:
        return value
    expected = f"one of {', '.join(map(repr, words))}"
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0)[0]
    raise refusal(name, value, expected, repr(near), wrong_type=not isinstance(value, str))


def text(name: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        wrong_type = not isinstance(value, str)
        raise refusal(name, value, "a string that is not empty", wrong_type=wrong_type)
    return value


def path(name: str, value: Any) -> Path:
    """Where a file is or goes."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        wrong_type = not isinstance(value, (str, Path))
        raise refusal(name, value, "the path of a file", wrong_type=wrong_type)
    return Path(value)


def function(name: str, value: Any, takes: str) -> Any:
    """Something that can be called; `takes` shows how, such as "fn(activation, hook)"."""
    if not callable(value) or isinstance(value, type):
        raise refusal(name, value, f"a function {takes}", wrong_type=True)
    return value


def instance(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
    """An object of a class; `expected` says which, and how one is made."""
    if not isinstance(value, kinds):
        raise refusal(name, value, expected, wrong_type=True)
    return value


def listed(name: str, value: Any, expected: str, fewest: int = 1) -> list[Any]:
    """A collection as a list; no string, no single value, and no iterator, which can be read once
    only.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = list(value)
    is_list = isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes))
    if not is_list or len(value) < fewest:
        nearest = f"[{value!r}]" if is_whole(value) or isinstance(value, str) else None
        raise refusal(name, value, expected, nearest, wrong_type=not is_list)
    return list(value)


def wholes(
    name: str,
    value: Any,
    least: int,
    most: int,
    *,
    fewest: int = 1,
    why: str = "",
) -> list[int]:
    """Several whole numbers between bounds.

    Args:
        name: of the argument.
        value: of the argument: a list, a range, an array, ...
        least: the smallest that is allowed.
        most: the largest.
        fewest: how many there have to be.
        why: behind the bounds, what they mean.

    >>> wholes("layers", range(3), 0, 5)
    [0, 1, 2]
    """
    several = f"{fewest} or more whole numbers" if fewest else "whole numbers"
    bounds = f"of {least} or more" if most >= MANY else f"from {least} to {most}"
    found = listed(name, value, f"{several} {bounds}{why and f', {why}'}", fewest)
    return [whole(f"{name}[{i}]", v, least, most, why) for i, v in enumerate(found)]


def layers(value: Any, n: int, *, name: str = "layers", fewest: int = 1) -> list[int]:
    """Layers of a model of `n`, each once; negative ones count from the end, as in Python.

    >>> layers([0, -1], 28)
    [0, 27]
    """
    found = [layer % n for layer in wholes(name, value, -n, n - 1, fewest=fewest)]
    return unlike(name, found)


def unlike(name: str, value: list[Any]) -> list[Any]:
    """The list, if nothing is in it twice."""
    if len(set(value)) < len(value):
        twice = next(v for v in value if value.count(v) > 1)
        raise InvalidValue(
            f"{name} has {shown(twice)} {value.count(twice)} times; expected each once."
        )
    return value


Index = int | slice | Sequence[int] | Tensor


def index(name: str, value: Any) -> int | slice | Tensor:
    """Which places of an axis, whose length is not known yet: a whole number, a slice, several
    numbers, or a mask (bool, of any number of axes).

    >>> index("heads", [0, 2])
    tensor([0, 2])
    """
    expected = "a whole number, a slice, a list of whole numbers, or a mask"
    if is_whole(value):
        return whole(name, value, -MANY)
    if isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            if part is not None and (not is_whole(part) or operator.index(part) == 0 == value.step):
                raise refusal(name, value, "a slice of whole numbers", wrong_type=True)
        return slice(
            *(
                None if part is None else operator.index(part)
                for part in (value.start, value.stop, value.step)
            )
        )
    if isinstance(value, (bool, str, bytes, float)) or not isinstance(
        value, (Sequence, Tensor, np.ndarray, set, frozenset)
    ):
        raise refusal(name, value, expected, wrong_type=True)
    try:
        found = torch.as_tensor(
            value if isinstance(value, (Tensor, np.ndarray)) else list(value), device="cpu"
        )
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise refusal(name, value, expected, wrong_type=True) from None
    if not found.numel() or (found.dtype == torch.bool and not found.any()):
        raise InvalidValue(
            f"{name}={shown(value)} chooses nothing; expected at least one, or None for all."
        )
    if found.dtype == torch.bool and found.ndim:
        return found.clone()  # what happens to the caller's tensor later is not meant
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise refusal(name, value, expected, wrong_type=True)
    return found.long().clone()


def positions(name: str, value: Any, size: int, *, axis: str = "") -> Tensor:
    """The places of an axis of this length that an index chooses, in its order.

    Args:
        name: of the argument.
        value: of the argument, as `index` takes it.
        size: of the axis.
        axis: what it is called in the error, if not as the argument.

    >>> positions("items", slice(1, None), 4)
    tensor([1, 2, 3])
    """
    chosen, axis = index(name, value), axis or name
    if isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
        chosen = chosen.flatten()
        if len(chosen) != size:
            raise InvalidValue(f"The {axis} mask has {len(chosen)} entries; expected {size}.")
    if isinstance(chosen, slice):
        found = torch.tensor(range(size)[chosen], dtype=torch.long)
    else:
        numbers = torch.as_tensor(chosen).reshape(-1)
        if numbers.dtype == torch.bool:
            found = numbers.nonzero()[:, 0]
        else:
            outside = [n for n in numbers.tolist() if not -size <= n < size]
            if outside:
                raise InvalidValue(
                    f"{axis} index {outside[0]} is out of range; expected 0 to {size - 1}."
                )
            found = numbers % size
    if not len(found):
        raise InvalidValue(
            f"{name}={shown(value)} chooses nothing of {size}; expected at least one, or None for "
            "all."
        )
    return found


def tensor(
    name: str, value: Any, shape: Sequence[int | None] | None = None, *, finite: bool = False
) -> Tensor:
    """A tensor of floating-point numbers.

    Args:
        name: of the argument.
        value: of the argument.
        shape: that it has to have, None for a length that does not matter; None is any.
        finite: whether infinities and NaN are refused, which waits for the device.
    """
    wanted = "" if shape is None else f" {['any' if n is None else n for n in shape]}"
    expected = f"a tensor{wanted} of floating-point numbers".replace("'any'", "...")
    if not isinstance(value, Tensor):
        raise refusal(name, value, expected, wrong_type=True)
    if not value.is_floating_point():
        raise refusal(name, value, expected, "x.float()", wrong_type=True)
    if shape is not None and (
        value.ndim != len(shape)
        or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True))
    ):
        raise refusal(name, value, expected)
    if finite and not value.isfinite().all():
        raise InvalidValue(
            f"{name} holds values that are not finite; expected{expected.removeprefix('a')}."
        )
    return value


def array(name: str, value: Any, ndim: int | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers as an array of float64; `ndim` is how many axes it has to have, if that matters."""
    axes = "" if ndim is None else f" of {ndim} {'axis' if ndim == 1 else 'axes'}"
    try:
        found = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if found.dtype.kind not in "iuf":
            raise TypeError
        found = found.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise refusal(name, value, f"an array of numbers{axes}", wrong_type=True) from None
    if ndim is not None and found.ndim != ndim:
        raise refusal(name, value, f"an array of numbers{axes}")
    return found


def optional(check: Callable[..., Any], name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """None, or what the check gives."""
    return None if value is None else check(name, value, *args, **kwargs)


def has_float64(device: str | torch.device) -> bool:
    """Whether a device computes in double precision; Apple's does not.

    >>> has_float64("cpu")
    True
    """
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def require_float64(device: str | torch.device) -> None:
    """Raise InvalidValue for a device that can't compute what measurements are reduced to."""
    if not has_float64(device):
        raise InvalidValue(
            f"The device {str(device)!r} has no float64, in which measurements are made; expected "
            "the model on 'cpu' or 'cuda' (samples, traces and probes work here)."
        )


def require_cpu_by_default() -> None:
    """Raise InvalidState where PyTorch makes its tensors on a device by default: small tables that
    are meant for the host would be made there.
    """
    found = torch.get_default_device()
    if found.type != "cpu":
        raise InvalidState(
            f"PyTorch's default device is {str(found)!r}, where dit_lens's tables would be made "
            f"too; expected torch.set_default_device(None), and the model on {str(found)!r}."
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, (Tensor, np.ndarray)) else ()


def _is_bool(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype == torch.bool or dtype == np.bool_ if dtype is not None else False


def _is_float(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (float, complex, np.inexact)) or (
        isinstance(value, np.ndarray) and value.dtype.kind not in "iu"
    )


def _is_number(value: Any) -> bool:
    """Whether this is one real number, whole or not."""
    if is_whole(value):
        return True
    if isinstance(value, bool) or _shape(value) or _is_bool(value):
        return False
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, (float, np.floating)) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "f"
    )


def _as_float(value: Any) -> float | None:
    """The finite number that this is, if it is one."""
    try:
        found = float(value) if _is_number(value) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _within(value: Any, least: Any, most: Any) -> Any:
    """The nearest value between the bounds."""
    if least is not None and value < least:
        return least
    return most if most is not None and value > most else value


def sized(name: str, value: Collection[Any], n: int, what: str) -> None:
    """Refuse a collection of another length."""
    if len(value) != n:
        raise InvalidValue(f"There are {len(value)} {name}; expected {n}, one for each {what}.")


def device(name: str, value: Any) -> torch.device:
    """A device of torch's, or its name."""
    try:
        return torch.device(value) if isinstance(value, (str, torch.device)) else value.device
    except (RuntimeError, AttributeError):
        wrong_type = not isinstance(value, str)
        raise refusal(name, value, "a device such as 'cpu'", wrong_type=wrong_type) from None
