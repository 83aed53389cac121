"""Copies between the host and a device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

KINDS = {"cuda"}
"""The kinds of devices that copy to and from pinned memory while the host goes on."""


def uses_pinned(device: torch.device) -> bool:
    """Whether a device copies to and from pinned memory while the host goes on.

    Args:
        device: the CPU has nothing to copy.
    """
    return device.type in KINDS


def sent(value: Tensor, device: str | torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. What comes from other memory than pinned is read at once, so it may be
    let go of as well.

    Args:
        value: of the host, or on the device already.
        device: where it is wanted.
        dtype: in place of its own.
    """
    device = torch.device(device)
    return value.to(device, dtype or value.dtype, non_blocking=uses_pinned(device))


class Fetched:
    """A tensor on its way to the host, which goes on meanwhile if the device can do that.

    Args:
        value: on a device; it may be changed as soon as this is made. What is on the host already
            is not copied.
    """

    def __init__(self, value: Tensor) -> None:
        alone, self._there = uses_pinned(value.device), None
        self._host = value.to("cpu", non_blocking=alone)
        if alone:
            module: Any = torch.get_device_module(value.device)
            with module.device(value.device):
                self._there = module.Event()
                self._there.record()

    def arrived(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._there is not None:
            self._there.synchronize()
        return self._host


def arrays(values: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as arrays; of a device all are waited for at once.

    Args:
        values: by name.
    """
    fetched = {name: Fetched(value) for name, value in values.items()}
    return {name: each.arrived().numpy() for name, each in fetched.items()}


def synchronize(device: torch.device) -> None:
    """Wait until all is in pinned memory that a device was told to copy there.

    Args:
        device: of any kind.
    """
    if uses_pinned(device):
        torch.get_device_module(device).synchronize(device)
