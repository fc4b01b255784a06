"""``python -m ssmlens`` is the command line."""

import sys

from ssmlens.cli import main

if __name__ == "__main__":
    sys.exit(main())
