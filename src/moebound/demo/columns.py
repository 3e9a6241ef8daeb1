"""The columns of the results, once, for the terminal and for the page alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from moebound.score import READ, Field

if TYPE_CHECKING:  # the command line's help must not load all that a report is made of
    from moebound.bench.report import BenchReport
    from moebound.bench.report import Row as SpeedRow
    from moebound.demo.report import Report, StoreRow

R = TypeVar("R")

KL_DIGITS = (".5f", ".5f")
"""Of a figure and its error: as many for all, so that they stand one below the other."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """group: what stands above `name` (may be empty). cell: the figure as text."""

    group: str
    name: str
    cell: Callable[[R], str]

    @property
    def narrow_title(self) -> str:
        """Group and name in few letters, on two lines: a terminal has no cells over cells."""
        group = _NARROW.get(self.group, self.group)
        return f"{group}\n{_NARROW.get(self.name, self.name)}"


_NARROW = {
    "promise": "",
    "bits per weight": "bits/w",
    "nats a token": "",
    "KL, answers": "KL, ans.",
    "KL, all text": "KL, all",
    "same top token": "same",
    "Gweights/s": "Gw/s",
    "problems": "",
    "lost, gained": "lost, g.",
}


def store_columns(report: Report) -> list[Column[StoreRow]]:
    """One line a codec and bound."""
    return [
        Column("", "codec", lambda row: row.title),
        Column("promise", "rate", rate_of),
        Column("promise", "kept/asked", lambda row: kept_over_asked(row.worst)),
        Column("bits per weight", "experts", lambda row: f"{row.expert_bits_per_weight:.2f}"),
        Column("bits per weight", "model", lambda row: f"{row.model_bits_per_weight:.2f}"),
        Column("", "MB", lambda row: f"{row.expert_bytes / 1e6:.2f}"),
        *(Column(field.unit, field.title, partial(_figure, field)) for field in READ),
        Column("right", f"of {report.n_problems}", lambda row: str(row.tally.pia)),
        Column("problems", "lost, gained", lambda row: f"−{row.score.lost} +{row.score.gained}"),
    ]


def _figure(field: Field, row: StoreRow) -> str:
    return field.text(row.score, KL_DIGITS if field.unit else None)


def rate_of(row: StoreRow) -> str:
    if row.rate is None:
        return "exact"
    return f"bytes of {row.rate:g}" if row.planned else f"{row.rate:g}"


def speed_columns(report: BenchReport) -> list[Column[SpeedRow]]:
    """One line a codec and bound, on a matrix of full size."""
    memcpy = sum(report.memcpy_gb_per_s) / 2
    return [
        Column("", "codec", lambda row: row.codec),
        Column("", "rate", lambda row: f"{row.rate:g}"),
        Column("", "kept/asked", lambda row: kept_over_asked(row.max_abs_error / row.abs_bound)),
        Column("bits per weight", "all bytes", lambda row: f"{row.bits_per_weight:.3f}"),
        Column("bits per weight", "entropy", lambda row: f"{row.entropy_bits_per_weight:.3f}"),
        Column("Gweights/s", "encode", lambda row: f"{row.encode_gweights_per_s:.2f}"),
        Column("Gweights/s", "decode", lambda row: f"{row.decode_gweights_per_s:.2f}"),
        Column(
            "decode", "of memcpy",
            lambda row: f"{100 * row.decode_gweights_per_s * _bytes(row) / memcpy:.0f} %",
        ),
    ]  # fmt: skip


def _bytes(row: SpeedRow) -> int:
    return 4 if row.dtype == "F32" else 2


def kept_over_asked(worst: float) -> str:
    """Four digits, rounded away from 1: 0.99999 must not read as 1, nor 1.00001 as kept."""
    digits = math.ceil(worst * 10_000) if worst > 1 else math.floor(worst * 10_000)
    return f"{digits / 10_000:.4f}"
