"""The parser: what all subcommands have, examples in their `--help`, and a hint for slips."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NoReturn

EXAMPLES = {
    "hooks": ["hooks digits", "hooks digits --filter 'attn.*'", "hooks digits --json"],
    "gap": ["gap", "gap digits --quick", "gap digits --couple 0 0.5 1 --out gap-coupled"],
    "patch": ["patch digits --quick", "patch digits --how zero --windows 4 --sets"],
    "map": ["map digits --quick", "map digits --kind zero --sites attn mlp"],
    "plan": ["plan digits --budget 0.6 --steps 20", "plan digits --check plan-digits.json"],
    "compare": ["compare digits --with plan-digits.json", "compare digits --dtype bfloat16"],
    "diagnose": [
        "diagnose digits --label 8 --seed 368",
        "diagnose digits --all --samples 200 --most 4",
    ],
    "probe": [
        "probe LayerLens digits --steps 12",
        "probe examples/custom_probe.py:Locality digits --labels 3 7 --out local.nc",
    ],
    "record": ["record digits blocks.14.hook_resid_post --items 128 --at 10 20 30"],
    "work": ["work /shared/gap-store"],
    "cost": ["cost digits"],
    "check": ["check LayerLens", "check examples/custom_probe.py:Locality"],
    "check-family": ["check-family DiTTransformer2DModel"],
    "report": ["report gap-digits", "report gap-digits patch-digits --html both.html"],
}
"""What `--help` of a subcommand shows; a test parses them all."""

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
        hint = f"did you mean {near[0]!r}?" if near else f"{self.prog} --help lists what there is"
        places = [a.dest for a in self._actions if not a.option_strings]
        if word.lstrip("-") in places:
            hint = f"it has no dashes: {self.prog} {' '.join(places).upper()}"
        self.exit(2, f"{self.prog}: {message}; {hint}\n")


def parser(commands: Mapping[str, Any]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of `dit-lens`, and those of its subcommands by name.

    Args:
        commands: the subcommands' modules by name.
    """
    import shtab

    whole = Parser(
        prog="dit-lens",
        description="Open up Diffusion Transformers: hook points, twins, and which layer creates "
        "the synchronization gap.",
        epilog=CODES,
    )
    whole.add_argument("--version", action="version", version=f"dit-lens {version('dit-lens')}")
    shtab.add_argument_to(
        whole, "--print-completion", help="print a script of completions for your shell"
    )
    subcommands = whole.add_subparsers(dest="command", required=True)
    found: dict[str, Parser] = {}
    for name, command in commands.items():
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
