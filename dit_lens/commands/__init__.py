"""The command line, one file a subcommand: `add_arguments(parser)` says what it takes, `run(args)`
does it. `check(args)`, where there is one, refuses before anything is loaded.

Belongs here: arguments, progress bars, exit codes, where files are written. Does not: anything that
a user of the library would also want; that lives below and is called from here.

What is slow to import stands inside `run`, so that `--help`, a mistyped option and what `check`
refuses answer at once.
"""

from .main import main

__all__ = ["main"]
