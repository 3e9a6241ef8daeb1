"""A routing profile: how often a model chooses each expert, and with what weights, task by task.

The paper records "the six experts selected in each layer along with their corresponding weights"
while the model works through a task (MoE-Compression, 2509.07727, section 3.1). A profile holds the
sums of that; a `Trace` is where they come from. `files/formats/profile.py` has the document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moebound.cache import Trace
from moebound.errors import MoeboundError
from moebound.files.documents import fields_of, load_json, save_json
from moebound.files.formats import profile as form
from moebound.profile.balance import Balance, balance
from moebound.profile.usage import LayerUse


@dataclass(frozen=True, eq=False)
class TaskUse:
    """What one task makes a model choose.

    text: "answers", the model's own, recorded while it wrote them, or "references", read at once.
    n_sequences: prompts. n_tokens: all that were routed; n_decoded: those that were fed one by one,
    while answering. layers: by decoder index, ascending.
    """

    task: str
    text: str
    n_sequences: int
    n_tokens: int
    n_decoded: int
    layers: tuple[LayerUse, ...]

    @classmethod
    def of(cls, trace: Trace, *, task: str, text: str) -> TaskUse:
        """Count a trace."""
        return cls(
            task,
            text,
            trace.n_sequences,
            trace.n_tokens,
            int(trace.decode.sum()),
            tuple(LayerUse.of(entry) for entry in trace.layers),
        )

    def __add__(self, other: TaskUse) -> TaskUse:
        """More of the same task. Raises MoeboundError for another task, text or model."""
        if (self.task, self.text) != (other.task, other.text):
            raise MoeboundError(
                f"task {self.task!r} ({self.text}) and task {other.task!r} ({other.text}) are not "
                "counted together; a profile keeps tasks apart"
            )
        return TaskUse(
            self.task,
            self.text,
            self.n_sequences + other.n_sequences,
            self.n_tokens + other.n_tokens,
            self.n_decoded + other.n_decoded,
            _add_layers(self.layers, other.layers),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in vars(self).items() if k != "layers"},
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskUse:
        layers = tuple(LayerUse.from_json(entry) for entry in data["layers"])
        return cls(
            str(data["task"]),
            str(data["text"]),
            int(data["n_sequences"]),
            int(data["n_tokens"]),
            int(data["n_decoded"]),
            layers,
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """The routing of one model, on one task or several.

    model: its name, as given. tasks: each task once.
    """

    model: str
    tasks: tuple[TaskUse, ...]

    def __post_init__(self) -> None:
        names = [task.task for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise MoeboundError(f"a profile has one or more tasks, each once; found {names}")

    @property
    def layers(self) -> tuple[LayerUse, ...]:
        """All tasks added up: a task counts as much as it has tokens."""
        total = self.tasks[0].layers
        for task in self.tasks[1:]:
            total = _add_layers(total, task.layers)
        return total

    def layer(self, layer: int) -> LayerUse:
        """Raises MoeboundError for a layer without experts, with those there are."""
        layers = self.layers
        for entry in layers:
            if entry.layer == layer:
                return entry
        raise MoeboundError(
            f"layer {layer} is not in the profile of {self.model}; layers with experts: "
            f"{', '.join(str(entry.layer) for entry in layers)}"
        )

    def ranking(self, layer: int) -> tuple[int, ...]:
        """The layer's experts from the most to the least often chosen, by all tasks together; of
        equals the lower index first. What selectors ask."""
        return self.layer(layer).ranking

    def only(self, task: str) -> Profile:
        """The profile of one task. Raises MoeboundError for one that is not in it."""
        for found in self.tasks:
            if found.task == task:
                return replace(self, tasks=(found,))
        raise MoeboundError(
            f"task {task!r} is not in the profile of {self.model}; it has "
            f"{', '.join(found.task for found in self.tasks)}"
        )

    def to_json(self) -> dict[str, Any]:
        layers = [
            {**layer.to_json(histogram=False), "balance": _balance_json(layer)}
            for layer in self.layers
        ]
        return form.to_json(self.model, layers, [task.to_json() for task in self.tasks])

    @classmethod
    def from_json(cls, data: Any, *, name: str = "profile") -> Profile:
        """Read back what `to_json` gave. name: for messages.

        Raises FormatError for anything else, or a later version.
        """
        form.FORMAT.check(data, name)
        with fields_of(name):
            tasks = tuple(TaskUse.from_json(task) for task in data["tasks"])
            return cls(str(data["model"]), tasks)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises MoeboundError for a file that cannot be read, FormatError for a wrong one."""
        return cls.from_json(load_json(path), name=str(path))


def combine(profiles: Sequence[Profile]) -> Profile:
    """Several tasks of one model in one profile; of a task that comes twice, the counts are added.

    Raises MoeboundError for profiles of different models.
    """
    tasks: dict[str, TaskUse] = {}
    for profile in profiles:
        if profile.model != profiles[0].model:
            raise MoeboundError(
                f"profiles of {profiles[0].model} and of {profile.model} cannot be combined"
            )
        for task in profile.tasks:
            tasks[task.task] = tasks[task.task] + task if task.task in tasks else task
    if not tasks:
        raise MoeboundError("no profiles to combine")
    return Profile(profiles[0].model, tuple(tasks.values()))


def balance_of(layer: LayerUse) -> Balance | None:
    """How evenly a layer is used; None where no expert was chosen at all."""
    return balance(layer.counts) if layer.counts.any() else None


def _add_layers(one: Sequence[LayerUse], other: Sequence[LayerUse]) -> tuple[LayerUse, ...]:
    if [entry.layer for entry in one] != [entry.layer for entry in other]:
        raise MoeboundError("profiles of different models: their layers differ")
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _balance_json(layer: LayerUse) -> dict[str, Any] | None:
    found = balance_of(layer)
    return None if found is None else found.to_json()
