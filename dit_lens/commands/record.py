"""Sample images and write activations to disk as they come, in shards that resume."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    Answer,
    add_device,
    add_labels,
    add_seed,
    add_size,
    count,
    labels_of,
    open_model,
    progress_bar,
)

BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, NAMES, and what `dit_lens.record` takes."""
    parser.add_argument("model", help="bundled name, folder or hub id")
    parser.add_argument(
        "names",
        nargs="+",
        help="hook points, such as blocks.14.hook_resid_post or 'blocks.*.hook_mlp_out'",
    )
    parser.add_argument("--items", type=count, default=64, help="images to sample (default: 64)")
    parser.add_argument("--steps", type=count, default=50, help="denoising steps (default: 50)")
    parser.add_argument(
        "--at", type=int, nargs="+", metavar="STEP", help="which steps are stored (default: all)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N", help="which tokens are stored (default: all)"
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none (default: 1)")
    parser.add_argument(
        "--stored-as", metavar="DTYPE", help="such as bfloat16 (default: as they are)"
    )
    parser.add_argument("--shard", type=count, default=256, help="MB a file (default: 256)")
    add_seed(parser)
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder; what is there already is not run again (default: record-MODEL)",
    )


def check(args: argparse.Namespace) -> None:
    """Files that are not there."""
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """Record what is missing, and say what there is."""
    from ..storage import file_name, try_folder
    from ..tracing.recording import record

    out = args.out or Path(f"record-{file_name(str(args.model))}")
    try_folder(out)  # before minutes are spent
    args.kept = out
    chosen = labels_of(args)
    model = open_model(args)
    given = list(range(model.conditions.n)) if chosen is None else chosen
    known = model.conditions.numbers(given).tolist()
    with progress_bar() as bar:
        task = bar.add_task("steps", total=None)
        found = record(
            model,
            args.names,
            [known[i % len(known)] for i in range(args.items)],
            out,
            dtype=args.stored_as,
            tokens=args.tokens,
            at=args.at,
            seeds=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            # part of what is recorded: found by trying, it might be another when resumed
            batch=BATCH if args.batch is None else args.batch,
            shard=args.shard,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )

    for name in found.names:
        print(found.of(name))
    return Answer({"stored": str(out), "names": list(found.names)})
