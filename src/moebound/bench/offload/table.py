"""The offloading benchmark as tables for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from moebound.bench.offload.report import OffloadReport, modelled_s, over_model

_COLUMNS = ("run", "bits", "budget", "policy", "ms/token", "p99", "first", "hits", "MB/token",
            "raw : this", "model", "this : model", "peak GB", "with files")  # fmt: skip


def render_offload(report: OffloadReport) -> Table:
    """One line a run. Ratios are to the raw run of the same tier, budget and routing."""
    raw, small = report.expert_bytes["raw"], report.expert_bytes["compressed"]
    limit = report.settings.get("memory_limit")
    table = Table(
        title=f"Experts of {raw / 1e9:.2f} GB, {small / 1e9:.2f} GB compressed"
        + (f"; each run within {limit / 1e9:g} GB, files counted" if limit else ""),
        caption=_policies(report) + "Milliseconds a token (median, 99th percentile) and to the "
        "first one; bits: a weight of routed experts, as its files hold them; hits: of experts "
        "asked for; MB: moved a token; model: what the cost "
        "model says of these loads, from speeds measured one expert at a time, and what they took "
        "over that; peak: of the process, and of its control group, which counts files it read. "
        "Own routing: the model's routers choose, random ones not as trained ones do; else the "
        "trace does. Linear layers: codes of what is no expert's, coded at rate "
        f"{report.settings.get('others', 0):g}; where nothing is said, that is as it was.",
    )
    counts_files = any(row.get("memory_peak_bytes") for row in report.rows)
    columns = _COLUMNS if counts_files else _COLUMNS[:-1]
    for name in columns:
        table.add_column(name, justify="left" if name in ("run", "policy") else "right")
    for row in report.rows:
        if row["how"] != "clients":
            table.add_row(*_cells(row, report.rows)[: len(columns)])
    return table


def render_clients(report: OffloadReport) -> list[Table]:
    """Runs of several clients, one a line; none where there were none."""
    rows = [row for row in report.rows if row["how"] == "clients"]
    if not rows:
        return []
    table = Table(
        title=f"{report.settings['clients']} clients at a time",
        caption="Tokens a second: of one client by itself, of one where several could be, of all "
        "together; ratio: together over by itself. Behind prompts: without the time until the last "
        "prompt was read. Loads: experts read and decoded for a token. Same: the first client's "
        "logits are those it has as the only one, to the bit.",
    )
    for name in ("run", "budget", "alone", "one", "together", "ratio", "ratio behind prompts",
                 "loads alone", "loads together", "same"):  # fmt: skip
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        head = [row["name"], f"{100 * row['budget']:g} %"]
        if "error" in row:
            table.add_row(*head, row["error"][:60], *[""] * 7)
            continue
        rates = [f"{row[name]['tokens_per_s']:.2f}" for name in ("alone", "one", "together")]
        loads = [
            f"{row[name]['stats']['loads'] / row[name]['stats']['tokens']:.2f}"
            for name in ("alone", "together")
        ]
        table.add_row(*head, *rates, f"{row['ratio']:.2f}", f"{row['decode_ratio']:.2f}", *loads,
                      "yes" if row["same_alone"] else "no")  # fmt: skip
    return [table]


def _policies(report: OffloadReport) -> str:
    found = [
        f"{100 * row['budget']:g} %: {row['policy']} ({100 * row['share_of_limit']:.0f} % of "
        "Belady's hits)"
        for row in report.policies
    ]
    return f"Best policy for this trace, simulated: {', '.join(found)}. " if found else ""


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    bits = f"{row['expert_bits']:.2f}" if row.get("expert_bits") else ""
    head = [row["name"], bits, "" if row["budget"] is None else f"{100 * row['budget']:g} %",
            " ".join(filter(None, (row["policy"], row["predictor"])))]  # fmt: skip
    with_files = row.get("memory_peak_bytes")
    last = f"{with_files / 1e9:.2f}" if with_files else ""
    if "error" in row:
        return [*head, row["error"][:60], *[""] * 8, last]
    stats = row.get("stats")
    hits, moved, model, over = "", "", "", ""
    if stats:
        hits = f"{100 * stats['hit_ratio']:.1f} %"
        moved = f"{stats['bytes_moved'] / max(1, stats['tokens']) / 1e6:.1f}"
        model, over = f"{1e3 * modelled_s(row):.1f}", f"{over_model(row):.2f}"
    twin = _raw_twin(row, rows)
    ratio = f"{twin['tpot_p50_s'] / row['tpot_p50_s']:.2f}" if twin and twin is not row else ""
    return [
        *head,
        f"{1e3 * row['tpot_p50_s']:.1f}",
        f"{1e3 * row['tpot_p99_s']:.1f}",
        f"{1e3 * row['ttft_s']:.0f}",
        hits, moved, ratio, model, over,
        f"{row['rss_peak_bytes'] / 1e9:.2f}",
        last,
    ]  # fmt: skip


def _raw_twin(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run that differs in the experts' source alone; raw ones never wait on the device, and
    those in RAM are next."""
    name = (
        row["name"]
        .replace("compressed, device", "raw, ram")
        .replace("compressed", "raw")
        .split(", slots ")[0]
        .split(", linear layers ")[0]
    )
    same = ("budget", "policy", "predictor")
    return next(
        (r for r in rows if r["name"] == name and "error" not in r
         and all(r[key] == row[key] for key in same)), None,
    )  # fmt: skip
