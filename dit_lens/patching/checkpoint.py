"""The file of an interrupted sweep: finished latents by patch, and which sweep they are of.

One safetensors file, always whole: it is written beside and renamed. A file of another sweep is
refused.
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
from ..sampling.loop import prepared
from ..sampling.run import Run
from .patch import Patch


def scheduler_words(run: Run) -> str:
    """The class of a run's scheduler and a digest of its settings."""
    scheduler = prepared(run.model, run.settings)
    config = sorted((k, str(v)) for k, v in scheduler.config.items() if not k.startswith("_"))
    return f"{type(scheduler).__name__} {hashlib.sha256(repr(config).encode()).hexdigest()[:8]}"


def sweep_key(source: Run, target: Run, patches: Sequence[Patch]) -> str:
    """A digest of the two runs and of the patches, in words: of all that finished patches depend
    on.
    """
    digest = hashlib.sha256()
    for run in (source, target):
        digest.update(
            repr(
                (
                    run.settings.eta,
                    run.settings.guidance,
                    scheduler_words(run),
                    run.labels.tolist(),
                )
            ).encode()
        )
        digest.update(repr([(c.from_step, c.seeds, len(c.edits)) for c in run.history]).encode())
        for kept in (run.latents, run.outputs):  # these depend on the weights
            digest.update(kept.cpu().contiguous().numpy().tobytes())
    digest.update("\n".join(map(str, patches)).encode())
    return digest.hexdigest()


class Store:
    """Finished latents [item, c, h, w] by patch, in a file if there is one, which is always whole:
    it is written beside and renamed.
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
                    f"{self.path} is no file of a sweep ({error}); give another path, or delete it."
                ) from None
            if not mine:
                what = (
                    f"of another sweep ({meta['patches']} patches)"
                    if "patches" in meta
                    else "no file of a sweep"
                )
                raise InvalidValue(
                    f"{self.path} is {what}: other runs, settings or patches than these {patches}; "
                    "give another path."
                )
            self.blocks = int(meta["blocks"])
        self.patches = patches

    def add(self, numbers: list[int], found: Tensor, blocks: int) -> None:
        self.done |= dict(zip(numbers, found.cpu(), strict=True))
        self.blocks += blocks
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".part")
            meta = {"sweep": self.key, "blocks": str(self.blocks), "patches": str(self.patches)}
            save_file({str(p): x.clone().contiguous() for p, x in self.done.items()}, beside, meta)
            os.replace(beside, self.path)
