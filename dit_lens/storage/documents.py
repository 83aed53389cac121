"""JSON files with a checksum: small enough to be read by people, and held to what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import arguments
from ..errors import InvalidValue, MissingFile
from .writing import replacing


def save_document(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a document with its checksum.

    Args:
        path: the file.
        content: what it holds; "format" says what it is, with a version.

    Raises:
        UnwritableFile: where it can't be written.
    """
    path = arguments.path("path", path)
    with replacing(path) as part:
        part.write_text(json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n")
    return path


def load_document(path: str | Path, kind: str, what: str, expected: str) -> dict[str, Any]:
    """Read a document.

    Args:
        path: a file that `save_document` wrote.
        kind: its "format".
        what: it is, for errors: "a plan".
        expected: the file to give, for errors.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: for another file, or one that is not as it was written.
    """
    path = arguments.path("path", path)
    where = repr(str(path))
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingFile(f"There is no file {where}; expected {expected}.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidValue(f"{where} is not JSON ({reason}); expected {expected}.") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise InvalidValue(f"{where} is not {what} of this version; expected {expected}.")
    if content.pop("sha256", None) != _checksum(content):
        raise InvalidValue(
            f"{where} is damaged: it is not what was written, by its checksum; expected {expected}."
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
