"""Statistics again after routing has moved, gathered once for each model that a method leaves.

`again:reap_re+calibrated` is asked for: the experts that are kept are coded by what they get once
the others are gone. The text is that of the first statistics, read again by the model as the method
leaves it (`moebound calibrate --after`, a process of its own); what comes of it stays in a folder,
under the method's setting. Who comes second, of several workers, waits for who gathers them.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moebound.calibrate import of_task
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded
from moebound.files.durable import disk_errors
from moebound.files.formats.statistics import FILE, Statistics, read_statistics
from moebound.tasks import get_task

_SKIPPED = (500, 0)
"""Problems in front that `moebound calibrate` leaves for measuring, if there are as many."""


@dataclass(frozen=True)
class Again:
    """src: the model. first: its statistics. folder: where those of edited models are kept."""

    src: str
    first: Statistics
    folder: Path

    def moved(self, setting: str, loaded: Loaded) -> Path:
        """A folder of statistics after a method. loaded: the model, whose tokenizer tells which
        problems the first ones were of.

        Raises MoeboundError where their text cannot be found again, or they cannot be gathered.
        """
        out = self.folder / setting.replace(":", "-")
        with alone(out):
            if not (out / FILE).is_file():
                self._gather(setting, out, self._skip(loaded))
        found = read_statistics(out).of
        if (found.text_sha256, found.after) != (self.first.of.text_sha256, setting):
            raise MoeboundError(
                f"{out}: statistics of {found.text} after {found.after}, expected the text of "
                f"{self.first.folder} after {setting}; take the folder away"
            )
        return out

    def _skip(self, loaded: Loaded) -> int:
        """Problems in front of those that the first statistics are of."""
        of = self.first.of
        task = get_task(of.text)
        for skip in _SKIPPED:
            if len(task.problems(skip + of.n_sequences)) == skip + of.n_sequences:
                text = of_task(loaded, task, of.n_sequences, skip=skip)
                if text.sha256 == of.text_sha256:
                    return skip
        raise MoeboundError(
            f"{self.first.folder}: of {of.n_sequences} problems of {of.text!r}, which are none of "
            f"those behind the first {' or '.join(map(str, _SKIPPED))}; what is asked for as "
            "again: needs statistics of such"
        )

    def _gather(self, setting: str, out: Path, skip: int) -> None:
        of = self.first.of
        command = [
            sys.executable, "-m", "moebound", "calibrate", self.src, "--task", of.text,
            "--limit", str(of.n_sequences), "--skip", str(skip), "--after", setting,
            "--calibration", str(self.first.folder), "-o", str(out), "--json",
            *([] if of.routed else ["--all-tokens"]),
            *(["--diagonal"] if of.moments == "diagonal" else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise MoeboundError(f"statistics after {setting}: {said[-1]}")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else is in here for this folder meanwhile, as far as the file system has locks."""
    lock = out.with_name(f"{out.name}.lock")
    with disk_errors(lock):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
