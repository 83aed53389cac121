"""Hold a probe against models whose answer is known; exit code 1 if it fails."""

from __future__ import annotations

import argparse

from .common import Answer, add_probe, console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROBE."""
    add_probe(parser, "probe")


def run(args: argparse.Namespace) -> Answer:
    """Print a row for each check; see `dit_lens.testing.check_probe`."""
    from ..testing import probe_checks

    checks = probe_checks.check_probe(probe_checks.find_probe(args.probe))
    failed = sum(not row.ok for row in checks)
    title = f"{args.probe}: {len(checks)} checks, {failed} failed"
    console(width=140).print(probe_checks.table(checks, title=title))
    return Answer([vars(row) for row in checks], 1 if failed else 0)
