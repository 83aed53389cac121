"""Errors in the code that a user gives to a command: one sentence, with file and line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import DitLensError, InvalidValue


@contextmanager
def of_the_users(made: Any) -> Iterator[None]:
    """Within the block an error in a file of the user's is one sentence.

    Args:
        made: the class or function in it; anything else changes nothing.

    Raises:
        InvalidValue: which names the file, the line and the error.
    """
    try:
        yield
    except DitLensError:
        raise
    except Exception as error:
        if not callable(made) or str(made.__module__).startswith("dit_lens."):
            raise  # ours: a bug
        file = None
        for each in (made, type(made)):  # of an object, which is no function, that of its class
            with suppress(TypeError):
                file = file or inspect.getsourcefile(each)
        own = [at for at in traceback.extract_tb(error.__traceback__) if at.filename == file]
        if not own:
            raise
        name = getattr(made, "__name__", type(made).__name__)
        raise InvalidValue(
            f"{name} failed in {own[-1].filename}, line {own[-1].lineno} ({own[-1].name}): "
            f"{type(error).__name__}: {error}."
        ) from error
