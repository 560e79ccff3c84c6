"""The entry of the command `ferry` and of `python -m ferry`."""

import sys

from ferry.cli import main

if __name__ == "__main__":
    sys.exit(main())
