"""Run a probe over a sampling run and store its result."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_model, add_probe, add_seed, add_size, count, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, MODEL, and the size of the run."""
    add_probe(parser, "name")
    add_model(parser)
    parser.add_argument("--items", type=count, default=8, help="images to sample (default: 8)")
    parser.add_argument("--steps", type=count, default=50, help="denoising steps (default: 50)")
    add_seed(parser)
    add_size(parser)
    parser.add_argument("--out", type=Path, help="netCDF file (default: NAME.nc)")


def run(args: argparse.Namespace) -> None:
    """One sampling run with the probe attached, or the runs that the probe makes by itself."""
    from ..storage import file_name, save_dataset, try_folder
    from ..testing.probe_checks import find_probe

    found = find_probe(args.name)
    out = args.out or Path(f"{file_name(found.__name__)}.nc")
    try_folder(out.parent)  # before minutes are spent
    model, probe = open_model(args), found()
    if found.of_twins:  # two images a pair
        pairs = max(1, args.items // 2)
        result = probe.run(model, pairs=pairs, seed=args.seed, steps=args.steps)
    else:
        labels = [i % model.conditions.n for i in range(args.items)]
        result = probe.run(model, labels, seeds=args.seed, steps=args.steps)
    save_dataset(out, f"probe {found.__name__}", result)

    print(result)
    print(f"stored in {out}")
