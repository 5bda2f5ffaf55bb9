"""``python -m densessl.evaluation``: see ``--help``."""

import sys

from densessl.evaluation._command import main

if __name__ == "__main__":
    sys.exit(main())
