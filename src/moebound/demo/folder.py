"""The demo's folder: which files are in it, and whether a run that was stopped goes on.

settings.json   what was asked, and of which version
answers/        what the model answers to each task
profile.json    which experts the task uses
study/          the quick study
map.json        where errors hurt, expert by expert
plan.json       a bound for each expert; plan-RATE.json: others
stores/         the compressed models
stores.jsonl    what each of them came to
speeds.json     the codecs on matrices of full size
demo.json       all figures; written last
index.html      the page
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import MoeboundError, StoreError
from moebound.files.documents import load_json, save_json
from moebound.files.durable import disk_errors

FORMAT, VERSION = "moebound.demo", 1


@dataclass(frozen=True)
class Folder:
    """Places in it."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def study(self) -> Path:
        return self.path / "study"

    @property
    def map(self) -> Path:
        return self.path / "map.json"

    def plan(self, rate: float | None = None) -> Path:
        """Of the size that one bound of this rate takes; None for that of the first one shown."""
        return self.path / ("plan.json" if rate is None else f"plan-{rate:g}.json")

    @property
    def stores(self) -> Path:
        return self.path / "stores"

    @property
    def rows(self) -> Path:
        return self.path / "stores.jsonl"

    @property
    def speeds(self) -> Path:
        return self.path / "speeds.json"

    @property
    def data(self) -> Path:
        return self.path / "demo.json"

    @property
    def page(self) -> Path:
        return self.path / "index.html"

    def answers(self, task: str) -> Path:
        return self.path / "answers" / f"{task}.jsonl"

    @property
    def ours(self) -> list[Path]:
        """Everything that a demo writes, the settings last."""
        return [
            self.page, self.data, self.path / "answers", self.profile, self.study, self.map,
            self.plan(), *sorted(self.path.glob("plan-*.json")),
            *sorted(self.path.glob("*.json*.partial")), self.stores, self.rows,
            self.speeds, self.settings,
        ]  # fmt: skip


def begin(path: Path, asked: dict[str, Any]) -> Folder:
    """Make the folder ready. asked: what two runs must have in common for one to go on with the
    other's work, as JSON.

    A run of the same that was stopped goes on; one that is finished, or of something else, is
    replaced. Raises StoreError for a folder that has files of these names and no demo's settings
    (they are somebody else's), or if the disk refuses.
    """
    folder = Folder(path)
    wanted = {"format": FORMAT, "version": VERSION, **asked}
    there = [entry for entry in folder.ours if entry.exists() or entry.is_symlink()]
    found = _settings(folder)
    if there and found is None:
        raise StoreError(
            f"{there[0]}: the demo writes here, and found something that is not its own; choose "
            "another folder"
        )
    with disk_errors(path):
        if found != wanted or folder.data.exists():
            for entry in there:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        folder.answers("").parent.mkdir(parents=True, exist_ok=True)
    save_json(folder.settings, wanted)
    return folder


def _settings(folder: Folder) -> dict[str, Any] | None:
    try:
        found = load_json(folder.settings)
    except MoeboundError:
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None
