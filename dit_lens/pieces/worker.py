"""One process that runs pieces of a measurement: `python -m dit_lens.pieces.worker FOLDER`, as
`dit_lens.pieces.engines` starts it. The folder holds the call; a mistake of the user's is written
into it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import DitLensError
from .sending import MISTAKE, Call
from .store import Store
from .work import Kept, quiet


def helped(
    packed: bytes, tensors: Any, store: Kept, key: str, threads: int, device: str | None
) -> None:
    """Make a call again and run its pieces, until it needs no more.

    Args:
        packed: the call.
        tensors: beside it.
        store: where pieces are kept.
        key: of the measurement.
        threads: of torch, as where the call was made: other numbers may round otherwise.
        device: where modules go.
    """
    torch.set_num_threads(threads)
    function, arguments = Call.made(packed, tensors, device)
    quiet(lambda: function(**arguments), store, key, arguments.get("model"))


def watch(folder: Path, parent: int) -> None:
    """End this process when the one that started it is gone, which then has not taken its copy of
    the weights away either.

    Args:
        folder: with the call.
        parent: the process that started this one.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(folder: Path, number: str) -> int:
    """Run pieces for the call in a folder, for as long as the process that started this one is
    there.

    Args:
        folder: with the call.
        number: of this worker.
    """
    threading.Thread(target=watch, args=(folder, os.getppid()), daemon=True).start()
    said = json.loads((folder / "call.json").read_text())
    sys.path += [place for place in said["path"] if place not in sys.path]
    device = said["devices"][int(number) % len(said["devices"])]
    try:
        kind = None if device is None else torch.device(device).type
        store = Store(Path(said["store"]), said["about"], device=kind)
        tensors = torch.load(folder / "tensors.pt", mmap=True, weights_only=True)
        packed = (folder / "call.pickle").read_bytes()
        helped(packed, tensors, store, said["key"], said["threads"], device)
        store.close()
    except (DitLensError, OSError) as error:
        (folder / f"mistake-{number}").write_text(" ".join(str(error).split()))
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
