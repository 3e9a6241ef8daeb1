"""A progress bar on stderr: bytes done, rate, time left. Where nobody watches, lines for a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moebound.cli import wording
from moebound.cli.output import Output

LINES_EVERY_S = 10.0
"""Without a terminal, how often a line says how far it is. What takes less says nothing."""


class Step(Protocol):
    """How far a piece of work is, as `moebound.store.Progress` says it."""

    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def done_experts(self) -> int: ...
    @property
    def total_experts(self) -> int: ...
    @property
    def label(self) -> str: ...


@contextlib.contextmanager
def progress_bar(output: Output, verb: str) -> Iterator[Callable[[Step], None] | None]:
    """Yields what to call after each step, or None when nothing is to be shown."""
    if not output.shows_progress:
        yield None if output.quiet else _lines(output, verb)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[experts]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(verb, total=None, experts="")

        def step(now: Step) -> None:
            bar.update(
                task,
                description=f"{verb} {now.label}",
                completed=now.done_bytes,
                total=now.total_bytes,
                experts=f"{now.done_experts}/{now.total_experts} experts",
            )

        yield step


def _lines(output: Output, verb: str) -> Callable[[Step], None]:
    began = last = time.monotonic()
    before: int | None = None  # what an earlier run has done took no time of this one

    def step(now: Step) -> None:
        nonlocal last, before
        at = time.monotonic()
        if before is None:
            before = now.done_bytes
        if at - last < LINES_EVERY_S:
            return
        last, made = at, now.done_bytes - before
        left = ""
        if made > 0 and now.done_bytes < now.total_bytes:
            seconds = (at - began) * (now.total_bytes - now.done_bytes) / made
            left = f"; {wording.time_left(seconds)}"
        output.note(
            f"{verb} {now.label}: {now.done_experts} of {now.total_experts} experts, "
            f"{wording.n_bytes(now.done_bytes)} of {wording.n_bytes(now.total_bytes)}{left}"
        )

    return step
