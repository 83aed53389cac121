"""What made a file: versions, the model, the device, the command, the date."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = {"dit_lens": "dit-lens", "torch": "torch", "diffusers": "diffusers"}


@dataclass
class Command:
    """The command that is running.

    Attributes:
        known: what is known of it, by name.
        written: the results that it has written.
    """

    known: dict[str, str]
    written: list[Path] = field(default_factory=list)


COMMAND: ContextVar[Command | None] = ContextVar("command", default=None)


@contextmanager
def made_by(command: str) -> Iterator[None]:
    """Within it, results carry the command line that made them, and are listed by `written`.

    Args:
        command: as it can be pasted again.
    """
    token = COMMAND.set(Command({"command": command}))
    try:
        yield
    finally:
        COMMAND.reset(token)


def made_of(model: str, device: torch.device) -> None:
    """The command that is running is about this model, and has it on this device; nothing outside
    a command.

    Args:
        model: as the command names it.
        device: of its weights.
    """
    if (running := COMMAND.get()) is not None:
        running.known |= {"model": model, "device": device_name(device)}


def wrote(path: Path) -> None:
    """The command that is running has written a result; nothing outside a command."""
    if (running := COMMAND.get()) is not None:
        running.written.append(path)


def written() -> list[Path]:
    """The results that the command that is running has written, each once."""
    running = COMMAND.get()
    return list(dict.fromkeys(running.written)) if running else []


def provenance() -> dict[str, str]:
    """What makes a result, by name; what is not known is left out.

    >>> with made_by("dit-lens gap digits"): provenance()["command"]
    'dit-lens gap digits'
    """
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    running = COMMAND.get()
    return versions() | {"date": date} | (running.known if running else {})


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
