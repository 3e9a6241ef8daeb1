"""Verdicts on the page: a card for each, with why, and the evidence and the rule to unfold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moebound.paper.report.cells import source_name
from moebound.paper.report.claims import WORDS
from moebound.paper.report.evidence import Evidence, Finding
from moebound.paper.report.report import Report
from moebound.paper.report.verdicts import Verdict

MOST_EVIDENCE = 12
"""Pieces shown for one finding, the decisive first; the JSON has all."""


def conclusions(report: Report) -> str:
    codec = report.suite.codec
    with_codec = (
        f"; the dashed one is the same with the {escape(source_name(codec))}" if codec else ""
    )
    found = [verdict for verdict in report.verdicts if verdict.claim.kind == "conclusion"]
    return (
        "<section><h2>The paper's conclusions, on this model</h2>\n"
        "<p>The first badge is the verdict with the paper's own simulated errors "
        f"({escape(source_name(report.suite.simulation))}){with_codec}. "
        "Unfold a card for the numbers and the rule.</p>\n"
        f"{cards(found)}</section>"
    )


def questions(report: Report) -> str:
    found = [verdict for verdict in report.verdicts if verdict.claim.kind == "question"]
    return (
        "<section><h2>The paper's open questions, for this model</h2>\n"
        + cards(found)
        + "</section>"
    )


def cards(verdicts: Sequence[Verdict]) -> str:
    """A card for each: conclusions are supported or not, questions answered yes or no."""
    each = [_card(verdict, WORDS[verdict.claim.kind]) for verdict in verdicts]
    return f'<div class="cards">\n{"".join(each)}</div>'


def _card(verdict: Verdict, words: dict[str, str]) -> str:
    claim, found, real = verdict.claim, verdict.finding, verdict.real
    badges = f'<span class="badge {found.outcome}">{words[found.outcome]}</span>'
    if real is not None:
        badges += (
            f'<span class="badge second {real.outcome}">real codec: {words[real.outcome]}</span>'
        )
    unfold = _evidence("With simulated errors" if real else "", found)
    if real is not None:
        unfold += f'<p class="why">With the real codec: {escape(real.why)}</p>'
        unfold += _evidence("", real)
    return (
        f'<article class="card" id="{escape(claim.id)}"><div class="badges">{badges}</div>\n'
        f'<p class="claim">{escape(claim.text)}</p>\n<p class="where">{escape(claim.where)}</p>\n'
        f'<p class="why">{escape(found.why)}</p>\n'
        f"<details><summary>numbers and rule</summary>{unfold}\n"
        f"<p><b>Rule.</b> {escape(claim.rule)}</p></details></article>\n"
    )


def _evidence(title: str, finding: Finding) -> str:
    pieces = sorted(finding.evidence, key=lambda piece: piece.favours == "neither")
    if not pieces:
        return ""
    shown, rest = pieces[:MOST_EVIDENCE], len(pieces) - MOST_EVIDENCE
    more = f'<p class="note">And {rest} more, in the JSON.</p>' if rest > 0 else ""
    return (f"<p><b>{title}</b></p>" if title else "") + _items(shown) + more


def _items(pieces: Sequence[Evidence]) -> str:
    items = "".join(f'<li class="{p.favours}">{escape(p.text)}</li>' for p in pieces)
    return f"<ul>{items}</ul>"
