"""What every kind of attack has: cases drawn from a seed, and a judge."""

from __future__ import annotations

import json
import random
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from moebound.errors import MoeboundError

CASE_FILE = "case.json"


@dataclass
class Case:
    """One thing to try. how: what was done to make it. facts: what the judge has to know beside the
    bytes, JSON-ready. files: name -> bytes."""

    how: str
    files: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """So that `load` finds it again. about: goes along, for people."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {str(number): name for number, name in enumerate(sorted(self.files))}
        for number, name in names.items():
            (folder / number).write_bytes(self.files[name])
        content = {**about, "how": self.how, "facts": self.facts, "files": names}
        (folder / CASE_FILE).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> tuple[str, Case]:
        """Its kind, and the case."""
        content = json.loads((folder / CASE_FILE).read_text())
        files = {name: (folder / number).read_bytes() for number, name in content["files"].items()}
        return content["kind"], cls(content["how"], files, content["facts"])


class Wrong(Exception):
    """What a judge raises. place: one fault has one place, whatever the seed."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


class Attack(ABC):
    """A kind of attack. Made once in each worker.

    limit_s: after which a case counts as hanging, on a machine that does other things too.
    memory_bytes: of address space that a case may take beyond what the worker had before.
    """

    name: ClassVar[str]
    limit_s: ClassVar[float] = 60
    memory_bytes: ClassVar[int] = 512 << 20

    def __init__(self, folder: Path) -> None:
        """folder: an empty one, for whatever it needs."""
        self.folder = folder

    @abstractmethod
    def draw(self, rng: random.Random) -> Case:
        """A case that depends on rng only."""

    @abstractmethod
    def judge(self, case: Case) -> str:
        """What became of it, in a word: "refused", "same", ... Raises Wrong, or anything that is no
        MoeboundError, if it must not be so."""


def case_of(attack: Attack, seed: int) -> Case:
    return attack.draw(random.Random(f"{attack.name} {seed}"))


def try_case(attack: Attack, case: Case) -> tuple[str, Wrong | None]:
    """The outcome in a word, and what is wrong with it."""
    try:
        return attack.judge(case), None
    except Wrong as wrong:
        return "wrong", wrong
    except MemoryError as error:
        return "memory", Wrong(f"memory {_place(error)}", "more memory than the limit")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        return "error", Wrong(f"{type(error).__name__} {_place(error)}", text[:500])


def refused(call: Callable[[], Any]) -> tuple[Any, MoeboundError | None]:
    """What a call returns, or how it refuses. Any other error goes through."""
    try:
        return call(), None
    except MoeboundError as error:
        return None, error


def _place(error: BaseException) -> str:
    """Where in moebound an error came from, the innermost place."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/moebound/" in f.filename.replace("\\", "/")] or frames
    last = ours[-1]
    return f"{Path(last.filename).name}:{last.name}"
