"""``python -m moebound`` is the command line."""

from moebound.cli.main import main

if __name__ == "__main__":
    main()
