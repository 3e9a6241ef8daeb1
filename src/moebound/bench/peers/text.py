"""The text that statistics are of, for those who look at it themselves.

Statistics keep its hash and not its tokens. They are found again where they came from: a task's
problems behind those that were skipped, a file's windows, or what the model made and their folder
keeps; and taken only if the hash is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebound.calibrate.self_sampling import KEPT
from moebound.calibrate.text import Text, is_kept, of_file
from moebound.checkpoint import Checkpoint
from moebound.errors import MoeboundError, TaskError
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import solved_rows
from moebound.files.formats.statistics import Statistics
from moebound.tasks import get_task
from moebound.types import Array

MOST_SKIPPED = 2000
_FIRST = (500, 0)
"""What `moebound calibrate` skips if not told otherwise."""


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """sha256: of the token ids. rows: of each sequence. importance: by tensor of the checkpoint,
    [in] float32, the mean of g² x² over the tokens that its expert got; ones for none."""

    sha256: str
    rows: tuple[tuple[int, ...], ...]
    importance: Mapping[str, Array]


def text_of(
    loaded: Loaded, checkpoint: Checkpoint, statistics: Statistics, file: Path | None = None
) -> CalibrationText:
    """Raises MoeboundError where the text is not found, or is another one by now.

    file: what the statistics were made of with --text; None for a task.
    """
    of = statistics.of
    for text in _candidates(loaded, statistics, file):
        if text.sha256 == of.text_sha256:
            return CalibrationText(text.sha256, text.rows, _importance(checkpoint, statistics))
    where = f"the first {MOST_SKIPPED} problems of task {of.text!r}" if file is None else str(file)
    raise MoeboundError(
        f"{statistics.folder}: its text ({of.n_sequences} sequences, {of.n_tokens} tokens, SHA-256 "
        f"{of.text_sha256[:16]}...) is not in {where}; make the statistics anew with `moebound "
        "calibrate`, or give the file that they are of with --calibration-text"
    )


def _candidates(loaded: Loaded, statistics: Statistics, file: Path | None) -> Iterator[Text]:
    of = statistics.of
    if file is None and is_kept(statistics.folder / KEPT):
        file = statistics.folder / KEPT
    if file is not None:
        window = None if is_kept(file) else of.n_tokens // of.n_sequences
        yield of_file(loaded, file, of.n_sequences, window=window)
        return
    try:
        task = get_task(of.text)
    except TaskError as error:
        raise MoeboundError(
            f"{statistics.folder}: of text {of.text!r}, which is no task here: give the file with "
            "--calibration-text"
        ) from error
    problems = task.problems(MOST_SKIPPED + of.n_sequences)
    n = of.n_sequences
    skips = [*_FIRST, *(s for s in range(MOST_SKIPPED + 1) if s not in _FIRST)]
    rows: dict[int, tuple[int, ...]] = {}
    for skip in skips:
        if skip + n > len(problems):
            continue
        missing = [at for at in range(skip, skip + n) if at not in rows]
        solved = solved_rows(loaded.tokenizer, task, [problems[at] for at in missing])
        rows |= {
            at: (*prompt, *solution) for at, (prompt, solution) in zip(missing, solved, strict=True)
        }
        yield Text(of.text, tuple(rows[at] for at in range(skip, skip + n)))


def _importance(checkpoint: Checkpoint, statistics: Statistics) -> dict[str, Array]:
    tokens, found = statistics.tokens(), dict[str, Array]()
    for expert in checkpoint.experts():
        n = tokens[expert.key]
        for matrix in expert.matrices:
            side = statistics.moments(expert.key, "hidden" if matrix.role == "down" else "inputs")
            diagonal = side if side.ndim == 1 else np.diagonal(side)
            mean = diagonal / n if n else np.ones(len(diagonal))
            found[matrix.name] = mean.astype(np.float32)
    return found
