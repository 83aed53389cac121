"""What a run costs, counted and not timed: forwards, blocks, images decoded, host synchronisations
and bytes of live tensors.
"""

import gc
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_lens.tracing import series

WAITING = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
SCALARS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}


class _Asked(TorchFunctionMode):
    """Python's questions to a tensor, which wait for its device."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING and args and isinstance(args[0], torch.Tensor):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    """The scalars that are read, wherever the question comes from, and what moves."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in SCALARS:
            self.found[name] += 1
        if name == "aten::_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_syncs():
    """How often the host would have waited for a device inside the block, by kind. On the CPU
    nothing waits, and all tensors count, those of a scheduler's tables too.
    """
    found = Counter()
    with _Asked(found), _Dispatched(found), patch.object(series, "HOST", "not this"):
        yield found


@contextmanager
def peak_bytes():
    """The most bytes of tensors that were taken inside the block, by torch's own allocator."""
    gc.collect()
    found = Counter()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        yield found
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        found["most"] = max(found["most"], now)
    found["kept"] = now


@contextmanager
def forwards(transformer):
    """The images of each forward of a transformer, and of each of its blocks."""
    seen = {"forwards": [], "blocks": []}
    blocks = transformer.transformer_blocks
    handles = [
        transformer.register_forward_pre_hook(
            lambda m, a, k: seen["forwards"].append(len(a[0] if a else k["hidden_states"])),
            with_kwargs=True,
        )
    ]
    handles += [
        b.register_forward_pre_hook(
            lambda m, a, k: seen["blocks"].append(len(a[0] if a else k["hidden_states"])),
            with_kwargs=True,
        )
        for b in blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
