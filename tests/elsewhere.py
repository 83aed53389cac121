"""A device that is not the CPU, for machines that have no other: `with elsewhere() as device`.

Inside, "away" is a device of PyTorch's. What lies there is held in a CPU tensor, so all figures are
the CPU's; but an operation on tensors of two devices fails as on a GPU, NumPy can't see what lies
there, and every time that the host would wait for the device is counted, with the line that asked.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from dit_lens.model import pinned

ASKS = {"_local_scalar_dense", "is_nonzero", "nonzero", "_unique2", "masked_select", "equal"}
"""Operators whose answer, or the shape of it, the host needs."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""They take indices from the host, and wait for them to arrive."""
WAITS: Counter = Counter()
"""How often the host waited, by the line of dit_lens that asked."""
OURS = [str(Path(__file__).parents[1] / folder) + "/" for folder in ("dit_lens", "probes")]

_OPEN = []
"""Holds something while the device is there: the dtypes that it lacks."""


class _Hook(_DummyPrivateUse1Hook):
    """Whether the device is there."""

    def is_available(self):
        return bool(_OPEN)


class _Backend(_DummyBackendModule):
    """What PyTorch asks a device's module for."""

    def is_available(self):
        return bool(_OPEN)

    def device_count(self):
        return len(_OPEN)

    def get_rng_state(self, _device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def manual_seed(self, seed):
        pass

    def device(self, _device):
        return nullcontext()

    def synchronize(self, _device=None):
        _waited("synchronized")

    class Event:
        """Of a step ago when it is waited for, which is no wait."""

        def record(self):
            pass

        def synchronize(self):
            pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class Away(Tensor):
    """A tensor on the device; its values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_device(),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __init__(self, held, requires_grad=False):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self):
        return f"Away({self.held!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = _again(self.held.clone(), *self._kind())
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _again, (self.held, *self._kind())

    def _kind(self):
        return self.requires_grad, isinstance(self, torch.nn.Parameter)


def _again(held, requires_grad, parameter):
    made = Away(held)
    if parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)


def _device():
    return torch.device("away:0")


def _is_away(value):
    return isinstance(value, Away)


def _held(value):
    return value.held if _is_away(value) else value


def _there(device):
    return device is not None and torch.device(device).type == "away"


def _waited(why):
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(tuple(OURS)):
        frame = frame.f_back
    place = frame and f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    WAITS[f"{place}: {why}"] += 1


def _tensors(values):
    """The tensors in what an operator is given: values, and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mapped(fn, value):
    """A value with its tensors replaced, quicker than by `tree_map`."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(fn, each) for each in value])
    return value


def _run(func, args, kwargs):
    """One operator, on the tensors that the device's hold."""
    name = func.name().partition("::")[2].partition(".")[0]
    tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
    away = [a for a in tensors if _is_away(a)]
    if name == "copy_":
        if len(away) == 1 and not (len(args) > 2 and args[2]):
            _waited("copied")
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    device = kwargs.get("device")
    moves = name == "_to_copy" and device is not None and _there(device) != bool(away)
    if moves and not kwargs.get("non_blocking"):
        _waited("moved")
    if away and not moves:
        from_host = [a for a in tensors if not _is_away(a) and a.ndim]
        if from_host and not (name in INDEXING and _is_away(args[0])):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"away:0 and cpu! ({name})"
            )
        by = [a for a in args[1] if isinstance(a, Tensor)] if name in INDEXING else []
        masks = any(a.dtype == torch.bool for a in by)
        if from_host or name in ASKS or masks:
            _waited(name)
    own = {**kwargs, "device": torch.device("cpu")} if _there(device) else dict(kwargs)
    for without in ("pin_memory", "non_blocking"):
        own.pop(without, None)
    found = func(*_mapped(_held, args), **{k: _mapped(_held, v) for k, v in own.items()})
    if not (_there(device) if device is not None else away):
        return found
    same = {id(a.held): a for a in away}  # what an operator on the spot gives is its argument

    def there(value):
        if _OPEN and value.dtype in _OPEN[-1]:
            raise TypeError(f"Cannot convert a tensor of 'away' to {value.dtype}.")
        return same[id(value)] if id(value) in same else Away(value)

    return _mapped(there, found)


class _Operators(TorchDispatchMode):
    """Takes what makes tensors on the device."""

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Takes the functions that never come to an operator of Python's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not _is_away(args[0]):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if not args or not _is_away(args[0]):
            return func(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _indices(args[1]), *args[2:])
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to("away")
        if func is Tensor.tolist:
            _waited("tolist")
            return args[0].held.tolist()
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert away:0 device type tensor to numpy.")
        if func in (Tensor.untyped_storage, Tensor.data_ptr):
            return func(args[0].held)
        return func(*args, **kwargs)


def _moved(x, *args, device=None, dtype=None, non_blocking=False, copy=False, memory_format=None):
    for i, given in enumerate(args):
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, (str, torch.device)):
            device = given
        elif isinstance(given, bool):
            non_blocking = given if i < 2 else non_blocking
    dtype = x.dtype if dtype is None else dtype
    device = x.device if device is None else torch.device(device)
    if (dtype, device.type) == (x.dtype, x.device.type) and not copy:
        return x
    return torch.ops.aten._to_copy(x, dtype=dtype, device=device, non_blocking=non_blocking)


def _indices(index):
    """Lists become tensors on the host, as PyTorch makes of them."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_more):
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


# for good, since PyTorch has no way to take a device back, and at once: autograd starts a thread
# for each device that there is
_setup_privateuseone_for_python_backend("away", _Backend(), _Hook())


@contextmanager
def elsewhere(lacks=()):
    """The device's name, inside of which it is there. It may lack dtypes, as Apple's has no
    float64.
    """
    WAITS.clear()
    _OPEN.append(lacks)
    try:
        with _Functions(), _Operators(), patch.object(pinned, "KINDS", {"away"}):
            yield "away"
    finally:
        _OPEN.clear()
