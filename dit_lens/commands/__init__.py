"""The command line, one file a subcommand: `add_arguments(parser)` says what it takes, `run(args)`
does it.

Belongs here: arguments, progress bars, exit codes, where files are written. Does not: anything that
a user of the library would also want; that lives below and is called from here.

What is slow to import stands inside `run`, so that `--help` and a mistyped option answer at once.
"""

from .main import main

__all__ = ["main"]
