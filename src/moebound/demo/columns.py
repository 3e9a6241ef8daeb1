"""The columns of the result, once, for the terminal and for the page alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moebound.demo.report import FullSizeRow, Report, Row


@dataclass(frozen=True)
class Column:
    """group: what stands above `name` (may be empty). cell: the figure as text."""

    group: str
    name: str
    cell: Callable[[Row], str]

    @property
    def narrow_title(self) -> str:
        """Group and name in few letters, on two lines: a terminal has no cells over cells."""
        group = _NARROW.get(self.group, self.group)
        return f"{group}\n{_NARROW.get(self.name, self.name)}"


_NARROW = {
    "promise": "",
    "bits per weight": "bits/w",
    "ratio to bf16": "ratio",
    "mean KL, nats": "KL, nats",
    "Gweights/s": "Gw/s",
}


def main_columns(report: Report) -> list[Column]:
    """One line a codec and bound."""
    return [
        Column("", "codec", lambda row: row.codec),
        Column("promise", "rate", lambda row: "exact" if row.rate is None else f"{row.rate:g}"),
        Column("promise", "kept/asked", lambda row: kept_over_asked(row.worst)),
        Column("bits per weight", "experts", lambda row: f"{row.expert_bits_per_weight:.2f}"),
        Column("bits per weight", "model", lambda row: f"{row.model_bits_per_weight:.2f}"),
        Column("ratio to bf16", "experts", lambda row: f"{row.expert_ratio:.2f}"),
        Column("ratio to bf16", "model", lambda row: f"{row.model_ratio:.2f}"),
        Column("decode", "Gweights/s", lambda row: f"{row.decode_gweights_per_s:.3f}"),
        Column("mean KL, nats", "all tokens", lambda row: f"{row.kl_nats:.5f}"),
        Column("mean KL, nats", "solutions", lambda row: f"{row.answer_kl_nats:.5f}"),
        Column("agree", "top-1", lambda row: f"{100 * row.top1_agreement:.2f} %"),
        Column("right", f"of {report.n_prompts}", lambda row: str(row.reproduced)),
    ]


@dataclass(frozen=True)
class FullSizeColumn:
    name: str
    cell: Callable[[FullSizeRow], str]


FULL_SIZE_COLUMNS = (
    FullSizeColumn("codec", lambda row: row.codec),
    FullSizeColumn("rate", lambda row: f"{row.rate:g}"),
    FullSizeColumn("kept/asked", lambda row: kept_over_asked(row.worst)),
    FullSizeColumn("bits per weight", lambda row: f"{row.bits_per_weight:.3f}"),
    FullSizeColumn("entropy", lambda row: f"{row.entropy_bits_per_weight:.3f}"),
    FullSizeColumn("decode, Gweights/s", lambda row: f"{row.decode_gweights_per_s:.2f}"),
)


def kept_over_asked(worst: float) -> str:
    """Four digits, rounded away from 1: 0.99999 must not read as 1, nor 1.00001 as kept."""
    digits = math.ceil(worst * 10_000) if worst > 1 else math.floor(worst * 10_000)
    return f"{digits / 10_000:.4f}"
