"""``python -m moebound`` is the command line."""

import sys

from moebound.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
