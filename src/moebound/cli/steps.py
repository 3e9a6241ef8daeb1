"""A progress bar on stderr for work that is counted in steps."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from moebound.cli import wording
from moebound.cli.output import Output


@contextlib.contextmanager
def step_bar(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what to call with (what was done, steps done, steps in all): a bar where somebody
    watches; else a line a step with the time left, so that a log shows life."""
    if not output.shows_progress:
        yield _lines(output)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=Console(file=sys.stderr), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield say


def _lines(output: Output) -> Callable[[str, int, int], None]:
    first: tuple[float, int] | None = None

    def say(what: str, done: int, total: int) -> None:
        nonlocal first
        left = ""
        if first is None:
            first = time.monotonic(), done  # what an earlier run has done took no time of this one
        elif first[1] < done < total:
            seconds = (time.monotonic() - first[0]) * (total - done) / (done - first[1])
            left = f"; {wording.time_left(seconds)}"
        output.note(f"[{done}/{total}] {what}{left}")

    return say
