"""Tables on the page: a short one to read, and one with every figure to unfold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from moebound.paper.report.cells import CODEC_PREFIX, RANDOMISED, source_name
from moebound.paper.report.evidence import p_value
from moebound.paper.report.paper import SIMULATION, PaperRow
from moebound.paper.report.tables import EXTRA, Accuracy, Line, Measured, Table
from moebound.score import KL, READ, Field

_WIDTH = 2 + len(KL)
FIRST = (SIMULATION, "gaussian-var", "gaussian-power")
N_CODECS = 2
MARKS = {
    "lower": ("▼", "lower than without an error, beyond chance"),
    "higher": ("▲", "higher than without an error, beyond chance"),
    "same": ("=", "no change larger than the margin"),
    "": ("", ""),
}


def table_html(table: Table) -> str:
    """One of the paper's tables: heading, short table, everything in <details>."""
    about = f"{escape(table.name)}" + (f": {escape(table.title)}" if table.title else "")
    heading = f'<h3>{about} <span class="task">· {escape(table.task)}</span></h3>'
    missing = f'<p class="note">{table.missing} conditions are not measured yet.</p>'
    if table.id == EXTRA:
        # Whole layers that were only read are in the heat map.
        table = replace(table, lines=tuple(filter(_answered, table.lines)))
        if not table.lines:
            return ""
    if not table.lines:
        return f"<section>{heading}\n{missing}</section>"
    return (
        f'<section>{heading}\n<div class="scroll">{_short(table)}</div>\n'
        + (missing if table.missing else "")
        + f"<details><summary>every source, interval and difference</summary>\n"
        f'<div class="scroll">{_long(table)}</div></details></section>'
    )


def _answered(line: Line) -> bool:
    return any(cell.n for cell in line.measured.values())


def shown_sources(table: Table) -> list[str]:
    """The columns of the short table: the simulations in question and two codecs at most."""
    codecs = [source for source in table.sources if source.startswith(CODEC_PREFIX)]
    chosen = [source for source in FIRST if source in table.sources] + codecs[:N_CODECS]
    return chosen or list(table.sources)[: len(FIRST) + N_CODECS]


def _short(table: Table) -> str:
    sources = shown_sources(table)
    groups = "".join(
        f'<th class="group edge" colspan="{_WIDTH}">{escape(source_name(source))}</th>'
        for source in sources
    )
    names = '<th scope="col" class="edge">ICA</th><th scope="col">PIA</th>' + "".join(
        f'<th scope="col">{field.title}</th>' for field in KL
    )
    head = (
        f'<thead><tr><th></th><th></th><th class="group edge" colspan="2">paper</th>{groups}</tr>\n'
        '<tr><th scope="col">error in</th><th scope="col">bound</th><th scope="col" class="edge">'
        f'ICA</th><th scope="col">PIA</th>{names * len(sources)}</tr></thead>'
    )
    body = [_baseline(table, _WIDTH * len(sources))]
    rate: float | None = -1.0
    for line in table.lines:
        first = ' class="first"' if line.rate != rate and table.id in ("7", "9") else ""
        cells = [f'<td class="label">{escape(line.label)}</td>', f"<td>{_rate(line)}</td>"]
        cells.append(_paper(line.paper))
        for source in sources:
            # A randomised expert stands in the place of the paper's error.
            found = line.measured.get(source)
            if found is None and source == sources[0]:
                found = line.measured.get(RANDOMISED)
            cells.append(_measured(found))
        body.append(f"<tr{first}>{''.join(cells)}</tr>")
        rate = line.rate
    return f"<table>\n{head}\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>"


def _baseline(table: Table, width: int) -> str:
    if table.baseline is None or not table.baseline.n:
        text = "not measured"
    else:
        ica, pia = table.baseline.ica, table.baseline.pia
        text = f"ICA {_interval(ica)} · PIA {_interval(pia)}, {table.baseline.n} problems"
    return (
        f"<tr><td>no error</td><td></td>{_paper(table.paper_baseline)}"
        f'<td class="edge long" colspan="{width}">{text}</td></tr>'
    )


