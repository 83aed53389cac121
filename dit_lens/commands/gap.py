"""Measure the synchronization gap, by band and layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import cost, patch
from .common import (
    add_device,
    add_labels,
    add_model,
    add_quick,
    add_seed,
    add_size,
    batch_of,
    frequency,
    labels_of,
    open_model,
    progress_bar,
    sizes,
    strength,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what `dit_lens.experiments.gap` takes; --couple and --causes do more."""
    add_model(parser)
    add_quick(parser, pairs=(48, 16), steps=(50, 25))
    add_seed(parser)
    parser.add_argument(
        "--cut",
        type=frequency,
        default=0.25,
        help="between low and high, in cycles per pixel and per token (default: 0.25)",
    )
    parser.add_argument(
        "--bands",
        choices=["radial", "dct", "pooling", "eigen"],
        default="radial",
        help="what the bands are made of (default: radial; --couple and --causes stay radial)",
    )
    parser.add_argument(
        "--couple",
        type=strength,
        nargs="+",
        metavar="G",
        help="also couple twins with these strengths, such as 0 0.5 1",
    )
    parser.add_argument(
        "--causes",
        action="store_true",
        help="also what `dit-lens patch` does: the layers that cause the gap",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="without clones, in a third of the time: the behaviour as an exact denoiser has it",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it would cost, and run nothing else"
    )
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for pictures and results (default: gap-MODEL)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print, draw and store; then the coupling sweep and the causes, if asked for."""
    from ..experiments import couplings, measure_gap
    from ..experiments.cost import gap_cost
    from ..experiments.coupling_sweep import checked_strengths
    from ..report import coupling_sweep as coupling_report
    from ..report import gap as gap_report
    from ..storage import file_name, try_folder

    pairs, steps = sizes(args)
    if args.couple is not None:
        checked_strengths(args.couple)  # before minutes are spent
    out = args.out or Path(f"gap-{file_name(str(args.model))}")
    labels = labels_of(args)
    if not args.dry_run:
        try_folder(out)  # as well
    model = open_model(args)
    batch = batch_of(args, model, 2 * pairs)
    planned = gap_cost(
        model, pairs, steps, batch=batch, clones=not args.one_pass, calibrate=args.dry_run
    )
    planned.require_fit()
    if args.dry_run:
        cost.show([planned])
        return

    with progress_bar() as bar:
        first = bar.add_task("twins", total=None)
        results = measure_gap(
            model,
            pairs=pairs,
            steps=steps,
            seed=args.seed,
            cut=args.cut,
            bands=args.bands,
            name=str(args.model),
            clones=not args.one_pass,
            batch=batch,
            labels=labels,
            progress=lambda done, total: bar.update(first, completed=done, total=total),
        )
    gap_report.write(results, out)

    if args.couple is not None:
        with progress_bar() as bar:
            second = bar.add_task("couplings", total=None)
            swept = couplings(
                model,
                args.couple,
                pairs=pairs,
                steps=steps,
                seed=args.seed,
                cut=args.cut,
                progress=lambda done, total: bar.update(second, completed=done, total=total),
            )
        coupling_report.write(swept, out)

    if args.causes:
        onsets = gap_report.onsets(results)
        patch.find_causes(
            model, min(pairs, 24), min(steps, 25), args.seed, args.cut, out, onsets, batch
        )
