"""`python -m endomamba` is the command `endomamba`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
