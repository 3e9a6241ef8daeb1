"""Rows of the quality comparison in a folder, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebound.errors import MoeboundError
from moebound.files.documents import Format, load_json, save_json
from moebound.files.rows import KEY, Rows

FORMAT = Format("moebound.bench.quality.rows", 1)


class KeptRows(Rows):
    """Rows by key. Open it in a `with`.

    folder: where they are kept. identity: what they are of. later: what they are of, too, which
    rows that were kept without it may be joined by. answers: a file for the original's answers.

    Raises MoeboundError if the folder's rows are of something else, or another run has it open;
    FormatError for damage.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], later: Mapping[str, Any] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        later = later or {}
        about, said = folder / "rows.json", {**FORMAT.header, **identity, **later}
        before: dict[str, Any] = {}
        if about.exists():
            before = load_json(about)
            FORMAT.check(before, str(about))
            said = {name: value for name, value in said.items()
                    if name in before or name not in later}  # fmt: skip
            other = [name for name in said if before.get(name) != said[name]]
            if other:
                raise MoeboundError(
                    f"{about}: its rows are of another {', '.join(other)}: expected "
                    f"{ {name: said[name] for name in other} }, found "
                    f"{ {name: before.get(name) for name in other} }; give another --work, or take "
                    "rows.json and rows.jsonl away"
                )
        else:
            save_json(about, said)
        self.answers = folder / "original.jsonl"
        super().__init__(folder / "rows.jsonl")
        if later.keys() - before.keys() and before:
            save_json(about, {**before, **later})

    def get(self, key: str) -> dict[str, Any] | None:
        return self.found.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """On disk when this returns. Raises StoreError if the disk refuses."""
        self.append({KEY: key, **row})
