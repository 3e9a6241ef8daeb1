"""Thresholds of skipping policies: what `moebound thresholds` measured on a text.

A JSON document `moebound.skipping`, version 1: of each layer with experts the median of a token's
second largest weight over its largest (`median_ratio`), and the KL divergence from the whole model
of one without the layer's routed experts, over all tokens (`kl`) and over those of answers
(`answer_kl`); and of MoDES' threshold tau some points with the share of pairs that each skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moebound.errors import FormatError
from moebound.files.documents import Format, count, fields_of, items, number, save_json

FORMAT = Format("moebound.skipping", 1)


@dataclass(frozen=True)
class LayerLine:
    """One layer with experts."""

    layer: int
    median_ratio: float
    kl: float
    answer_kl: float


@dataclass(frozen=True)
class Point:
    """One tau. share: of the pairs of a token and an expert, those that it skipped."""

    tau: float
    share: float
    kl: float
    answer_kl: float


@dataclass(frozen=True)
class Thresholds:
    """model, task: names. text_sha256: of the token ids. points: by ascending tau."""

    model: str
    task: str
    text_sha256: str
    n_sequences: int
    n_tokens: int
    layers: tuple[LayerLine, ...]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        found = FORMAT.header | asdict(self)
        return found | {name: list(found[name]) for name in ("layers", "points")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, name: str = "thresholds") -> Thresholds:
        """Read back what `to_json` gave. Raises FormatError, naming the field, for all else."""
        FORMAT.check(data, name)
        with fields_of(name):
            layers = tuple(_layer(line) for line in items(data["layers"], "layers"))
            points = tuple(_point(line) for line in items(data["points"], "points"))
            if not layers or len({line.layer for line in layers}) < len(layers):
                raise FormatError("layers: expected each layer with experts once")
            if any(b.tau <= a.tau for a, b in pairwise(points)):
                raise FormatError("points: expected ascending tau")
            return cls(
                str(data["model"]),
                str(data["task"]),
                str(data["text_sha256"]),
                count(data["n_sequences"], "n_sequences"),
                count(data["n_tokens"], "n_tokens"),
                layers,
                points,
            )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Thresholds:
        """Raises FormatError for a file that cannot be read, or is something else."""
        return cls.from_json(FORMAT.read(path).content, name=str(path))


def _layer(data: Mapping[str, Any]) -> LayerLine:
    ratio = _share(data["median_ratio"], "median_ratio")
    kls = (number(data[name], name) for name in ("kl", "answer_kl"))
    return LayerLine(count(data["layer"], "layer"), ratio, *kls)


def _point(data: Mapping[str, Any]) -> Point:
    tau, kl, answer_kl = (number(data[name], name) for name in ("tau", "kl", "answer_kl"))
    return Point(tau, _share(data["share"], "share"), kl, answer_kl)


def _share(value: Any, what: str) -> float:
    found = number(value, what)
    if found > 1:
        raise FormatError(f"{what}: expected 0 to 1, found {found}")
    return found
