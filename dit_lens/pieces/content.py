"""What a value is, as text: equal for equal content, in any process."""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import importlib
import re
import sys
import types
from collections import namedtuple
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import cached_property, lru_cache, partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InvalidState, InvalidType
from ..storage.checksums import checksum_bits

SET_LATER = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "final_alpha_cumprod",
    "alpha_t",
    "sigma_t",
    "lambda_t",
    "_shift",
)
"""What a scheduler's constructor makes of its configuration, and may have been set to something
else since: then the configuration does not say it.
"""

Tell = Callable[[Any], str]
"""The text of a part of a value."""


class _Plain:
    """Without anything that Python does not see."""


_MODULE = frozenset(vars(nn.Module())) | {"forward"}
_HOOKS = re.compile(r"_(forward|backward)(_pre)?_hooks")
_NUMBERS = bool, int, float, str, type(None)
_FIELD = type(vars(namedtuple("_Pair", "first"))["first"])  # of a named tuple
_SLOTS = types.MemberDescriptorType, types.GetSetDescriptorType, _FIELD
_READS = "LOAD_GLOBAL", "LOAD_NAME"


def content(value: Any) -> str:
    """A text that is the same for the same content, and only for it.

    Of a dataclass it holds all fields but those with the metadata {"told": False}, which say how
    it came about in this process. Of a function it holds the code, what it closes over, and the
    globals that it reads; of a class or an object the code of its methods. What is installed is
    taken by name: a store's root has the versions.

    Args:
        value: an argument of a measurement: numbers, text, arrays, modules, functions, and
            collections and dataclasses of these.

    Raises:
        InvalidType: for anything whose content can't be seen.

    >>> content([1, "a"]) == content([1, "a"]) != content([1, "b"])
    True
    """
    return _Told()(value)


def digest(value: Any) -> str:
    """A digest of a value's content, 16 digits.

    Args:
        value: see `content`.

    >>> digest(1) == digest(1.0)
    False
    """
    return hashlib.sha256(content(value).encode()).hexdigest()[:16]


def outline(value: Any) -> str:
    """A digest of all that `content` tells but the numbers in tensors, 16 digits: at once for any
    model.

    Args:
        value: see `content`.

    >>> outline(torch.zeros(2)) == outline(torch.ones(2)) != outline(torch.ones(3))
    True
    """
    return hashlib.sha256(_Told(numbers=False)(value).encode()).hexdigest()[:16]


