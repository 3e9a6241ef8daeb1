"""A sensitivity map: what an error in each expert does to a model. docs/sensitivity.md has the
fields; those that no plan needs may be missing, as in maps of earlier commits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moebound.errors import FormatError
from moebound.files.documents import (
    Document,
    Format,
    count,
    fields_of,
    items,
    load_json,
    number,
    numbers,
    save_json,
)
from moebound.score.record import Tokens, finite, tokens_of
from moebound.types import ExpertKey

FORMAT = Format("moebound.sensitivity", 2)
"""Version 1 has no `tokens`, and is of answers."""

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class RoleLine:
    """One projection perturbed alone. mean_abs: its mean |weight|. n_bytes: encoded, by rate.
    predicted_kl, flips_kl: by rate, the second a part of the first."""

    mean_abs: float
    n_bytes: tuple[int, ...] | None
    predicted_kl: Numbers
    flips_kl: Numbers | None

    def to_json(self) -> dict[str, Any]:
        return {
            "mean_abs": self.mean_abs,
            "bytes": _listed(self.n_bytes),
            "predicted_kl": list(self.predicted_kl),
            "flips_kl": _listed(self.flips_kl),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], n_rates: int) -> RoleLine:
        return cls(number(data["mean_abs"], "mean_abs"), *_by_rate(data, n_rates))


@dataclass(frozen=True)
class ExpertLine:
    """One expert perturbed alone, at each rate.

    mean_abs: mean |weight| of all its n_weights. n_tokens: how many were sent to it. n_bytes: of
    its encoded matrices. predicted_kl: nats a scored position; flips_kl: the part of it that comes
    from routers which change their mind, None where that was not told apart. measured_kl: None
    where it was not measured; infinite, in the JSON null, where the model said nothing any more.
    by_role: empty where projections were not perturbed alone.
    """

    key: ExpertKey
    mean_abs: float
    n_weights: int
    n_tokens: int
    n_bytes: tuple[int, ...] | None
    predicted_kl: Numbers
    flips_kl: Numbers | None
    measured_kl: Numbers | None
    by_role: Mapping[str, RoleLine]

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.key.layer,
            "expert": self.key.expert,
            "mean_abs": self.mean_abs,
            "n_weights": self.n_weights,
            "n_tokens": self.n_tokens,
            "bytes": _listed(self.n_bytes),
            "predicted_kl": list(self.predicted_kl),
            "flips_kl": _listed(self.flips_kl),
            "measured_kl": (
                None if self.measured_kl is None else [finite(kl) for kl in self.measured_kl]
            ),
            "by_role": {role: line.to_json() for role, line in self.by_role.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], n_rates: int) -> ExpertLine:
        """Raises FormatError, naming expert and field."""
        layer = count(data["layer"], "layer")
        expert = count(data["expert"], f"layer {layer}: expert")
        key = ExpertKey(layer, expert, bool(data.get("shared", False)))
        with fields_of(str(key)):
            by_role = dict[str, RoleLine]()
            for role, line in data.get("by_role", {}).items():
                with fields_of(f"by_role: {role}"):
                    by_role[str(role)] = RoleLine.from_json(line, n_rates)
            measured = data.get("measured_kl")
            if measured is not None:
                known = [0.0 if kl is None else kl for kl in items(measured, "measured_kl")]
                # Rounding may have left a KL of nothing just below 0.
                numbers(known, "measured_kl", n=n_rates, least=None)
                measured = tuple(math.inf if kl is None else float(kl) for kl in measured)
            n_bytes, predicted, flips = _by_rate(data, n_rates)
            return cls(
                key,
                number(data["mean_abs"], "mean_abs"),
                count(data.get("n_weights", 0), "n_weights"),
                count(data.get("n_tokens", 0), "n_tokens"),
                n_bytes,
                predicted,
                flips,
                measured,
                by_role,
            )


@dataclass(frozen=True)
class SensitivityMap:
    """All experts of a model at all rates.

    model, task: names. n_prompts, n_positions: of the calibration text. skip: problems of the task
    that were left out before it; None where that is not known. tokens: which count in every KL.
    codec: whose error it is.
    bounds: the rates, ascending, each relative to the expert's mean |weight|. joint: all experts
    perturbed at once, predicted and measured, by rate. checks: how good the predictions are on
    those that were measured, and what it took; see docs/sensitivity.md.
    """

    model: str
    task: str
    n_prompts: int
    n_positions: int
    codec: str
    bounds: Numbers
    experts: tuple[ExpertLine, ...]
    joint: Mapping[str, Any]
    checks: Mapping[str, Any]
    skip: int | None = None
    tokens: Tokens = "answers"

    def to_json(self) -> dict[str, Any]:
        return {
            **FORMAT.header,
            "model": self.model,
            "task": self.task,
            "skip": self.skip,
            "tokens": self.tokens,
            "n_prompts": self.n_prompts,
            "n_positions": self.n_positions,
            "codec": self.codec,
            "bounds": list(self.bounds),
            "experts": [line.to_json() for line in self.experts],
            "joint": dict(self.joint),
            "checks": dict(self.checks),
        }

    @classmethod
    def from_json(cls, data: Any, *, name: str = "sensitivity map") -> SensitivityMap:
        """Read back what `to_json` gave. name: for messages.

        Raises FormatError for anything else, or a later version.
        """
        FORMAT.check(data, name)
        with fields_of(name):
            bounds = numbers(data["bounds"], "bounds")
            if bounds[0] <= 0 or any(b <= a for a, b in pairwise(bounds)):
                raise FormatError(f"bounds: expected ascending numbers above 0, found {bounds}")
            return cls(
                str(data.get("model", "")),
                str(data.get("task", "")),
                count(data.get("n_prompts", 0), "n_prompts"),
                count(data.get("n_positions", 0), "n_positions"),
                str(data.get("codec", "")),
                bounds,
                tuple(
                    ExpertLine.from_json(line, len(bounds))
                    for line in items(data["experts"], "experts")
                ),
                dict(data.get("joint") or {}),
                dict(data.get("checks") or {}),
                None if data.get("skip") is None else count(data["skip"], "skip"),
                tokens_of(data.get("tokens", "answers")),
            )

    @classmethod
    def of(cls, document: Document) -> SensitivityMap:
        """Raises as `from_json`, naming the file."""
        return cls.from_json(document.content, name=str(document.path))

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> SensitivityMap:
        """Raises MoeboundError for a file that cannot be read, FormatError for a wrong one."""
        return cls.from_json(load_json(path), name=str(path))


def _by_rate(
    data: Mapping[str, Any], n_rates: int
) -> tuple[tuple[int, ...] | None, Numbers, Numbers | None]:
    """What experts and projections have of each rate: bytes, predicted KL, flips' part of it."""
    n_bytes, flips = data.get("bytes"), data.get("flips_kl")
    return (
        None if n_bytes is None else tuple(count(n, "bytes") for n in items(n_bytes, "bytes")),
        numbers(data["predicted_kl"], "predicted_kl", n=n_rates),
        None if flips is None else numbers(flips, "flips_kl", n=n_rates),
    )


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)
