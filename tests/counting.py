"""What a run costs, counted and not timed: forwards, blocks and bytes of tensors."""

import gc
from collections import Counter
from contextlib import contextmanager

import torch


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