def config_digest(value: Any) -> str:
    """A digest of the configuration of a model, 16 digits.

    Args:
        value: of diffusers'; what has no configuration has an empty one.
    """
    return digest(_settings(value))


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's weights and buffers, 16 digits: their names, shapes and values, in
    whatever dtype they hold them.

    Args:
        model: a transformer.

    Raises:
        InvalidState: for weights that are offloaded.
    """
    made = hashlib.sha256()
    for name, value in model.state_dict().items():
        if value.device.type == "meta":
            raise InvalidState(
                f"The weights are offloaded ({name} is on no device), so a model can't be told by "
                "them; expected a model without accelerate's cpu_offload or disk_offload."
            )
        held = checksum_bits(value.detach().float()[None]).item() if value.numel() else 0
        made.update(f"{name} {tuple(value.shape)} {held}".encode())
    return made.hexdigest()[:16]


class _Told:
    """The texts of one value's parts, each made once: a part may hold what it is a part of.

    Args:
        numbers: whether those in tensors are told.
    """

    def __init__(self, numbers: bool = True) -> None:
        self.numbers = numbers
        self.texts: dict[int, str] = {}
        self.alive: list[Any] = []

    def __call__(self, value: Any) -> str:
        kind = type(value)
        if kind in _NUMBERS:
            return part_text.dispatch(kind)(value, self)
        if not self.numbers and isinstance(value, Tensor):
            return f"Tensor({value.dtype}, {tuple(value.shape)})"
        if id(value) not in self.texts:
            self.alive.append(value)  # so that no other gets its id
            self.texts[id(value)] = f"part {len(self.texts)}"
            self.texts[id(value)] = self._own(value) + part_text.dispatch(kind)(value, self)
        return self.texts[id(value)]

    def _own(self, value: Any) -> str:
        """What a class of the user's adds to the kind that it is told as, such as a dict's."""
        kind = type(value)
        told = isinstance(value, (nn.Module, type)) or dataclasses.is_dataclass(value)
        if told or part_text.dispatch(kind) is part_text.dispatch(object):
            return ""
        if _is_installed(kind.__module__):
            return ""
        return f"{self(kind)}{self(_held(value))}"


@singledispatch
def part_text(value: Any, tell: Tell) -> str:
    kind = type(value)
    if dataclasses.is_dataclass(value):
        told = [f.name for f in dataclasses.fields(value) if f.metadata.get("told", True)]
        fields = {name: getattr(value, name) for name in told}
        more = {} if _is_installed(kind.__module__) else _held(value)
        return f"{tell(kind)}{tell(fields | more)}"
    if hasattr(value, "config") and hasattr(value, "timesteps"):  # a scheduler of diffusers'
        since = {k: v for k, v in vars(value).items() if k in SET_LATER}
        return f"{tell(kind)}{tell(_settings(value) | since)}"
    # an object of plain Python is its class and what it holds, as for pickle
    own = {name for base in kind.__mro__[:-1] for name in vars(base)}
    if not own & {"__reduce_ex__", "__reduce__", "__getstate__"}:
        if hasattr(value, "__dict__") and kind.__basicsize__ == _Plain.__basicsize__:
            return f"{tell(kind)}{tell(_held(value))}"
    raise InvalidType(
        f"A {kind.__name__} can't be told from another by what it holds, as a store of "
        "pieces needs; expected numbers, text, arrays, modules or functions."
    )


def _held(value: Any) -> dict[str, Any]:
    """The attributes of an object, but for what it has computed of them."""
    found = getattr(value, "__dict__", {})
    made = {k for c in type(value).__mro__ for k, v in vars(c).items() if _is_cached(v)}
    return {k: v for k, v in found.items() if k not in made}


def _is_cached(value: Any) -> bool:
    return isinstance(value, cached_property)


def _settings(value: Any) -> dict[str, Any]:
    """The configuration of a model or a scheduler of diffusers'; of others nothing."""
    config = getattr(value, "config", None)
    config = config if isinstance(config, Mapping) else {}
    return {k: v for k, v in sorted(config.items()) if k[:1] != "_"}


@part_text.register(type(None))
@part_text.register(type(...))
@part_text.register(type(NotImplemented))
@part_text.register(bool)
@part_text.register(int)
@part_text.register(float)
@part_text.register(complex)
@part_text.register(str)
@part_text.register(bytes)
@part_text.register(range)
@part_text.register(slice)
@part_text.register(np.generic)
@part_text.register(torch.dtype)
@part_text.register(torch.device)
def _plain(value: Any, _: Tell) -> str:
    return f"{type(value).__name__}({value!r})"


@part_text.register(Enum)
def _enum(value: Enum, tell: Tell) -> str:
    return f"{tell(type(value))}.{value.name}"


@part_text.register(Path)
def _path(value: Path, _: Tell) -> str:
    return f"Path({str(value)!r})"


@part_text.register(list)
@part_text.register(tuple)
def _sequence(value: Any, tell: Tell) -> str:
    return f"[{', '.join(map(tell, value))}]"


@part_text.register(set)
@part_text.register(frozenset)
def _set(value: Any, tell: Tell) -> str:
    return f"{{{', '.join(sorted(map(tell, value)))}}}"


@part_text.register(Mapping)
@part_text.register(types.MappingProxyType)
def _mapping(value: Mapping[Any, Any], tell: Tell) -> str:
    return f"{{{', '.join(f'{tell(k)}: {tell(v)}' for k, v in value.items())}}}"


@part_text.register(Tensor)
def _tensor(value: Tensor, _: Tell) -> str:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise InvalidType(
            f"A tensor that is {'without data' if value.is_meta else value.layout} can't be told "
            "from another by what it holds, as a store of pieces needs; expected a dense one."
        )
    held = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    raw = held.reshape(-1).view(torch.uint8).numpy() if held.numel() else np.zeros(0, np.uint8)
    return f"Tensor({value.dtype}, {tuple(value.shape)}, {_hash(raw)})"


