"""What running a reuse plan takes, beside its share of multiply-accumulates: the last part of `make
bench`, or `python tests/benchmarks/reuse_cost.py [--repeats 5]`.

Each plan's run is timed against a plain run right before it. The target, set before anything was
measured, is 1.15 times the share of multiply-accumulates that is left, and 0.03.
"""

import argparse

import torch
from costs import SMALL, SMALL_NAME, WIDE, make_model, seconds, spread, wide_name
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

import dit_lens
from dit_lens.experiments import Plan

STEPS = 10


def plans(model: dit_lens.HookedDiT, times: list[float]) -> dict[str, Plan]:
    """Whole steps, parts, and cells like the squares of a chequer board."""
    layers, later = range(model.cfg.n_layers), range(1, STEPS)
    parts = [(layer, part) for layer in layers for part in ("attn", "mlp")]
    every = [(*place, s) for place in parts for s in later if s % 2]
    lines = [cell for cell in every if cell[2] > 2]
    chequer = [(i, p, s) for i, p in parts for s in later if (s + i + (p == "mlp")) % 2]
    return {
        "every second step": Plan.of(model, times, every),
        "every second step, along lines": Plan.of(model, times, every, lines=lines),
        "attention, all but the first step": Plan.of(
            model, times, [(i, "attn", s) for i in layers for s in later]
        ),
        "every second cell": Plan.of(model, times, chequer),
    }


def show_reuse(
    repeats: int, out: Console, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Measure and print.

    Args:
        repeats: how often each plan is run.
        out: where to.
        device: where the models are.
        dtype: of the wide model.
    """
    small = make_model(**SMALL, device=device)
    wide = make_model(3 if device == "cpu" else 28, **WIDE, device=device, dtype=dtype)
    for transformer, batch, what in (
        (small, 1, SMALL_NAME),
        (small, 16, SMALL_NAME),
        (wide, 1, wide_name(wide)),
    ):
        model = dit_lens.HookedDiT(transformer, scheduler=DDIMScheduler(clip_sample=False))
        labels = [0] * batch

        def run() -> object:
            return dit_lens.sample(model, labels, 0, STEPS)  # noqa: B023

        times = dit_lens.sample(model, labels, 0, STEPS).timesteps.tolist()
        table = Table(
            title=f"A plan's time over the plain run's: {what}, batch {batch}, {STEPS} steps"
        )
        for column in ("held", "MACs left", "time left", "at most", ""):
            table.add_column(column, no_wrap=True)
        for name, plan in plans(model, times).items():
            ratios = []
            for _ in range(repeats):
                plain = seconds(run, 1)
                with dit_lens.reuse(model, plan):
                    ratios.append(seconds(run, 1) / plain)
            most = 1.15 * plan.macs + 0.03
            middle = sorted(ratios)[len(ratios) // 2]
            met = "met" if middle <= most else "missed"
            table.add_row(name, f"{plan.macs:.3f}", spread(ratios, ".3f"), f"{most:.3f}", met)
        out.print(table)
        model.remove()


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--repeats", type=int, default=5)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    show_reuse(ap.parse_args().repeats, Console(width=120))
