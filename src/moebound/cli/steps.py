"""A progress bar on stderr for work that is counted in steps."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from moebound.cli import wording
from moebound.cli.output import Output


@contextlib.contextmanager
def step_bar(
    output: Output, *, every_s: float = 0.0, says_left: bool = False
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what to call with (what was done, steps done, steps in all): a bar where somebody
    watches; else a line a step with the time left, so that a log shows life: of steps that
    are many, one in every_s seconds, and the last. says_left: what was done has the time left."""
    if not output.shows_progress:
        yield _lines(output, every_s, says_left)
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
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        *([] if says_left else [TimeRemainingColumn()]),
        TextColumn("{task.description}"), console=Console(file=sys.stderr), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield say


def _lines(output: Output, every_s: float, says_left: bool) -> Callable[[str, int, int], None]:
    first: tuple[float, int] | None = None
    last = -math.inf

    def say(what: str, done: int, total: int) -> None:
        nonlocal first, last
        left = ""
        if first is not None and done < total and time.monotonic() - last < every_s:
            return
        last = time.monotonic()
        if first is None:
            first = time.monotonic(), done  # what an earlier run has done took no time of this one
        elif not says_left and first[1] < done < total:
            seconds = (time.monotonic() - first[0]) * (total - done) / (done - first[1])
            left = f"; {wording.time_left(seconds)}"
        output.note(f"[{done}/{total}] {what}{left}")

    return say
