"""What a run costs that is counted and not timed: `python tests/benchmarks/counts.py`.

Prints one line of JSON a case, with its figure and its target. A process of its own, as `memory.py`
is, and for the same reasons.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from costs import make_model
from diffusers import DDIMScheduler
from memory import resident

import dit_lens
from dit_lens.experiments import measure_gap
from dit_lens.probes import SpectralSplit

sys.path.append(str(Path(__file__).parents[1]))
from elsewhere import WAITS, elsewhere  # type: ignore[import-not-found]  # noqa: E402

ITEMS, STEPS = 96, 12


def grown(probes: list[dit_lens.Probe]) -> float:
    """MiB a step by which resident memory grows while `digits` is traced."""
    model, y = dit_lens.load("digits"), torch.zeros(ITEMS, dtype=torch.long)

    def forwards(n: int) -> int:
        for _ in range(n):
            x = torch.randn(ITEMS, 1, 16, 16)
            model.transformer(x, timestep=torch.full((ITEMS,), 500), class_labels=y)
        gc.collect()
        return resident("VmRSS")

    with dit_lens.trace(model, probes=probes):
        before = forwards(3)
        return (forwards(STEPS) - before) / STEPS / 2**20


def waits() -> float:
    """How often a gap waits for its device, for each of its steps."""
    made = make_model(layers=4, heads=2, d_head=8, channels=1, size=8, classes=4)
    with elsewhere() as device:
        scheduler = DDIMScheduler(1000, clip_sample=False)
        model = dit_lens.HookedDiT(made.to(device), scheduler=scheduler)

        def counted(steps: int) -> int:
            WAITS.clear()
            measure_gap(model, 16, steps, resamples=20)
            return int(WAITS.total())

        return (counted(16) - counted(6)) / 10


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    plain = grown([])
    for name, figure, target in [
        (f"SpectralSplit, {ITEMS} items: MiB a step", grown([SpectralSplit()]) - plain, 0.1),
        ("gap: waits for the device a step", waits(), 5.0),
    ]:
        print(json.dumps({"name": name, "figure": figure, "target": target}))


if __name__ == "__main__":
    main()
