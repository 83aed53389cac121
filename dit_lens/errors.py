"""The errors that dit_lens raises for what a user can mend: one base class for all of them.

Each is also the built-in exception that fits, so `except ValueError` works as well as
`except dit_lens.DitLensError`. Anything else that escapes from dit_lens is a bug.
"""

from __future__ import annotations


class DitLensError(Exception):
    """Base of all errors that dit_lens raises on purpose.

    >>> import dit_lens; issubclass(dit_lens.UnknownName, dit_lens.DitLensError)
    True
    """


class InvalidValue(DitLensError, ValueError):
    """An argument, a file or a model with a value that can't be used."""


class InvalidType(DitLensError, TypeError):
    """An argument of a type that can't be used."""


class InvalidState(DitLensError, RuntimeError):
    """The model, trace or run is not in a state in which this can be done."""


class MissingFile(DitLensError, FileNotFoundError):
    """A file that should be there and is not."""


class UnwritableFile(DitLensError, OSError):
    """A file or folder that can't be written."""


__all__ = [
    "DitLensError",
    "InvalidState",
    "InvalidType",
    "InvalidValue",
    "MissingFile",
    "UnwritableFile",
]
