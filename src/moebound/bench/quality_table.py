"""The quality comparison as a table for people."""

from __future__ import annotations

from rich.table import Table

from moebound.bench.quality import QualityReport, QualityRow
from moebound.evaluate.evaluation import Tally, compare_to
from moebound.evaluate.statistics import Interval


def render_quality(report: QualityReport) -> Table:
    """A section a size, the quantizer whose size it is first."""
    table = Table(
        title=f"At equal bytes: {report.source}, {report.n_problems} problems of {report.task}",
        caption=(
            "bits/weight: experts only, every byte counted. KL: of the solutions' tokens, nats, "
            "± its standard error. ICA, PIA: with 95 % intervals. p: exact McNemar of PIA to the "
            "original, not corrected for the number of rows."
        ),
    )
    table.add_column("method", no_wrap=True)
    for name in ("bits/weight", "max error", "KL", "same top token", "ICA", "PIA", "p"):
        table.add_column(name, justify="right")
    table.add_row("original", "16.000", "0", "0", "100.0 %", *_shares(report.baseline.total), "")
    last = None
    for row in report.rows:
        if row.size_of != last:
            table.add_section()
        table.add_row(row.method, *_cells(report, row))
        last = row.size_of
    return table


def _cells(report: QualityReport, row: QualityRow) -> list[str]:
    far = row.fidelity
    return [
        f"{row.bits_per_weight:.3f}",
        f"{row.max_abs_error:.2g}",
        f"{far.answer_kl_nats:.2g} ± {far.answer_kl_stderr:.1g}",
        f"{100 * far.answer_top1_agreement:.2f} %",
        *_shares(row.evaluation.total),
        f"{compare_to(report.baseline, row.evaluation).pia.p:.2g}",
    ]


def _shares(tally: Tally) -> list[str]:
    if tally.down:
        return ["/", "/"]
    return [_percent(tally.ica_share), _percent(tally.pia_share)]


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}-{100 * share.high:.1f})"
