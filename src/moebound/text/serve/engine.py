"""What the server needs of a model, and that of any plain model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class Engine(Protocol):
    """A model that is ready to run. Everything but `stats` is called from one thread at a time."""

    @property
    def model(self) -> Any:
        """A causal language model of transformers, in evaluation mode."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer. May be used by another thread while the model runs."""

    def begin_sequence(self) -> None:
        """Called before each new text, for whoever keeps statistics of one."""

    def stats(self) -> dict[str, Any]:
        """What it wants to tell about itself: JSON-ready, without NaN. Called at any time, from
        any thread."""

    def close(self) -> None:
        """Called once, when nothing runs any more."""


@dataclass(frozen=True, eq=False)
class PlainEngine:
    """All experts in memory, as transformers loads them. about: facts for `stats`."""

    model: Any
    tokenizer: Any
    about: Mapping[str, Any] = field(default_factory=dict)

    def begin_sequence(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return dict(self.about)

    def close(self) -> None:
        pass
