"""The codec benchmark as a table for people."""

from __future__ import annotations

from rich.table import Table

from moebound.bench.report import BenchReport, Row


def render_table(report: BenchReport) -> Table:
    """One line a codec and case; ratios are to SZ3's smallest algorithm in the same run."""
    memcpy = sum(report.memcpy_gb_per_s) / 2
    threads = report.rows[0].threads if report.rows else 1
    table = Table(
        title="Codecs at the same bound, kept after the cast",
        caption=(
            f"{report.environment.get('cpu') or 'unknown CPU'}, one thread unless said; medians. "
            f"memcpy here: {memcpy:.1f} GB/s written. bits/weight: all bytes. Entropy: of the "
            "ideal uniform quantizer before rounding to the dtype."
        ),
    )
    for name in ("matrix", "rate", "codec"):
        table.add_column(name, justify="right" if name == "rate" else "left", no_wrap=True)
    right = ["bits/weight", "over entropy", "size : SZ3", "patched", "encode Gw/s", "decode Gw/s"]
    right += ["decode GB/s", "decode : SZ3"]
    if threads > 1:
        right.append(f"{threads} threads")
    for name in right:
        table.add_column(name, justify="right")
    last: tuple[str, float] | None = None
    for row in report.rows:
        case = (row.matrix, row.rate)
        if last is not None and case != last:
            table.add_section()
        cells = [row.matrix, f"{row.rate:g}"] if case != last else ["", ""]
        table.add_row(*cells, row.codec, *_cells(row, report.row(*case, "sz3"), threads))
        last = case
    return table


def _cells(row: Row, sz3: Row | None, threads: int) -> list[str]:
    itemsize = 4 if row.dtype == "F32" else 2
    cells = [
        f"{row.bits_per_weight:.3f}",
        f"{row.over_entropy_bits:+.3f}",
        f"{row.size_to_sz3:.3f}" if row.size_to_sz3 is not None else "",
        str(row.patched),
        f"{row.encode_gweights_per_s:.3f}",
        f"{row.decode_gweights_per_s:.3f}",
        f"{row.decode_gweights_per_s * itemsize:.2f}",
        f"{sz3.decode.p50_s / row.decode.p50_s:.1f}x" if sz3 else "",
    ]
    if threads > 1:
        scaling = row.decode_scaling
        cells.append(f"{scaling:.2f}x" if scaling else "")
    return cells