@part_text.register(np.ndarray)
def _array(value: np.ndarray[Any, Any], tell: Tell) -> str:
    if isinstance(value, np.ma.MaskedArray):
        return f"Masked{tell([value.data, np.ma.getmaskarray(value)])}"
    if value.dtype == object:
        return f"Array({value.shape}, {tell(value.tolist())})"
    raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
    kind = value.dtype.str if value.dtype.names is None else repr(value.dtype)
    return f"Array({kind}, {value.shape}, {_hash(raw)})"


@part_text.register(nn.Module)
def _module(value: nn.Module, tell: Tell) -> str:
    """Its configuration, and of each module in it the class, tensors, hooks and attributes."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in value.modules()):
        raise InvalidType(
            "A scripted module can't be told from another by what it holds, as a store of pieces "
            "needs; expected the module that it was made from."
        )
    parts = [tell(_settings(value))]
    names = {id(module): name for name, module in value.named_modules()}
    for name, module in value.named_modules():
        own = vars(module)
        forward = own.get("forward")
        patch = getattr(_under(forward), "__module__", None)
        if forward is not None and not _is_installed(patch):
            parts.append(tell(forward))
        # of a library's own modules the settings; the rest of what they hold is bookkeeping
        known = _is_installed(type(module).__module__)
        held = {
            key: each
            for key, each in _held(module).items()
            if key not in _MODULE and (not known or (key[0] != "_" and _is_setting(each)))
        }
        tensors = own["_parameters"] | own["_buffers"]
        hooks = [
            [hook for hook in each.values() if getattr(hook, "__module__", "") != COLLECTS]
            for key, each in own.items()
            if _HOOKS.fullmatch(key)
        ]
        parts.append(f"{name} {tell(type(module))}{tell(tensors)}{tell(hooks)}{tell(held)}")
        # one that stands in several places is listed at the first
        inside = {key: child and names[id(child)] for key, child in own["_modules"].items()}
        code = module.code if isinstance(module, torch.fx.GraphModule) else ""
        parts.append(f"{tell(inside)}{module.training}{code}")
    return f"[{', '.join(parts)}]"


def _is_setting(value: Any) -> bool:
    """Numbers, text, and collections of these."""
    if isinstance(value, Mapping):
        return all(map(_is_setting, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return isinstance(value, (*_NUMBERS, torch.dtype))


@part_text.register(types.BuiltinFunctionType)
@part_text.register(types.MethodDescriptorType)
@part_text.register(types.WrapperDescriptorType)
@part_text.register(types.ModuleType)
@part_text.register(np.ufunc)
def _named(value: Any, tell: Tell) -> str:
    named = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    of = getattr(value, "__self__", None)
    bound = of is not None and not isinstance(of, (type, types.ModuleType))
    return f"{named} of {tell(of)}" if bound else named


@part_text.register(type(lru_cache(len)))
def _cached(value: Any, tell: Tell) -> str:
    return f"cached({tell(value.__wrapped__)})"


@part_text.register(partial)
def _partial(value: Any, tell: Tell) -> str:
    return f"partial({tell(value.func)}, {tell(value.args)}, {tell(value.keywords)})"


@part_text.register(types.MethodType)
def _method(value: types.MethodType, tell: Tell) -> str:
    return f"{tell(value.__func__)} of {tell(value.__self__)}"


@part_text.register(types.FunctionType)
def _function(value: types.FunctionType, tell: Tell) -> str:
    named = f"{value.__module__}.{value.__qualname__}"
    closed = [_cell(cell) for cell in value.__closure__ or ()]
    held = [value.__defaults__, value.__kwdefaults__, closed]
    if _is_installed(value.__module__):
        return f"{named}({tell(value.__code__)}, {tell(held)})"
    code, known, more = value.__code__, value.__globals__, vars(value)
    read = {name: known[name] for name in _globals(code) if name in known}
    # [0, 1] and (0, 1) are not the same index
    kinds = [type(each).__name__ for each in (*closed, *read.values())]
    modules = [m for m in (*closed, *read.values()) if isinstance(m, types.ModuleType)]
    parts = [code, held, read, kinds, more, _read_of(modules + _imported(code), _names(code))]
    return f"{named}({', '.join(map(tell, parts))})"


def _read_of(modules: list[Any], names: set[str]) -> dict[str, Any]:
    """What a function may read of modules of the user's, as `helpers.scale`."""
    found: dict[str, Any] = {}
    for module in modules:
        if not _is_installed(module.__name__):
            read = {name: vars(module)[name] for name in sorted(names & vars(module).keys())}
            inner = [m for m in read.values() if isinstance(m, types.ModuleType)]
            found |= _read_of(inner, names - {module.__name__.rpartition(".")[2]})
            found |= {f"{module.__name__}.{name}": each for name, each in read.items()}
    return found


