"""The comparison of methods as a table for people."""

from __future__ import annotations

from rich.table import Table

from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.bench.quality_table import FIGURES


def render_methods(report: MethodsReport) -> Table:
    """A section a size, in the order measured."""
    about = " ".join(f"{field.title}: {field.about}." for field in FIGURES)
    table = Table(
        title=f"At equal bytes: {report.source}, {report.n_problems} problems of {report.task}",
        caption="bits/weight: experts only, every byte counted. s, MB: to make it, by a process "
        f"of its own. {about}",
    )
    table.add_column("method", no_wrap=True)
    for name in ("bits/weight", "guarantee", "max error", "s", "MB"):
        table.add_column(name, justify="right")
    for field in FIGURES:
        table.add_column(field.title, justify="right")
    last = None
    for row in report.rows:
        if last not in (None, row.bits):
            table.add_section()
        table.add_row(row.method, *_cells(row))
        last = row.bits
    return table


def _cells(row: MethodRow) -> list[str]:
    made = row.made
    if made is None or row.score is None:
        nearest = "" if row.nearest is None else f"; nearest {row.nearest:.4g}"
        why = "promise broken" if row.violated else "not reached" if row.nearest else "none"
        return [f"{row.bits:g}: {why}{nearest}"]
    return [
        f"{made.bits_per_weight:.3f}",
        made.guarantee,
        f"{made.max_abs_error:.2g}",
        f"{made.seconds:.1f}",
        f"{made.peak_bytes / 1e6:.0f}",
        *(field.text(row.score) for field in FIGURES),
    ]
