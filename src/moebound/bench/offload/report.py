"""What a benchmark found, as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebound.errors import FormatError

FORMAT, VERSION = "moebound.bench.offload", 2
"""Version 1 had a prompt's loads among those of the tokens behind it."""


@dataclass(frozen=True)
class OffloadReport:
    """rows: one a case, the case's fields and what `measure` found, or its error.

    policies: what the cache simulator says of this trace, one a budget: the policy that moves the
    fewest bytes, its hit ratio, and its share of the hits that are possible (Belady); empty where
    no trace was followed.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    expert_bytes: dict[str, int]
    policies: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **vars(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OffloadReport:
        """Raises FormatError for anything else, or a later version."""
        if document.get("format") != FORMAT or document.get("version") not in (1, VERSION):
            raise FormatError(
                f"no report of `moebound bench offload`: expected {FORMAT}, version {VERSION} or "
                f"1, found {document.get('format')}, version {document.get('version')}"
            )
        return cls(**{name: document[name] for name in cls.__dataclass_fields__})


def modelled_s(row: Mapping[str, Any]) -> float:
    """Seconds a step if reading hid behind decoding and computing, or they behind it, from what
    this run measured: bytes and seconds of its own reads, decodes and products.

    One read at a time is what it knows; where several at once are faster, a run can be, too.
    """
    stats = row["stats"]
    steps = max(1, stats["steps"])
    other = stats["step_s"] - stats["experts_s"]
    costs = stats["choice"]["costs"]
    read = stats["loads"] * costs["read_s"]
    busy = stats["loads"] * costs["decode_s"] + stats["compute_s"]
    return float((other + max(read, busy)) / steps)


def over_model(row: Mapping[str, Any]) -> float:
    """Seconds that its steps took, over what `modelled_s` says of the same ones."""
    stats = row["stats"]
    return float(stats["step_s"] / max(1, stats["steps"]) / modelled_s(row))
