"""Seals: the SHA-256 of a whole file, written into the file, with the seal's own digits as zeros.

A seal tells damage and foreign files. It is no signature, so what is read is held against a schema
too (`dit_lens.storage.schema`).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from pathlib import Path
from typing import IO

from ..errors import InvalidValue, MissingFile

SEAL = b"sha256 of this file with zeros here: "
DIGITS = 64
SEALED = re.compile(re.escape(SEAL) + rb"([0-9a-f]{%d})" % DIGITS)
HEAD = 1 << 27
"""Bytes at the start of a file among which its seal is: more than a safetensors header may have."""
EMPTY_SEAL = SEAL.decode() + "0" * DIGITS
"""What is written into a file for `seal` to fill."""


def seal(path: Path) -> None:
    """Put the digest of a file into the place that was left for it."""
    with path.open("r+b") as file:
        found = _found(file)
        assert found is not None, "written with EMPTY_SEAL"
        digest = _digest(file, found[0])
        file.seek(found[0])
        file.write(digest)


def _found(file: IO[bytes]) -> tuple[int, bytes] | None:
    """Where the digits of a file's seal begin, and what they are."""
    if not os.fstat(file.fileno()).st_size:
        return None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = SEALED.search(content, 0, HEAD)
        return found and (found.start(1), bytes(found[1]))


def _digest(file: IO[bytes], digits: int) -> bytes:
    """The SHA-256 of a file, with zeros where its seal's digits are.

    Args:
        file: an open file.
        digits: where they begin.
    """
    total = hashlib.sha256()
    file.seek(0)
    total.update(file.read(digits))
    total.update(b"0" * DIGITS)
    file.seek(digits + DIGITS)
    while block := file.read(1 << 22):
        total.update(block)
    return total.hexdigest().encode()


def is_whole(path: str | Path) -> bool:
    """Whether a file has its seal, and holds what was sealed.

    Args:
        path: the file.
    """
    try:
        check_seal(path, "")
    except (InvalidValue, MissingFile):
        return False
    return True


def check_seal(path: str | Path, expected: str) -> None:
    """Refuse a file of which anything has changed since it was written.

    Args:
        path: the file.
        expected: what it should be, such as "a trace written by Trace.save".

    Raises:
        MissingFile: if it is not there.
        InvalidValue: if it is not as it was written, or was not written by dit_lens.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            found = _found(file)
            whole = found is not None and _digest(file, found[0]) == found[1]
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"There is no file {str(path)!r}; expected {expected}.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidValue(
            f"{str(path)!r} can't be read ({reason}); expected {expected}."
        ) from None
    if found is None:
        raise InvalidValue(
            f"{str(path)!r} has no seal of this version of dit_lens, or a damaged one; expected "
            f"{expected}."
        )
    if not whole:
        raise InvalidValue(
            f"{str(path)!r} is damaged: it is not what was written, by its checksum; expected "
            f"{expected}."
        )
