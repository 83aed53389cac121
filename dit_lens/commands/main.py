"""`dit-lens`: the parser of all subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import DitLensError
from . import (
    cause_map,
    check,
    check_family,
    cost,
    diagnose,
    gap,
    hooks,
    patch,
    plan,
    probe,
    record,
    report,
)

COMMANDS = {
    "hooks": hooks,
    "gap": gap,
    "patch": patch,
    "map": cause_map,
    "plan": plan,
    "diagnose": diagnose,
    "probe": probe,
    "record": record,
    "cost": cost,
    "check": check,
    "check-family": check_family,
    "report": report,
}
"""The subcommands by name; the first line of a file's docstring is the subcommand's help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    A mistake of the user's (`DitLensError`, `OSError`, a bad argument) is one line on stderr and
    exit code 2. Any other exception is a bug and is not caught: its traceback is what the report
    of the bug needs.

    Args:
        argv: the arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0; 1 if a check failed; 2 for a mistake; 130 if interrupted.

    >>> main(["hooks", "nowhere"])
    2
    """
    parser = argparse.ArgumentParser(
        prog="dit-lens",
        description="Open up Diffusion Transformers: hook points, twins, and which layer creates "
        "the synchronization gap.",
        epilog="Exit codes: 0 done, 1 a check failed, 2 a mistake (one line on stderr says which), "
        "130 interrupted.",
    )
    subcommands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        about = (command.__doc__ or "").partition("\n")[0]
        subparser = subcommands.add_parser(name, help=about, description=about)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)

    args = parser.parse_args(argv)
    try:
        code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _cut_off()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich makes one of the other
            return _cut_off()
        # a probe of the user's ended the program: whatever its code, nothing was done
        print(f"dit-lens: the program was ended by SystemExit({error.code!r})", file=sys.stderr)
        return 2
    except (DitLensError, OSError) as error:
        print(f"dit-lens: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dit-lens: interrupted", file=sys.stderr)
        return 130


def _cut_off() -> int:
    """What is left to do when nobody reads the output any more, as behind `| head -1`."""
    # what is still in the buffer has nowhere to go, and Python would say so once more at its exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print("dit-lens: the output was closed before all of it was written", file=sys.stderr)
    return 2
