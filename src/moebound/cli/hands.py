"""Who works: `--workers` and `--ray`, the same for every command that has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from moebound.jobs.workers import Hire, Opens, Workers

F = TypeVar("F", bound=Callable[..., Any])


def works_in_parts(each: str) -> Callable[[F], F]:
    """Adds --workers and --ray. each: what a worker has for itself."""

    def add(command: F) -> F:
        command = click.option(
            "--ray", "ray_address", metavar="ADDRESS",
            help="Run the workers on a Ray cluster: its address, auto, or local.",
        )(command)  # fmt: skip
        return click.option(
            "--workers", type=click.IntRange(min=1), default=1, show_default=True,
            help=f"Processes, each with {each}.",
        )(command)  # fmt: skip

    return add


def hire(count: int, ray_address: str | None, *, device: str = "cpu") -> Hire | None:
    """None where this process does the work itself."""
    if ray_address is None and count == 1:
        return None

    def workers(setup: Opens) -> Workers:
        from moebound.jobs.cluster import RayWorkers
        from moebound.jobs.workers import Processes

        if ray_address is None:
            return Processes(setup, count)
        return RayWorkers(setup, count, ray_address, gpus=0.0 if device == "cpu" else 1.0)

    return workers


def everywhere(name: str | os.PathLike[str]) -> str:
    """A path as every machine and process understands it; names of other things as they are."""
    text = os.fspath(name)
    return str(Path(text).resolve()) if Path(text).exists() else text
