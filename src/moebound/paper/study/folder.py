"""A study's folder: what was asked, what came out, and that both belong together.

`files/formats/study.py` has the files. A folder is of one model and one suite. Within it a study
may grow: more seeds, sources or tasks.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import MoeboundError
from moebound.files.documents import save_json
from moebound.files.durable import disk_errors
from moebound.files.formats.study import FORMAT, PROFILE_FILE, ROWS_FILE, STUDY_FILE, Condition
from moebound.paper.study.suite import ModelFacts


@dataclass(frozen=True)
class Asked:
    """What a study is of. n_problems: asked at most, a condition. n_read: at most, to compare
    predictions. source: how the model was loaded."""

    facts: ModelFacts
    source: Mapping[str, str]
    suite: str
    tasks: tuple[str, ...]
    n_problems: int
    n_read: int
    n_seeds: int
    conditions: tuple[Condition, ...]

    def to_json(self, created: str) -> dict[str, Any]:
        return {
            **FORMAT.header,
            "model": self.facts.name,
            "fingerprint": self.facts.fingerprint,
            "source": dict(self.source),
            "suite": self.suite,
            "tasks": list(self.tasks),
            "n_problems": self.n_problems,
            "n_read": self.n_read,
            "seeds": self.n_seeds,
            "created": created,
            "layers": list(self.facts.layers),
            "n_experts": self.facts.n_experts,
            "top_k": self.facts.top_k,
            "profile": PROFILE_FILE,
            "conditions": [condition.to_json() for condition in self.conditions],
        }


_SAME = ("model", "fingerprint", "suite", "n_problems", "n_read", "layers", "n_experts")
"""What must not change between the runs of one study."""


def prepare(folder: Path, asked: Asked) -> None:
    """Make the folder, or check that the study in it is this one and may go on.

    More seeds, sources or tasks than before may be asked: what is finished counts. Raises
    MoeboundError for a folder of another model or suite, or for less than before, with what
    differs; FormatError for a damaged study.json; StoreError if the disk refuses.
    """
    path = folder / STUDY_FILE
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        others = [] if known else [p.name for p in folder.iterdir() if p.name != STUDY_FILE]
    if not known:
        if ROWS_FILE in others:
            raise MoeboundError(
                f"{folder}: has {ROWS_FILE} and no {STUDY_FILE}: of which study they are cannot "
                "be told; write to another folder"
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        save_json(path, asked.to_json(now))
        return
    before = FORMAT.read(path).content
    document = asked.to_json(str(before.get("created", "")))
    _refuse_other(path, before, document)
    if before != document:
        save_json(path, document)


def _refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in _SAME:
        if before.get(name) != now[name]:
            raise MoeboundError(
                f"{path}: is a study of another kind: {name} is {_short(before.get(name))} there "
                f"and {_short(now[name])} now. Write to another folder"
            )
    conditions = {condition["id"]: condition for condition in now["conditions"]}
    for condition in before["conditions"]:
        name = condition["id"]
        if name not in conditions:
            raise MoeboundError(
                f"{path}: has conditions that are not asked for now, such as {name!r}. Give the "
                "options it was begun with (more seeds, sources or tasks are welcome), or write "
                "to another folder"
            )
        if conditions[name] != condition:
            raise MoeboundError(
                f"{path}: condition {name!r} means something else there; write to another folder"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def missing(conditions: Sequence[Condition], found: Mapping[str, Any]) -> list[Condition]:
    """Those without a row."""
    return [condition for condition in conditions if condition.id not in found]
