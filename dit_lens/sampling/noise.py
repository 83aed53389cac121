"""Noise as a pure function of (seed, step, item).

Every item draws from its own generator, made fresh for each step from the item's seed and the step
alone. So an item's noise is the same bit for bit in any batch, in any order, and in any run that
passes through that step: what twins and replays rest on. (torch's CPU generator keeps 32 bits of
its seed: of n streams two are equal with a chance of about n² / 2³³.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.pinned import sent, uses_pinned

START = -1
"""The step of the initial noise, before step 0."""


def generators(seeds: Sequence[int], step: int) -> list[torch.Generator]:
    """One CPU generator for each item at this step, in the form that diffusers' schedulers take."""
    words = (
        np.random.SeedSequence([step - START, seed]).generate_state(1, np.uint64)[0]
        for seed in seeds
    )
    return [torch.Generator().manual_seed(int(word >> np.uint64(1))) for word in words]


def run_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """What the latents of a run are in: float32, and float64 where the model computes in it.

    >>> run_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.promote_types(model_dtype, torch.float32)


def noise(
    seeds: Sequence[int],
    step: int,
    shape: Sequence[int],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [item, *shape], drawn on the CPU in float32, then moved at once, and
    without waiting for the device.

    >>> bool((noise([7, 8], 3, (2, 2))[1] == noise([8], 3, (2, 2))[0]).all())
    True
    """
    device = torch.device(device)
    drawn = torch.empty(len(seeds), *shape, pin_memory=uses_pinned(device))
    for place, generator in zip(drawn, generators(seeds, step), strict=True):
        place.copy_(torch.randn(tuple(shape), generator=generator))
    return sent(drawn, device, dtype)
