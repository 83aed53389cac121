"""`dit-lens`: the parser of all subcommands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import DitLensError
from . import (
    cause_map,
    check,
    check_family,
    cost,
    gap,
    hooks,
    patch,
    plan,
    probe,
    record,
    report,
)
from .common import Answer, as_json

COMMANDS = {
    "hooks": hooks,
    "gap": gap,
    "patch": patch,
    "map": cause_map,
    "plan": plan,
    "probe": probe,
    "record": record,
    "cost": cost,
    "check": check,
    "check-family": check_family,
    "report": report,
}
"""The subcommands by name; the first line of a file's docstring is the subcommand's help."""

EXAMPLES = {
    "hooks": ["hooks digits", "hooks digits --filter 'attn.*'", "hooks digits --json"],
    "gap": ["gap", "gap digits --quick", "gap digits --couple 0 0.5 1 --out gap-coupled"],
    "patch": ["patch digits --quick", "patch digits --how zero --windows 4 --sets"],
    "map": ["map digits --quick", "map digits --kind zero --sites attn mlp"],
    "plan": ["plan digits --budget 0.6 --steps 20", "plan digits --check plan-digits.json"],
    "probe": [
        "probe LayerLens digits --steps 12",
        "probe examples/custom_probe.py:Locality digits --labels 3 7 --out local.nc",
    ],
    "record": ["record digits blocks.14.hook_resid_post --items 128 --at 10 20 30"],
    "cost": ["cost digits"],
    "check": ["check LayerLens", "check examples/custom_probe.py:Locality"],
    "check-family": ["check-family DiTTransformer2DModel"],
    "report": ["report gap-digits"],
}
"""What `--help` of a subcommand shows; a test parses them all."""

RESUMED = {
    "patch": "the patches that are done are kept in its folder",
    "map": "the exact cells that are done are kept in its folder",
    "record": "the shards that are full are kept in its folder",
}
"""What an interrupted subcommand keeps, from which the same command goes on."""

CODES = (
    "Exit codes: 0 done, 1 a check failed, 2 a mistake (one line on stderr says which), "
    "130 interrupted."
)


class Parser(argparse.ArgumentParser):
    """argparse's, which says for a slip what was meant."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line.

        Args:
            message: argparse's.
        """
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        option = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        word, known = "", list[str]()
        if unknown:
            word, known = unknown[1], re.findall(r"[\w.+-]+", unknown[2])
        elif option:
            word, known = option[1], [o for a in self._actions for o in a.option_strings]
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.5) if word else []
        super().error(message + (f"; did you mean {near[0]!r}?" if near else ""))


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `dit-lens`, and those of its subcommands by name."""
    import shtab

    from .. import __version__

    whole = Parser(
        prog="dit-lens",
        description="Open up Diffusion Transformers: hook points, twins, and which layer creates "
        "the synchronization gap.",
        epilog=CODES,
    )
    whole.add_argument("--version", action="version", version=f"dit-lens {__version__}")
    shtab.add_argument_to(
        whole, "--print-completion", help="print a script of completions for your shell"
    )
    subcommands = whole.add_subparsers(dest="command", required=True)
    found: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        about = (command.__doc__ or "").partition("\n")[0]
        examples = "\n".join(f"  dit-lens {line}" for line in EXAMPLES[name])
        one = subcommands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"examples:\n{examples}\n\n{CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.add_argument(
            "--json",
            action="store_true",
            help="print what is found as JSON, and everything else on stderr",
        )
        one.add_argument("--quiet", action="store_true", help="print nothing but errors")
        one.set_defaults(run=command.run)
        found[name] = one
    return whole, found


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
    whole, subcommands = parser()
    args, more = whole.parse_known_args(argv)
    if more:
        subcommands[args.command].error(f"unrecognized arguments: {' '.join(more)}")
    try:
        code = _run(args)
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
        kept = RESUMED.get(args.command)
        on = f": {kept}; the same command goes on from there" if kept else ""
        print(f"dit-lens: interrupted{on}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    """Run the subcommand, with what it prints where it was asked for."""
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):
            found = _quietly(args)
        data = found.data if isinstance(found, Answer) else None
        print(as_json(data() if callable(data) else data))
    else:
        found = _quietly(args)
    return found.code if isinstance(found, Answer) else int(found or 0)


def _quietly(args: argparse.Namespace) -> Any:
    if not args.quiet:
        return args.run(args)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return args.run(args)


def _cut_off() -> int:
    """What is left to do when nobody reads the output any more, as behind `| head -1`."""
    # what is still in the buffer has nowhere to go, and Python would say so once more at its exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print("dit-lens: the output was closed before all of it was written", file=sys.stderr)
    return 2
