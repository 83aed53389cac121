"""Silence of the libraries that load a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers, and transformers where it is installed, from printing bars and hints."""
    there = [name for name in ("diffusers", "transformers") if find_spec(name) is not None]
    loggers: list[Any] = [import_module(f"{name}.utils.logging") for name in there]
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
