"""A sensitivity map as data: what `moebound plan` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import FormatError
from moebound.files.json_document import check_header, load_json, save_json
from moebound.score.record import finite
from moebound.types import ExpertKey

FORMAT, VERSION = "moebound.sensitivity", 1

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class RoleLine:
    """One projection perturbed alone. mean_abs: its mean |weight|. n_bytes: encoded, by rate.
    predicted_kl, flips_kl: by rate, the second a part of the first."""

    mean_abs: float
    n_bytes: tuple[int, ...]
    predicted_kl: Numbers
    flips_kl: Numbers


@dataclass(frozen=True)
class ExpertLine:
    """One expert perturbed alone, at each rate.

    mean_abs: mean |weight| of all its n_weights. n_tokens: how many were sent to it. n_bytes: of
    its encoded matrices. predicted_kl: nats a scored position; flips_kl: the part of it that comes
    from routers which change their mind. measured_kl: None where it was not measured; infinite, in
    the JSON null, where the model said nothing any more.
    """

    key: ExpertKey
    mean_abs: float
    n_weights: int
    n_tokens: int
    n_bytes: tuple[int, ...]
    predicted_kl: Numbers
    flips_kl: Numbers
    measured_kl: Numbers | None
    by_role: Mapping[str, RoleLine]

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.key.layer,
            "expert": self.key.expert,
            "mean_abs": self.mean_abs,
            "n_weights": self.n_weights,
            "n_tokens": self.n_tokens,
            "bytes": list(self.n_bytes),
            "predicted_kl": list(self.predicted_kl),
            "flips_kl": list(self.flips_kl),
            "measured_kl": (
                None if self.measured_kl is None else [finite(kl) for kl in self.measured_kl]
            ),
            "by_role": {
                role: {
                    "mean_abs": line.mean_abs,
                    "bytes": list(line.n_bytes),
                    "predicted_kl": list(line.predicted_kl),
                    "flips_kl": list(line.flips_kl),
                }
                for role, line in self.by_role.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExpertLine:
        measured = data["measured_kl"]
        return cls(
            ExpertKey(int(data["layer"]), int(data["expert"])),
            float(data["mean_abs"]),
            int(data["n_weights"]),
            int(data["n_tokens"]),
            tuple(int(n) for n in data["bytes"]),
            _numbers(data["predicted_kl"]),
            _numbers(data["flips_kl"]),
            None if measured is None else _measured(measured),
            {
                str(role): RoleLine(
                    float(line["mean_abs"]),
                    tuple(int(n) for n in line["bytes"]),
                    _numbers(line["predicted_kl"]),
                    _numbers(line["flips_kl"]),
                )
                for role, line in data["by_role"].items()
            },
        )


@dataclass(frozen=True)
class SensitivityMap:
    """All experts of a model at all rates.

    model, task: names. n_prompts, n_positions: of the calibration text. skip: problems of the task
    that were left out before it; None where that is not known. codec: whose error it is.
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

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "task": self.task,
            "skip": self.skip,
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
        check_header(data, FORMAT, VERSION, name)
        try:
            return cls(
                str(data["model"]),
                str(data["task"]),
                int(data["n_prompts"]),
                int(data["n_positions"]),
                str(data["codec"]),
                _numbers(data["bounds"]),
                tuple(ExpertLine.from_json(line) for line in data["experts"]),
                dict(data["joint"]),
                dict(data["checks"]),
                None if data.get("skip") is None else int(data["skip"]),
            )
        except KeyError as error:
            raise FormatError(f"{name}: {error} is missing") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{name}: {error}") from error

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> SensitivityMap:
        """Raises MoeboundError for a file that cannot be read, FormatError for a wrong one."""
        return cls.from_json(load_json(path), name=str(path))


def _measured(values: Any) -> Numbers:
    return tuple(math.inf if value is None else float(value) for value in values)


def _numbers(values: Any) -> Numbers:
    return tuple(float(value) for value in values)