def _imported(code: types.CodeType) -> list[types.ModuleType]:
    """The modules that are imported within a function."""
    found = []
    for each in dis.get_instructions(code):
        if each.opname == "IMPORT_NAME" and not _is_installed(each.argval):
            with suppress(Exception):  # of one that is not there the function will say so
                found.append(importlib.import_module(each.argval))
    inner = [_imported(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return sum(inner, found)


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function, and in functions within it."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not there yet
        return None


@part_text.register(types.CodeType)
def _code(value: types.CodeType, tell: Tell) -> str:
    constants = [tell(each) for each in value.co_consts]
    names = value.co_names, value.co_varnames, value.co_freevars
    # of how it is called and what is tried the instructions say nothing
    taken = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
    tried = getattr(value, "co_exceptiontable", b"")
    return _hash(value.co_code + repr((names, constants, taken, tried)).encode())


def _globals(code: types.CodeType) -> list[str]:
    """The names of the globals that a function reads, also in functions within it."""
    found = {str(i.argval) for i in dis.get_instructions(code) if i.opname in _READS}
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            found |= set(_globals(each))
    return sorted(found)


@part_text.register(type)
def _class(value: type, tell: Tell) -> str:
    named = f"{value.__module__}.{value.__qualname__}"
    if _is_installed(value.__module__):
        return named + _source(value.__module__)
    own = {
        key: _method_of(each)
        for key, each in vars(value).items()
        if isinstance(each, types.FunctionType) or not (key[:2] == key[-2:] == "__")
        if not isinstance(each, _SLOTS) and key != "_abc_impl"
    }
    if issubclass(value, Enum):
        functions = {k: f for k, f in own.items() if isinstance(f, types.FunctionType)}
        own = functions | {k: member.value for k, member in value.__members__.items()}
    return f"{named}({tell(own)}, {tell(value.__bases__)})"


def _method_of(value: Any) -> Any:
    """What a class holds, out of its wrapping."""
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, cached_property):
        return value.func
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _under(forward: Any) -> Any:
    """The function that a patched forward calls."""
    while inner := getattr(forward, "func", None) or getattr(forward, "__func__", None):
        forward = inner
    return forward


COLLECTS = "transformers.utils.output_capturing"
"""Whose hooks only keep what a text encoder answers; it has them once it was used."""
LIBRARIES = frozenset(
    {"accelerate", "diffusers", "numpy", "peft", "safetensors", "torch", "transformers"}
)
"""What models are made with: none of it is the user's work, wherever it lies."""


def _is_installed(name: str | None) -> bool:
    """Whether a module is Python's, a package's or ours, and so is known by its version."""
    name = name or ""  # of a function without a module
    if name.partition(".")[0] in {*sys.stdlib_module_names, *LIBRARIES, "dit_lens"} - {"__main__"}:
        return True
    return _is_packaged(name)


def _is_packaged(name: str) -> bool:
    place = str(getattr(sys.modules.get(name), "__file__", None) or "")
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(place).parts)


@lru_cache
def _source(name: str) -> str:
    """A hash of a library's module that is used from its sources, as diffusers from a checkout, and
    may change without another version; of all others nothing.
    """
    if name.partition(".")[0] not in LIBRARIES or _is_packaged(name):
        return ""
    place = Path(str(getattr(sys.modules.get(name), "__file__", None) or ""))
    return f" {_hash(place.read_bytes())}" if place.is_file() else ""


def _hash(raw: Any) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]
