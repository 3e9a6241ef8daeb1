"""Parts of a map, as other processes and machines compute them: see `jobs/workers.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moebound.errors import MoeboundError
from moebound.evaluate.loading import load
from moebound.score.record import Tokens
from moebound.sensitivity.map.build import Build, Kind, ListedTies
from moebound.sensitivity.map.settings import MapSettings
from moebound.tasks import get_task


class Parts:
    """What a worker has: the model, the text, and the ties that are known."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._ties: ListedTies = []

    def use(self, known: Mapping[str, Any]) -> None:
        self._ties = known["ties"]

    def run(self, part: tuple[Kind, Sequence[Any]]) -> list[dict[str, Any]]:
        return list(self._build.part(*part, self._ties))


def parts(
    src: str,
    task: str,
    limit: int,
    skip: int,
    tokens: Tokens,
    settings: MapSettings,
    weights: str,
    threads: int | None,
) -> Parts:
    """A worker's. weights: a digest of those that the process which asked has; MoeboundError where
    src has others here."""
    if threads is not None:
        torch.set_num_threads(threads)
    build = Build.of(load(src), get_task(task), limit, settings, None, skip=skip, tokens=tokens)
    if build.weights != weights:
        raise MoeboundError(
            f"{src}: a worker finds other weights there than the process that asked; all machines "
            "must see the same files"
        )
    return Parts(build)
