"""The file of an interrupted sweep: finished latents by patch, and which sweep they are of.

One safetensors file, always whole and sealed (`dit_lens.storage`). A file of another sweep is
refused, and so is one that another process is filling.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..sampling.run import Run
from ..storage import load_tensors, locked, save_tensors
from ..storage.schema import Schema, Size, conform
from .patch import Planned

FORMAT = "dit_lens.patching.sweep/2"
EXPECTED = "the file of a sweep"


class About(Schema):
    """What the file says: which sweep, how many images x blocks were run, for how many patches."""

    sweep: str
    blocks: Size
    patches: Size


def scheduler_text(scheduler: Any) -> str:
    """The class of a scheduler and a digest of its settings."""
    config = sorted((k, str(v)) for k, v in scheduler.config.items() if not k.startswith("_"))
    return f"{type(scheduler).__name__} {hashlib.sha256(repr(config).encode()).hexdigest()[:8]}"


def sweep_key(source: Run, target: Run, patches: Sequence[Planned]) -> str:
    """A digest of all that finished patches depend on: the two runs, and what each patch does.

    A run's edits are functions, which have no content to compare, so they are only counted. That is
    enough: edits that do something else leave other latents, and these are compared to the bit.
    """
    digest = hashlib.sha256()
    for run in (source, target):
        settings = run.settings
        about = (settings.eta, settings.guidance, settings.guided_channels)
        digest.update(repr((*about, scheduler_text(run.scheduler), run.labels.tolist())).encode())
        digest.update(repr([(c.from_step, c.seeds, len(c.edits)) for c in run.history]).encode())
        for kept in (run.latents, run.outputs):  # these depend on the weights
            digest.update(kept.cpu().contiguous().numpy().tobytes())
    for patch in patches:
        digest.update(patch.digest.encode())
    return digest.hexdigest()


class Store:
    """Finished latents [item, c, h, w] by the patch's number, in a file if a path is given. In a
    `with` block the file is this process's alone.

        with Store(path, key, len(patches), target.latents) as store:
            store.add([0, 1], found, blocks)

    Args:
        path: where; None keeps them in memory.
        key: of the sweep, see `sweep_key`.
        patches: how many there are.
        like: latents as a patch has them.

    Raises:
        ValueError: on entering, for a file of another sweep, or of none, or a damaged one.
        RuntimeError: on entering, if another process is at the same sweep.
        OSError: where the file can't be written.
    """

    def __init__(self, path: str | Path | None, key: str, patches: int, like: Tensor) -> None:
        self.path, self.key = None if path is None else Path(path), key
        self.patches, self.like = patches, like
        self.done: dict[int, Tensor] = {}
        self.blocks = 0
        self.kept = ExitStack()

    def __enter__(self) -> Store:
        if self.path is not None:
            with ExitStack() as stack:
                stack.enter_context(locked(self.path))
                if self.path.exists():
                    self._read(self.path)
                self.kept = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()

    def _read(self, path: Path) -> None:
        """What is in the file."""
        advice = f"{EXPECTED}; give another path, or delete it"
        said, tensors = load_tensors(path, FORMAT, advice)
        about = conform(said, About, repr(str(path)))
        if about.sweep != self.key or about.patches != self.patches:
            raise InvalidValue(
                f"{path} is of another sweep ({about.patches} patches): other runs, settings or "
                f"patches than these {self.patches}; give another path."
            )
        for name, found in tensors.items():
            number = int(name) if re.fullmatch("[0-9]{1,9}", name) else self.patches
            if number >= self.patches or found.shape != self.like.shape:
                raise InvalidValue(
                    f"{path} has {list(found.shape)} for patch {name!r:.40}; expected "
                    f"{list(self.like.shape)} for each of {self.patches}: {advice}."
                )
            if found.dtype != self.like.dtype or not bool(torch.isfinite(found).all()):
                raise InvalidValue(
                    f"{path} has {found.dtype} latents for patch {number}, or some that are not "
                    f"finite; expected finite {self.like.dtype}: {advice}."
                )
            self.done[number] = found
        self.blocks = about.blocks

    def add(self, numbers: list[int], found: Tensor, blocks: int) -> None:
        """Keep the finished latents [patch, item, c, h, w] of these patches. Those that are not
        finite are not put into the file: they are run again.

        Args:
            numbers: which patches they are.
            found: their latents.
            blocks: images x blocks that were run for them.
        """
        self.done |= dict(zip(numbers, found.cpu(), strict=True))
        self.blocks += blocks
        if self.path is not None:
            about = About(sweep=self.key, blocks=self.blocks, patches=self.patches).model_dump()
            finite = {str(p): x for p, x in self.done.items() if bool(torch.isfinite(x).all())}
            save_tensors(self.path, FORMAT, about, finite, self.like.device)
