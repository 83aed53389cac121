"""Run a probe over a sampling run and store its result."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from ..errors import InvalidType, InvalidValue
from .common import (
    Answer,
    add_device,
    add_labels,
    add_model,
    add_probe,
    add_seed,
    add_size,
    batch_of,
    count,
    existing,
    labels_of,
    open_model,
)
from .users_code import of_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROBE, MODEL, and the size of the run."""
    add_probe(parser, "probe")
    add_model(parser)
    parser.add_argument(
        "--items",
        type=count,
        help="images to sample (default: 8, or as many as the probe needs to see each label often "
        "enough)",
    )
    parser.add_argument("--steps", type=count, default=50, help="denoising steps (default: 50)")
    add_seed(parser)
    add_labels(parser)
    add_size(parser)
    add_device(parser)
    parser.add_argument("--out", type=Path, help="netCDF file (default: NAME.nc)")


def check(args: argparse.Namespace) -> None:
    """Probe and model in the wrong order, and files that are not there."""
    source, _, name = args.probe.rpartition(":")
    if ":" in args.model and ":" not in args.probe:
        raise InvalidValue(
            f"The probe comes first: dit-lens probe {args.model} {args.probe}; got {args.probe!r} "
            "in its place."
        )
    if name and source.endswith(".py"):
        existing(Path(source), "path/to/file.py:ClassName")
    labels_of(args)


def run(args: argparse.Namespace) -> Answer:
    """One sampling run with the probe attached, or the runs that the probe makes by itself."""
    import xarray as xr

    from .. import arguments
    from ..storage import file_name, save_dataset, try_file
    from ..testing.probe_checks import find_probe

    found = find_probe(args.probe)
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InvalidType(
            f"{found.__name__}() can't be made from the command line: {error}; expected a default "
            "for each of its arguments."
        ) from None
    out = args.out or Path(f"{file_name(found.__name__)}.nc")
    try_file(out)  # before minutes are spent
    chosen = labels_of(args)
    model, probe = open_model(args), found()
    given = list(range(model.conditions.n)) if chosen is None else chosen
    known = model.conditions.numbers(given).tolist()
    each = found.of_each_label
    items = 8 * each if args.items is None else args.items
    batch = batch_of(args, model, items)
    parts = {} if batch is None else {"batch": batch}
    with of_the_users(found):
        if found.of_twins:  # two images a pair
            pairs = max(1, items // 2)
            labels = None if chosen is None else [known[i % len(known)] for i in range(pairs)]
            options = {"pairs": pairs, "seed": args.seed}
        else:
            labels = [known[i // each % len(known)] for i in range(items)]
            options = {"seeds": args.seed}
        result = probe.run(model, labels, steps=args.steps, **options, **parts)
    arguments.instance(f"{found.__name__}.result()", result, xr.Dataset, "an xarray.Dataset")
    try:
        save_dataset(out, f"probe {found.__name__}", result)
    except (TypeError, ValueError) as error:  # of what a netCDF file can't hold
        raise InvalidValue(
            f"The result of {found.__name__} can't be stored: {error}; expected real numbers and "
            "text, also as attributes."
        ) from error

    print(result)
    print(f"stored in {out}")
    return Answer({"stored": str(out), "result": result})