def _rate(line: Line) -> str:
    if line.rate is None:
        return "random" if RANDOMISED in line.measured else ""
    return f"{100 * line.rate:g} %"


def _paper(row: PaperRow | None) -> str:
    if row is None:
        return '<td class="edge"></td><td></td>'
    if row.note:
        return f'<td class="edge" colspan="2"><small>{escape(row.note)}</small></td>'
    cells = ["/" if row.no_output else "" if v is None else f"{v:.2f}" for v in (row.ica, row.pia)]
    return f'<td class="edge">{cells[0]}</td><td>{cells[1]}</td>'


def _measured(cell: Measured | None) -> str:
    if cell is None:
        return '<td class="edge"></td>' + "<td></td>" * (_WIDTH - 1)
    read = "".join(f"<td><small>{_mean(cell, field)}</small></td>" for field in KL)
    if cell.silent:
        silent = f'title="{100 * cell.valid:.1f} % of the outputs have an answer"'
        return f'<td class="edge" {silent}>/</td><td {silent}>/</td>{read}'
    return f'<td class="edge">{_accuracy(cell.ica)}</td><td>{_accuracy(cell.pia)}</td>{read}'


def _accuracy(found: Accuracy) -> str:
    if math.isnan(found.share):
        return '<small title="only read, for its predictions">·</small>'
    sign, words = MARKS[found.mark]
    mark = f'<span class="mark {found.mark}" title="{words}">{sign}</span>'
    return f"{found.share:.3f}{mark}"


def _interval(found: Accuracy) -> str:
    return f"{found.share:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _mean(cell: Measured, field: Field) -> str:
    found = cell.figures.get(field.name)
    return "" if found is None else number(field, found[0])


def number(field: Field, value: float) -> str:
    """A figure of the predictions, in few digits."""
    if field.percent:
        return field.number(value)
    return "0" if value == 0 else f"{value:.2g}" if value >= 1e-3 else f"{value:.1e}"


_LONG = (
    "error in", "bound", "source", "seeds", "ICA [95 %]", "change, p", "PIA [95 %]", "change, p",
    *(f"{field.title} [seeds]" for field in READ), "valid", "bits/weight",
)  # fmt: skip


def _long(table: Table) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in _LONG)
    body = []
    for line in table.lines:
        for index, (source, cell) in enumerate(_ordered(line, table.sources)):
            cells = [
                escape(line.label) if index == 0 else "", _rate(line) if index == 0 else "",
                escape(source_name(source)), str(cell.seeds),
                *_both(cell.ica), *_both(cell.pia),
                *(_range(cell, field) for field in READ),
                "" if math.isnan(cell.valid) else f"{100 * cell.valid:.1f} %",
                "" if cell.bits_per_weight is None else f"{cell.bits_per_weight:.2f}",
            ]  # fmt: skip
            first = ' class="first"' if index == 0 else ""
            body.append(f"<tr{first}>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
    return (
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table>"
    )


def _ordered(line: Line, sources: Sequence[str]) -> list[tuple[str, Measured]]:
    order = [*sources, RANDOMISED]
    return sorted(line.measured.items(), key=lambda item: order.index(item[0]))


def _both(found: Accuracy) -> tuple[str, str]:
    if math.isnan(found.share):
        return "", ""
    d = found.difference
    if d is None:
        return _interval(found), ""
    change = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}], "
    return _interval(found), escape(change.replace("-", "−") + p_value(d.adjusted))


def _range(cell: Measured, field: Field) -> str:
    found = cell.figures.get(field.name)
    if found is None:
        return ""
    mean, low, high = (number(field, value) for value in found)
    return mean if low == high else f"{mean} [{low}, {high}]"
