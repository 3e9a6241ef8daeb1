"""The comparison of methods as one HTML page: plots, verdicts, residuals, every row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any

from moebound.bench.methods.claims import RFID_ORDER, Found, Judged, Verdict, judge
from moebound.bench.methods.place import WITHIN
from moebound.bench.methods.planned import FISHER
from moebound.bench.methods.plots import KINDS, bits_against_kl, kind_of
from moebound.bench.methods.residuals import BaseRow
from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.bench.methods.sizing import CODED_BITS
from moebound.page import document
from moebound.page.parts import code, facts, figure, machine, plain_table, section
from moebound.score import TABLE
from moebound.score.statistics import Interval

_BADGES: dict[Verdict, str] = {
    "holds": "supports",
    "does not hold": "contradicts",
    "depends on the size": "",
    "cannot be told": "",
    "not measured": "",
}


def render(report: MethodsReport) -> str:
    """The whole page."""
    judged = judge(report)
    sections = [
        _opening(report),
        _plots(report),
        _verdicts(judged),
        _removed(report, judged),
        _residuals(report.bases),
        _sizes(report),
        _missed(report),
        _how(report),
        section("machine", "Machine and versions", facts(machine(report.environment))),
    ]
    return document("moebound: methods at equal bytes", sections)


def _reached(report: MethodsReport) -> list[MethodRow]:
    return [row for row in report.rows if row.made is not None and row.score is not None]


def _opening(report: MethodsReport) -> str:
    reached = _reached(report)
    bounded = sum(row.made is not None and row.made.guarantee != "none" for row in reached)
    broken = [row for row in report.rows if row.violated]
    verdict = (
        f'<p class="verdict">{len(reached)} stores were written, verified and loaded. '
        f"{bounded} promise something of every weight, and every one of these promises holds.</p>"
        if not broken
        else f'<p class="verdict bad">{len(broken)} stores break their promise: '
        f"{escape('; '.join(row.reason or '' for row in broken))}</p>"
    )
    return (
        "<header><h1>Every method at the same bytes</h1>\n"
        '<p class="lead">Ways to make the experts of a Mixture-of-Experts model smaller, each at '
        "the same real size: bits a weight of the routed experts, with everything counted that is "
        f"stored for them. The model is {code(report.source)}, the text {report.n_problems} "
        f"problems of {code(report.task)}; what is no routed expert's is the original's.</p>\n"
        f"{verdict}\n{_short(report)}</header>"
    )


def _short(report: MethodsReport) -> str:
    """The nearest to the original at each size."""
    items = []
    for bits, rows in groupby(_by_size(report), key=lambda row: _size(row)):
        found = list(rows)
        best = found[0].score
        assert best is not None
        items.append(
            f"<li>{escape(bits)}: {code(found[0].method)} is nearest to the original, "
            f"{best.kl_nats:.3g} nats a token; then {', '.join(_then(found[1:4]))}.</li>"
        )
    return f'<ul class="short">{"".join(items)}</ul>'


def _then(rows: Sequence[MethodRow]) -> list[str]:
    return [f"{code(row.method)} {row.score.kl_nats:.3g}" for row in rows if row.score is not None]


def _size(row: MethodRow) -> str:
    of = "" if row.removed is None else f", {row.removed:g} % removed"
    return f"{row.bits:g} bits{of}"


def _by_size(report: MethodsReport) -> list[MethodRow]:
    """Rows that were reached: the largest size first, shares removed behind all, and of each the
    least KL first."""
    return sorted(_by_kl(_reached(report)), key=lambda row: (row.removed is not None, -row.bits))


def _plots(report: MethodsReport) -> str:
    drawn = []
    for kind, title in KINDS.items():
        rows = [row for row in _reached(report) if kind_of(row.method) == kind]
        if rows:
            svg = bits_against_kl(kind, rows, _reached(report))
            drawn.append(figure(svg, f"<b>{escape(title)}</b>", wide=True))
    note = (
        "<p>How far the model's predictions move, by bits a weight. Left over all tokens, prompts "
        "included; right over the solutions'. Bars are two standard errors. The thin line is "
        "<code>bound</code>, the same in every figure.</p>"
    )
    return section("plots", "Bits against KL", note, *drawn) if drawn else ""


def _verdicts(judged: Sequence[Judged]) -> str:
    shown = [one for one in judged if one.verdict != "not measured"]
    if not shown:
        return ""
    counts = Counter(one.verdict for one in shown)
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    rows = "\n".join(map(_verdict, shown))
    missing = len(judged) - len(shown)
    more = (
        f'<p class="note">{missing} more cannot be looked at: no size that both methods come to '
        "was measured.</p>"
        if missing
        else ""
    )
    return section(
        "claims",
        "What papers claim, on this model",
        "<p>Does one method lose less than another at the same bytes? At each size that both come "
        "to: the KL over all tokens that the other has more, in 10<sup>-3</sup> nats a token, with "
        "its 95 % interval, on the same problems in pairs. In bold what is beyond chance (p &lt; "
        "0.05, corrected for all comparisons on this page). Papers report other models, other "
        f"texts, and sizes in parameters. Of {len(shown)} claims: {escape(said)}.</p>",
        '<div class="scroll"><table class="text"><thead><tr><th>paper</th><th>claim</th>'
        "<th>beside</th><th>here</th><th>at bits a weight: what the other loses more</th></tr>"
        f"</thead>\n<tbody>{rows}</tbody></table></div>",
        more,
    )


def _verdict(one: Judged) -> str:
    claim, verdict = one.claim, one.verdict
    found = "; ".join(map(_found, one.found))
    return (
        f"<tr><td>{escape(claim.paper)}</td><td>{code(claim.better)}: {escape(claim.says)}</td>"
        f"<td>{code(claim.worse)}</td>"
        f'<td><span class="badge {_BADGES[verdict]}">{verdict}</span></td><td>{found}</td></tr>'
    )


def _found(one: Found) -> str:
    at = f"{one.bits:g}" if one.removed is None else f"{one.removed:g} % removed"
    text = f"{at}: {_thousandths(one.difference)}"
    return f"<b>{text}</b>" if one.holds is not None else text


def _thousandths(found: Interval) -> str:
    """A difference of KL with its interval, in 10^-3 nats."""
    value, low, high = (
        f"{1e3 * x:.{max(0, 2 - int(math.log10(max(abs(1e3 * x), 1))))}f}"
        if math.isfinite(x)
        else "∞"
        if x > 0
        else "-∞"
        for x in (found.value, found.low, found.high)
    )
    return f"{value} ({low} to {high})"


def _removed(report: MethodsReport, judged: Sequence[Judged]) -> str:
    """The comparison of the RFID-MoE paper, as it states sizes."""
    shares = list(dict.fromkeys(row.removed for row in report.rows if row.removed is not None))
    if not shares:
        return ""
    steps = list(pairwise(RFID_ORDER))
    by_pair = {(one.claim.better, one.claim.worse): one for one in judged}
    said = []
    for share in shares:
        rows = [row for row in _reached(report) if row.removed == share]
        order = [row.method for row in _by_kl(rows) if row.method in RFID_ORDER]
        found = []
        for better, worse in steps:
            at = [one for one in by_pair[better, worse].found if one.removed == share]
            for one in at:
                word = {True: "holds", False: "does not hold", None: "cannot be told"}[one.holds]
                found.append(
                    f"{code(better)} before {code(worse)} {word}: {_thousandths(one.difference)}"
                )
        said.append(
            f"<li>{share:g} % removed: found {', '.join(map(code, order)) or 'nothing'}. "
            f"{'; '.join(found)}.</li>"
        )
    return section(
        "removed",
        "RFID-MoE's comparison, at shares of the parameters removed",
        f"<p>The paper's order is {', '.join(map(code, RFID_ORDER))}, the best first. Here a share "
        "removed is one of the experts' bytes, everything counted, with 16 bits a number. What the "
        "second of each two loses more, in 10<sup>-3</sup> nats a token:</p>",
        f"<ul>{''.join(said)}</ul>",
    )


def _by_kl(rows: Sequence[MethodRow]) -> list[MethodRow]:
    return sorted(rows, key=lambda row: row.score.kl_nats if row.score else math.inf)


def _residuals(bases: Sequence[BaseRow]) -> str:
    if not bases:
        return ""
    measured = [row for row in bases if row.reason is None]
    rates = measured[0].rates if measured else ()
    names = ["base", "its bits", "explains", "should save", "should pay", "pays at rate"]
    names += [f"{rate:g}: saves" for rate in rates]
    rows = [
        [
            row.base,
            f"{row.base_bits:.3f}",
            f"{100 * row.explained:.1f} %",
            f"{row.predicted_saving:.3f}",
            "yes" if row.predicted_to_pay else "no",
            ", ".join(f"{rate:g}" for rate in row.beats_at) or "never",
            *(f"{saved:.3f}" for saved in row.saved),
        ]
        for row in measured
    ]
    refused = "".join(
        f"<li>{code(row.base)}: {escape(row.reason)}</li>" for row in bases if row.reason
    )
    return section(
        "residuals",
        "Does a base pay, if what it leaves is coded under a bound?",
        "<p>Any approximation becomes a promise on every weight if what it leaves is coded by "
        "<code>bound</code>. A base that explains a share ρ of the weights' energy should save "
        "½ log2(1/(1-ρ)) bits a weight of the rest, and pays where that is more than it takes. "
        "Beside it what was saved, at each rate of the bound, frames and all, next to plain "
        "<code>bound</code> at the same promise. It pays at the rates at which this is more than "
        "its bits.</p>",
        plain_table(names, rows),
        f"<ul>{refused}</ul>" if refused else "",
    )


def _sizes(report: MethodsReport) -> str:
    tables = []
    for size, rows in groupby(_by_size(report), key=_size):
        table = plain_table(
            ["method", "made as", "bits", "promise", "largest error", *(f.title for f in TABLE),
             "s", "CPU s", "MB"],
            [_cells(row) for row in rows],
        )  # fmt: skip
        tables.append(f"<details><summary>{escape(size)}</summary>{table}</details>")
    about = " ".join(f"{field.title}: {escape(field.about)}." for field in TABLE)
    return section(
        "rows",
        "Every row",
        "<p>By size, the nearest to the original first. s, CPU s, MB: to make it, the most that "
        "the process that made it had in memory, Python and its libraries among it. "
        f"{about}</p>",
        *tables,
    )


def _cells(row: MethodRow) -> list[str]:
    made, score = row.made, row.score
    assert made is not None
    assert score is not None
    setting = made.setting + ("" if made.rate is None else f" at rate {made.rate:.3g}")
    return [
        row.method, setting, f"{made.bits_per_weight:.3f}", made.guarantee,
        f"{made.max_abs_error:.2g}", *(field.text(score) for field in TABLE),
        f"{made.seconds:.1f}", f"{made.cpu_seconds:.1f}", f"{made.peak_bytes / 1e6:.0f}",
    ]  # fmt: skip


def _missed(report: MethodsReport) -> str:
    missed = [row for row in report.rows if row.made is None or row.score is None]
    if not missed:
        return ""
    rows = [
        [
            row.method,
            _size(row),
            "" if row.nearest is None else f"{row.nearest:.4g}",
            row.reason or "",
        ]
        for row in missed
    ]
    return section(
        "missed",
        "What was not reached",
        f"<details><summary>{len(missed)} of {len(report.rows)} rows</summary>"
        + plain_table(["method", "asked", "nearest bits", "why"], rows)
        + "</details>",
    )


def _text(of: Mapping[str, Any]) -> str:
    return f"{of['n_sequences']} sequences, {of['n_tokens']} tokens of {of['text']}, other problems"


def _how(report: MethodsReport) -> str:
    least, aim, most = CODED_BITS
    of, fisher = report.calibration, report.fisher
    text = (
        f"Statistics: {_text(of)}." if of else "No statistics: methods that need them have no rows."
    )
    if fisher:
        text += f" Those of {FISHER}, weighted by what the loss feels: {_text(fisher)}."
    return section(
        "how",
        "How it was measured",
        f"<p>Sizes are met within {100 * WITHIN:g} %. A rate is searched for what keeps a bound; "
        "ranks and shares follow from the size; of integers and groups the pair with the least "
        "error on a sample of experts is taken; whole experts are kept as many as the bytes allow. "
        f"Behind a + the experts that are kept are coded, in {least:g} to {most:g} bits a weight, "
        f"{aim:g} if it can be. Papers count 16 bits a number: f8, q4 and base5 are the same "
        f"methods with fewer. {escape(text)}</p>",
    )
