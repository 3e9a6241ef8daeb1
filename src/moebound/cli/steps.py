"""A progress bar on stderr for work that is counted in steps."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from moebound.cli.output import Output


@contextlib.contextmanager
def step_bar(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what to call with (what was done, steps done, steps in all): a bar where somebody
    watches; else a line a step, so that a log shows life."""
    if not output.shows_progress:
        yield lambda what, done, total: output.note(f"[{done}/{total}] {what}")
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
