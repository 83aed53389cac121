"""What made a file: versions, the device, the command, the date."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = {"dit_lens": "dit-lens", "torch": "torch", "diffusers": "diffusers"}
COMMAND: ContextVar[dict[str, str] | None] = ContextVar("command", default=None)
"""What is known of the command that is running."""


@contextmanager
def made_by(command: str) -> Iterator[None]:
    """Within it, results carry the command line that made them.

    Args:
        command: as it can be pasted again.
    """
    token = COMMAND.set({"command": command})
    try:
        yield
    finally:
        COMMAND.reset(token)


def made_on(device: torch.device) -> None:
    """The model of the command that is running is on this device; nothing outside a command."""
    if (known := COMMAND.get()) is not None:
        known["device"] = device_name(device)


def provenance() -> dict[str, str]:
    """What makes a result, by name; what is not known is left out.

    >>> with made_by("dit-lens gap digits"): provenance()["command"]
    'dit-lens gap digits'
    """
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return versions() | {"date": date} | (COMMAND.get() or {})


def versions() -> dict[str, str]:
    """The versions of what computes.

    >>> sorted(versions())
    ['diffusers', 'dit_lens', 'torch']
    """
    return {name: _version(package) for name, package in PACKAGES.items()}


def device_name(device: torch.device | str) -> str:
    """A device with the name of its hardware.

    Args:
        device: such as "cuda".

    >>> device_name("cpu").startswith("cpu (")
    True
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its folder
        return "unknown"
