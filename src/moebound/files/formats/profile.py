"""A routing profile: how often each expert is chosen. docs/profile.md has the fields.

`layers` has what all tasks add up to, `tasks` the details. What a layer's use is (its sums, means
and histograms) belongs to `profile/usage.py`; here is what is around it, and the counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moebound.files.documents import Document, Format, count, fields_of, items, numbers

FORMAT = Format("moebound.profile", 1)

Layers = Sequence[Mapping[str, Any]]


def to_json(model: str, layers: Layers, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document. layers: all tasks added up, each with `layer` and `counts`; a task has its own
    `layers`."""
    return {**FORMAT.header, "model": model, "layers": list(layers), "tasks": list(tasks)}


def counts_by_layer(document: Document) -> dict[int, tuple[float, ...]]:
    """Decoder layer -> how often each of its experts was chosen, by all tasks together.

    Raises FormatError, naming the file.
    """
    found = dict[int, tuple[float, ...]]()
    with fields_of(str(document.path)):
        for entry in items(document.content["layers"], "layers"):
            layer = count(entry["layer"], "layer")
            found[layer] = numbers(entry["counts"], f"layer {layer}: counts")
    return found
