"""The quality comparison as a table for people."""

from __future__ import annotations

from rich.table import Table

from moebound.bench.quality import QualityReport, QualityRow
from moebound.score import KL, TABLE, Score
from moebound.score.fields import TAILS

FIGURES = (*KL, *TAILS, *(field for field in TABLE if field not in KL))


def render_quality(report: QualityReport) -> Table:
    """A section a size, the quantizer or peer whose size it is first."""
    about = " ".join(f"{field.title}: {field.about}." for field in FIGURES)
    table = Table(
        title=f"At equal bytes: {report.source}, {report.n_problems} problems of {report.task}",
        caption=f"bits/weight: experts only, every byte counted; whole: all tensors. {about}",
    )
    table.add_column("method", no_wrap=True)
    for name in ("bits/weight", "whole", "max error", *(field.title for field in FIGURES)):
        table.add_column(name, justify="right")
    itself = Score(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, tally=report.baseline.total)
    table.add_row("original", "16.000", "16.000", "0", *_figures(itself))
    last = None
    for row in report.rows:
        if row.size_of != last:
            table.add_section()
        table.add_row(row.method, *_cells(row))
        last = row.size_of
    return table


def _cells(row: QualityRow) -> list[str]:
    bits = f"{row.bits_per_weight:.3f}", f"{row.whole_bits_per_weight:.3f}"
    return [*bits, f"{row.max_abs_error:.2g}", *_figures(row.score)]


def _figures(score: Score) -> list[str]:
    return [field.text(score) for field in FIGURES]
