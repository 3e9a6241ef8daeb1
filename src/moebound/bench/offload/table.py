"""The offloading benchmark as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from moebound.bench.offload.cases import OffloadReport


def render_offload(report: OffloadReport) -> Table:
    """One line a run. Ratios are to the raw run of the same tier and budget."""
    raw, small = report.expert_bytes["raw"], report.expert_bytes["compressed"]
    table = Table(
        title=f"Experts of {raw / 1e9:.2f} GB, {small / 1e9:.2f} GB compressed",
        caption=_policies(report) + "Milliseconds a token (median, 99th percentile) and to the "
        "first one; hits: of experts asked for; MB: moved a token; model: what the cost "
        "model says of these loads, from speeds measured one expert at a time.",
    )
    for name in ("run", "budget", "policy", "ms/token", "p99", "first", "hits", "MB/token",
                 "raw : this", "model", "peak GB"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("run", "policy") else "right")
    for row in report.rows:
        table.add_row(*_cells(row, report.rows))
    return table


def _policies(report: OffloadReport) -> str:
    found = [
        f"{100 * row['budget']:g} %: {row['policy']} ({100 * row['share_of_limit']:.0f} % of "
        "Belady's hits)"
        for row in report.policies
    ]
    return f"Best policy for this trace, simulated: {', '.join(found)}. " if found else ""


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    head = [row["name"], "" if row["budget"] is None else f"{100 * row['budget']:g} %",
            " ".join(filter(None, (row["policy"], row["predictor"])))]  # fmt: skip
    if "error" in row:
        return [*head, row["error"][:60], *[""] * 7]
    stats = row.get("stats")
    hits, moved, share = "", "", ""
    if stats:
        hits = f"{100 * stats['hit_ratio']:.1f} %"
        moved = f"{stats['bytes_moved'] / max(1, stats['tokens']) / 1e6:.1f}"
        share = f"{1e3 * modelled_s(row):.1f}"
    twin = next((r for r in rows if r["name"] == row["name"].replace("compressed", "raw")
                 and r["budget"] == row["budget"] and r["policy"] == row["policy"]
                 and r["predictor"] == row["predictor"] and "error" not in r), None)  # fmt: skip
    ratio = f"{twin['tpot_p50_s'] / row['tpot_p50_s']:.2f}" if twin and twin is not row else ""
    return [
        *head,
        f"{1e3 * row['tpot_p50_s']:.1f}",
        f"{1e3 * row['tpot_p99_s']:.1f}",
        f"{1e3 * row['ttft_s']:.0f}",
        hits, moved, ratio, share,
        f"{row['rss_peak_bytes'] / 1e9:.2f}",
    ]  # fmt: skip


def modelled_s(row: dict[str, Any]) -> float:
    """Seconds a token if reading hid behind decoding and computing, or they behind it, from what
    this run measured: bytes and seconds of its own reads, decodes and products."""
    stats = row["stats"]
    steps = max(1, stats["steps"])
    other = stats["step_s"] - stats["experts_s"]
    costs = stats["choice"]["costs"]
    read = stats["loads"] * costs["read_s"]
    busy = stats["loads"] * costs["decode_s"] + stats["compute_s"]
    return float((other + max(read, busy)) / steps)
