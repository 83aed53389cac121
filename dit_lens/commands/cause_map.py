"""Map where and when a model can be changed: the effect of a hold by layer, step and band."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    Answer,
    add_device,
    add_labels,
    add_model,
    add_seed,
    add_size,
    at_least,
    batch_of,
    count,
    frequency,
    labels_of,
    open_model,
    progress_bar,
    refuse,
    seed,
    stored,
)
from .keeping import add_store, keeping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.cause_map` takes."""
    add_model(parser)
    parser.add_argument(
        "--kind",
        choices=["hold", "zero", "mean"],
        default="hold",
        help="what is put in: what was added a step before, nothing, or the mean (default: hold)",
    )
    parser.add_argument("--sites", nargs="+", help="attn, mlp, ..., block (default: every part)")
    parser.add_argument(
        "--items", type=at_least(8), help="samples, 8 or more (default: 16; with --quick 8)"
    )
    parser.add_argument("--steps", type=count, help="denoising steps (default: 50; --quick 12)")
    parser.add_argument("--quick", action="store_true", help="fewer samples and steps")
    parser.add_argument(
        "--check", type=seed, help="so many cells are also run exactly (default: 16)"
    )
    parser.add_argument("--exact", action="store_true", help="run every cell exactly")
    add_seed(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel (default: 0.25)",
    )
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for the picture and results (default: map-MODEL)"
    )


def check(args: argparse.Namespace) -> None:
    """Files that are not there, and options that would be passed over."""
    if args.exact:
        refuse(args, "--exact", "every cell is run", "check")
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """Measure the map, store it and show it."""
    from ..experiments import cause_map
    from ..pieces import helping
    from ..report import cause_map as report
    from ..storage import file_name, try_folder

    out = args.out or Path(f"map-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    model = open_model(args)
    batch = batch_of(args, model, 64) or 64
    with keeping(args, model, batch, out), progress_bar() as bar:
        task = bar.add_task("map", total=None)
        result = cause_map(
            model,
            args.kind,
            args.sites,
            items=args.items or (8 if args.quick else 16),
            labels=labels_of(args),
            steps=args.steps or (12 if args.quick else 50),
            check=16 if args.check is None else args.check,
            exact=args.exact,
            seed=args.seed,
            cut=args.cut,
            batch=batch,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        if helping():
            return Answer(None)
        kept = report.store(result, out)
    report.show(result, kept)
    return stored(out)
