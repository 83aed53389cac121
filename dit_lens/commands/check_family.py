"""Hold families of models against the contract, on small models; exit code 1 if one fails."""

from __future__ import annotations

import argparse

from .common import Answer, console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FAMILIES, --device, --table."""
    parser.add_argument(
        "families",
        nargs="*",
        help="model classes, such as DiTTransformer2DModel (default: all that are installed)",
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print what works in each as Markdown, as the README has it",
    )


def run(args: argparse.Namespace) -> Answer:
    """Print a table for each family, or one for all; see `dit_lens.testing.check_family`."""
    from ..families import modules
    from ..testing import family_contract

    rows = {}
    for name in args.families or sorted(modules()):
        rows[name] = family_contract.examine(name, device=args.device)
        if not args.table:
            console(width=160).print(family_contract.table(name, rows[name]))
    if args.table:
        print(family_contract.markdown(rows))
    failed = any(not row.ok for some in rows.values() for row in some)
    return Answer({name: [vars(row) for row in some] for name, some in rows.items()}, int(failed))
