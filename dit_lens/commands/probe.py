"""Run an installed probe over a sampling run and store its result."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_model, add_seed, add_size, count, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, MODEL, and the size of the run."""
    parser.add_argument("name", help="a probe registered in the entry-point group dit_lens.probes")
    add_model(parser)
    parser.add_argument("--items", type=count, default=8, help="images to sample (default: 8)")
    parser.add_argument("--steps", type=count, default=50, help="denoising steps (default: 50)")
    add_seed(parser)
    add_size(parser)
    parser.add_argument("--out", type=Path, help="netCDF file (default: NAME.nc)")


def run(args: argparse.Namespace) -> None:
    """One sampling run with the probe attached."""
    from ..sampling.run import sample
    from ..tracing.probe import load_probe
    from ..tracing.trace import trace

    probe = load_probe(args.name)()
    model = open_model(args)
    labels = [i % model.conditions.n for i in range(args.items)]
    with trace(model, probes=[probe]):
        sample(model, labels, seeds=args.seed, steps=args.steps)
    result = probe.result()
    print(result)
    out = args.out or Path(f"{args.name}.nc")
    result.to_netcdf(out, engine="scipy")
    print(f"stored in {out}")
