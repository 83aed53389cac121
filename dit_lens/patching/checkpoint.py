"""The file of an interrupted sweep: finished latents by patch, and which sweep they are of.

One safetensors file, always whole: it is written under another name and then renamed. A file of
another sweep is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidValue
from ..sampling.run import Run
from .patch import Planned


def scheduler_text(run: Run) -> str:
    """The class of a run's scheduler and a digest of its settings."""
    scheduler = run.scheduler
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
        digest.update(repr((*about, scheduler_text(run), run.labels.tolist())).encode())
        digest.update(repr([(c.from_step, c.seeds, len(c.edits)) for c in run.history]).encode())
        for kept in (run.latents, run.outputs):  # these depend on the weights
            digest.update(kept.cpu().contiguous().numpy().tobytes())
    for patch in patches:
        digest.update(patch.digest.encode())
    return digest.hexdigest()


class Store:
    """Finished latents [item, c, h, w] by the patch's number, in a file if a path is given.

    Args:
        path: where; None keeps them in memory.
        key: of the sweep, see `sweep_key`.
        patches: how many there are.

    Raises:
        ValueError: for a file of another sweep, or of none.
    """

    def __init__(self, path: str | Path | None, key: str, patches: int) -> None:
        self.path, self.key = None if path is None else Path(path), key
        self.done: dict[int, Tensor] = {}
        self.blocks = 0
        if self.path is not None and self.path.exists():
            try:
                with safe_open(self.path, "pt") as file:
                    meta = file.metadata() or {}
                    mine = meta.get("sweep") == key
                    self.done = {int(p): file.get_tensor(p) for p in file.keys()} if mine else {}
            except SafetensorError as error:
                raise InvalidValue(
                    f"{self.path} is not a file of a sweep ({error}); give another path, or delete "
                    "it."
                ) from None
            if not mine:
                what = (
                    f"of another sweep ({meta['patches']} patches)"
                    if "patches" in meta
                    else "not a file of a sweep"
                )
                raise InvalidValue(
                    f"{self.path} is {what}: other runs, settings or patches than these {patches}; "
                    "give another path."
                )
            self.blocks = int(meta["blocks"])
        self.patches = patches

    def add(self, numbers: list[int], found: Tensor, blocks: int) -> None:
        """Keep the finished latents [patch, item, c, h, w] of these patches.

        Args:
            numbers: which patches they are.
            found: their latents.
            blocks: images x blocks that were run for them.
        """
        self.done |= dict(zip(numbers, found.cpu(), strict=True))
        self.blocks += blocks
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(self.path.name + ".part")
            meta = {"sweep": self.key, "blocks": str(self.blocks), "patches": str(self.patches)}
            save_file({str(p): x.clone().contiguous() for p, x in self.done.items()}, part, meta)
            os.replace(part, self.path)
