"""Sample images and write activations to disk as they come, in shards that resume."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_seed, add_size, count, open_model, progress_bar


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
    parser.add_argument("--dtype", help="such as bfloat16 (default: the model's)")
    parser.add_argument("--batch", type=count, default=16, help="images run together (default: 16)")
    parser.add_argument("--shard", type=count, default=256, help="MB a file (default: 256)")
    add_seed(parser)
    add_size(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder; what is there already is not run again (default: record-MODEL)",
    )


def run(args: argparse.Namespace) -> None:
    """Record what is missing, and say what there is."""
    from ..storage import file_name
    from ..tracing.recording import record

    out = args.out or Path(f"record-{file_name(str(args.model))}")
    model = open_model(args)
    with progress_bar() as bar:
        task = bar.add_task("steps", total=None)
        found = record(
            model,
            args.names,
            [i % model.conditions.n for i in range(args.items)],
            out,
            dtype=args.dtype,
            tokens=args.tokens,
            at=args.at,
            seeds=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            batch=args.batch,
            shard=args.shard,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )

    for name in found.names:
        print(found.of(name))
