"""`dit-lens`: the parser of all subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DitLensError
from . import (
    cause_map,
    check,
    check_family,
    compare,
    cost,
    diagnose,
    gap,
    hooks,
    patch,
    plan,
    probe,
    record,
    report,
    work,
)
from .common import GIVEN, Answer, as_json
from .parser import parser

COMMANDS = {
    "hooks": hooks,
    "gap": gap,
    "patch": patch,
    "map": cause_map,
    "plan": plan,
    "compare": compare,
    "diagnose": diagnose,
    "probe": probe,
    "record": record,
    "work": work,
    "cost": cost,
    "check": check,
    "check-family": check_family,
    "report": report,
}
"""The subcommands by name; the first line of a file's docstring is the subcommand's help."""

CUT_OFF = "the output was closed before all of it was written"
"""What is said where nobody reads the output any more, as behind `| head -1`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    A mistake of the user's (`DitLensError`, `OSError`, a bad argument) is one line on stderr and
    exit code 2; so is an output that can't be written. Any other exception is a bug and is not
    caught: its traceback is what the report of the bug needs.

    Args:
        argv: the arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0; 1 if a check failed; 2 for a mistake; 130 if interrupted.

    >>> main(["hooks", "nowhere"])
    2
    """
    args = argparse.Namespace()
    try:
        if sys.stdout is None:  # before minutes are spent
            return _ended("the output is closed; expected a terminal, a pipe or a file")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # a name that its encoding does not have is no reason to end, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")
        argv = sys.argv[1:] if argv is None else argv
        _parse(argv, args)
        args.argv, args.again, args.parse = list(argv), repeat, parsed
        if (check := getattr(COMMANDS[args.command], "check", None)) is not None:
            check(args)
        from ..storage import made_by  # which loads torch, and is not needed to explain

        with made_by(shlex.join(["dit-lens", *argv])):
            return _run(args)
    except BrokenPipeError:
        return _ended(CUT_OFF)
    except (DitLensError, OSError) as error:
        return _ended(" ".join(str(error).split()))
    except KeyboardInterrupt:
        kept: Path | None = getattr(args, "kept", None)
        there = kept is not None and kept.exists()
        rest = f"; {kept} is kept, and the same command goes on with it"
        return _ended(f"interrupted{rest if there else ''}", 130)


def _parse(argv: Sequence[str] | None, args: argparse.Namespace) -> None:
    """Read the command line into `args`; SystemExit after `--help`, or for arguments that are
    none.
    """
    whole, subcommands = parser(COMMANDS)
    try:
        _, more = whole.parse_known_args(argv, args)
        if more:
            subcommands[args.command].error(f"unrecognized arguments: {' '.join(more)}")
    finally:
        sys.stdout.flush()  # what `--help` prints


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command.

    Args:
        argv: without the program's name.
    """
    args = argparse.Namespace()
    _parse(argv, args)
    args.argv, args.again = list(argv), repeat
    return args


def repeat(argv: Sequence[str], model: Any, batch: int | None) -> None:
    """Run a command once more in a process that helps with it.

    Args:
        argv: its arguments.
        model: its model.
        batch: images at once.
    """
    args, token = parsed(argv), GIVEN.set((model, batch))
    try:
        args.run(args)
    finally:
        GIVEN.reset(token)


def _run(args: argparse.Namespace) -> int:
    """Run the subcommand that was asked for."""
    try:
        code = _answered(args)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich makes one of the other
            return _ended(CUT_OFF)
        # a probe of the user's ended the program: whatever its code, nothing was done
        return _ended(f"the program was ended by SystemExit({error.code!r})")
    sys.stdout.flush()
    return code


def _answered(args: argparse.Namespace) -> int:
    """Run the subcommand, with what it prints where it was asked for."""
    with contextlib.ExitStack() as stack:
        if args.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            from ..model.quiet import quiet

            stack.enter_context(quiet())  # of the libraries that load a model
        elif args.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        found = args.run(args)
    if not isinstance(found, Answer):
        found = Answer(None, int(found or 0))
    if args.json:
        print(as_json(found.data() if callable(found.data) else found.data))
    return found.code


def _ended(why: str, code: int = 2) -> int:
    """Say in one line why nothing more is done; gives the exit code."""
    with contextlib.suppress(OSError):
        print(f"dit-lens: {why}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # what is still in the buffer has nowhere to go, and Python would say so at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
