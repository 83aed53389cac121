"""Tensors with a description in JSON: a sealed safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidValue
from .provenance import device_name, versions
from .seals import EMPTY_SEAL, check_seal, seal
from .writing import replacing


def save_tensors(
    path: str | Path,
    kind: str,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None = None,
) -> Path:
    """Write a safetensors file.

    Args:
        path: the file; its folder is made.
        kind: what it is, and its version, such as "dit_lens.trace/5".
        about: the description, which JSON can hold.
        tensors: by name.
        device: that computed them.

    Returns:
        The path.

    Raises:
        UnwritableFile: where it can't be written.
    """
    made_with = versions() | ({} if device is None else {"device": device_name(device)})
    metadata = {
        "seal": EMPTY_SEAL,
        "kind": kind,
        "versions": json.dumps(made_with),
        "about": json.dumps(about),
    }
    with replacing(path) as part:
        save_file(_separate(tensors), part, metadata)
        _order_header(part)
        seal(part)
    return Path(path)


def _order_header(path: Path) -> None:
    """Put the header in an order of its own, since safetensors writes the metadata in any: so the
    same content is the same file.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content = ordered.encode()
        if len(content) <= size:  # as long, unless something is written otherwise in Rust
            file.seek(8)
            file.write(content.ljust(size))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: contiguous, and no two in the same memory. Only those that
    are not so are copied: what a trace has recorded can be large.
    """
    apart, seen = {}, set()
    for key, value in tensors.items():
        own = value.detach().contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        apart[key] = own
    return apart


def load_tensors(path: str | Path, kind: str, expected: str) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors of a file of `save_tensors`.

    Args:
        path: the file.
        kind: what it should be.
        expected: the same in words.

    Raises:
        MissingFile: if it is not there.
        InvalidValue: if it is damaged, or something else.
    """
    check_seal(path, expected)
    about, tensors = mapped_tensors(path, kind, expected)
    # cloned: in the file tensors lie anywhere, and CPU kernels give other last bits on unaligned
    # memory
    return about, {key: value.clone() for key, value in tensors.items()}


def mapped_tensors(path: str | Path, kind: str, expected: str) -> tuple[Any, dict[str, Tensor]]:
    """The same without the checksum, and without reading the tensors: they are mapped into memory.

    Args:
        path: the file.
        kind: what it should be.
        expected: the same in words.

    Raises:
        InvalidValue: if it is damaged, or something else.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        about = json.loads(metadata.get("about", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InvalidValue(
            f"{str(path)!r} is not a whole file ({error}); expected {expected}."
        ) from None
    if metadata.get("kind") != kind:
        raise InvalidValue(
            f"{str(path)!r} is of the kind {metadata.get('kind')!r}; expected {kind!r}, {expected}."
        )
    return about, tensors
