"""`python -m dit_lens` is `dit-lens`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
