"""Changes in place to a model's experts that are always taken back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moebound.checkpoint import Role
from moebound.errors import MoeboundError
from moebound.model.live import LiveExpert

Matrices = dict[Role, torch.Tensor]

_changed_now: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""Experts module -> which of its experts are changed at the moment."""


class Undo:
    """Keeps what experts were before they are written, and which are marked as changed."""

    def __init__(self) -> None:
        self._marked: list[LiveExpert] = []
        self._saved: list[tuple[LiveExpert, Matrices]] = []

    def claim(self, expert: LiveExpert) -> None:
        """Mark an expert as changed. Raises MoeboundError if it is marked."""
        now = _changed_now.setdefault(expert.stack.module, set())
        if expert.index in now:
            raise MoeboundError(
                f"{expert.key} is perturbed already: perturbations may be nested for different "
                "experts only"
            )
        self._marked.append(expert)
        now.add(expert.index)

    def replace(self, expert: LiveExpert, weights: Matrices) -> None:
        """Copy weights into the model, after a copy of what was there is safe."""
        live = expert.matrices
        self._saved.append((expert, {role: matrix.clone() for role, matrix in live.items()}))
        _write(live, weights)

    def leave(self) -> None:
        """Copy everything back and take the marks away. Interrupted and begun again, it goes on
        where it was; done, it does nothing."""
        while self._saved:
            expert, saved = self._saved[-1]
            _write(expert.matrices, saved)
            self._saved.pop()
        for expert in self._marked:
            _changed_now[expert.stack.module].discard(expert.index)
        self._marked = []


@contextmanager
def exactly_undone(experts: Sequence[LiveExpert]) -> Iterator[Undo]:
    """Inside of the `with`, the experts may be replaced; after it, they are as they were.

    Raises MoeboundError for an expert that is inside of another such `with`: which weights would
    be its own could not be told.
    """
    undo = Undo()
    # Leaving is tried twice: whatever line a Ctrl-C hits, one of them is carried out whole.
    try:
        try:
            for expert in experts:
                undo.claim(expert)
            yield undo
        finally:
            undo.leave()
    finally:
        undo.leave()


@torch.no_grad()
def _write(live: Matrices, weights: Matrices) -> None:
    for role, matrix in live.items():
        matrix.copy_(weights[role])
