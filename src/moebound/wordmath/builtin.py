"""Models inside the package, by name: `builtin:wordmath`, `builtin:wordmath-mixtral`."""

from __future__ import annotations

from pathlib import Path

from moebound.errors import CheckpointError

PREFIX = "builtin:"
_HERE = Path(__file__).parent
_FOLDERS = {"wordmath": _HERE / "model", "wordmath-mixtral": _HERE / "mixtral"}


def resolve(src: str) -> str:
    """The folder of a built-in model; any other name as it is.

    Raises CheckpointError for a built-in name that is not known.
    """
    if not src.startswith(PREFIX):
        return src
    folder = _FOLDERS.get(src.removeprefix(PREFIX))
    if folder is None:
        known = ", ".join(PREFIX + name for name in sorted(_FOLDERS))
        raise CheckpointError(f"{src}: no such built-in model; there is {known}")
    return str(folder)
