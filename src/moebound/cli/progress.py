"""A progress bar on stderr: bytes done, rate, time left. Off when nobody watches."""

from __future__ import annotations

import contextlib
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

from moebound.cli.output import Output


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
        yield None
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
