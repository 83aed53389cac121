"""What reading and saving a trace takes in memory: `python tests/benchmarks/memory.py`.

Prints one line of JSON a case: how far resident memory rose above what it was before, at its
highest, and how many bytes were returned or written. It is a process of its own, so that nothing
else is in its memory; Linux only, which can set the high-water mark back (`/proc/self/clear_refs`).
Run it with `MALLOC_MMAP_THRESHOLD_` set, as `make bench` does: then memory that is freed leaves the
process, and is not reused unseen.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import dit_lens

PROC = Path("/proc/self")
STEPS, BATCH = 30, 4
PAIRS = 16
STREAMS = "blocks.*.hook_resid_post"


def resident(field: str) -> int:
    """VmRSS, or its highest, VmHWM, in bytes."""
    lines = (PROC / "status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return 1024 * int(found)


def case(name: str, work: Callable[[], int], target: float = 1.1) -> None:
    """Print how far memory rose during `work`, what it says it gave, and how often that may be."""
    gc.collect()
    (PROC / "clear_refs").write_text("5")
    before = resident("VmRSS")
    given = work()
    taken = resident("VmHWM") - before
    print(json.dumps({"name": name, "taken": taken, "given": given, "target": target}))


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = dit_lens.load("digits")
    t, y = torch.full((BATCH,), 500), torch.zeros(BATCH, dtype=torch.long)

    def traced(names: str | None) -> dit_lens.Trace:
        with dit_lens.trace(model, names=names) as trace:
            for _ in range(STEPS):
                model.transformer(torch.randn(BATCH, 1, 16, 16), timestep=t, class_labels=y)
        return trace

    def stacked(trace: dit_lens.Trace) -> int:
        return trace.stack("resid_post").nbytes

    def saved(trace: dit_lens.Trace) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return trace.save(Path(folder) / "trace.safetensors").stat().st_size

    recorded, lazy = traced(STREAMS), traced(None)
    stacked(traced(None))  # all code has run once
    case("t.stack, recorded", lambda: stacked(recorded))
    case("t.stack, recomputed", lambda: stacked(lazy))
    case("save, 28 streams", lambda: saved(recorded))
    gaps()


def gaps() -> None:
    """The peak of the gap beside one trajectory of its twins, for shallow and deep models, short
    and long runs. A latent is as large as what a forward of one image takes, so that the model's
    own memory is small beside it.
    """
    from dit_lens.experiments import measure_gap
    from dit_lens.groundtruth import random_weights

    def measured(layers: int, steps: int) -> int:
        truth = random_weights(0, layers, sample_size=64, patch_size=16, in_channels=4)
        model = dit_lens.HookedDiT(truth.transformer, scheduler=truth.scheduler)
        labels = [0]
        measure_gap(model, PAIRS, 4, resamples=10, batch=2, labels=labels)  # all code has run once
        gc.collect()

        def work() -> int:
            measure_gap(model, PAIRS, steps, resamples=10, batch=2, labels=labels)
            return (steps + 1) * 2 * PAIRS * 4 * model.cfg.latent_shape[0] * 64 * 64

        case(f"gap, {layers} layers, {steps} steps", work, target=4)
        return 0

    for layers, steps in ((2, 12), (2, 24), (8, 12)):
        measured(layers, steps)


if __name__ == "__main__":
    main()
