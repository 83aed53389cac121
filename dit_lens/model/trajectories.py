"""Where trajectories lie: where the model computes, in the host's memory, or in files."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import arguments
from ..errors import InvalidState, MissingFile

HOST = "cpu"


def checked_place(place: str | Path | None) -> str | None:
    """Where trajectories should lie, as `room` takes it.

    Args:
        place: None, "cpu", or a folder.

    Raises:
        InvalidType: for anything else.
        MissingFile: for a folder that is not there.
    """
    if place is None:
        return None
    if place == HOST:
        return HOST
    expected = "'cpu', or a folder for temporary files"
    folder = Path(arguments.instance("trajectories", place, (str, Path), expected))
    if not folder.is_dir():
        raise MissingFile(
            f"trajectories={str(place)!r} is no folder that is here; expected {expected}."
        )
    return str(folder.absolute())


def room(place: str | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a trajectory or a part of one, with nothing in it yet.

    Args:
        place: as `checked_place` gives it.
        shape: of the tensor.
        like: a tensor of its dtype, on the device of the model.

    Raises:
        InvalidState: where there is no room for it, or the folder can't be written.
    """
    n = torch.Size(shape).numel()
    size = n * like.element_size()
    try:
        if place is None:
            return like.new_empty(tuple(shape))
        if place == HOST:
            return torch.empty(tuple(shape), dtype=like.dtype)
        handle, name = tempfile.mkstemp(dir=place, prefix="dit-lens-")
        with open(handle, "wb") as file:
            try:
                file.truncate(size)
                mapped = torch.from_file(name, shared=True, size=n, dtype=like.dtype)
            finally:
                os.unlink(name)  # from the disk it is gone with the tensor, whatever happens
            if hasattr(os, "posix_fallocate"):  # a disk that fills later would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
    except (OSError, RuntimeError) as error:
        folder = place not in (None, HOST)
        where = repr(place) if folder else f"The memory of {place or like.device}"
        # of an allocator only what happened
        why = getattr(error, "strerror", None) or re.split(r"\.\s|\n", str(error))[0]
        raise InvalidState(
            f"{where} can't take the {size / 1e9:.3g} GB of a trajectory ({why}); expected "
            "trajectories= a folder with room for it, 'cpu', or fewer images or steps."
        ) from error
    return mapped.view(tuple(shape))
