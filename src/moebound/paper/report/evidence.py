"""From numbers to an outcome: pieces of evidence, and three ways to weigh them.

  every    the claim is about all cases: one against contradicts it, all for support it
  some     the claim is that a case exists: one for supports it, all against contradict it
  balance  the claim compares: what is significant decides, if it all points one way

Whatever is left, mixed evidence included, leaves the claim open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moebound.paper.report.compare import Difference

Favours = Literal["for", "against", "neither"]
Outcome = Literal["supports", "contradicts", "open"]


@dataclass(frozen=True)
class Evidence:
    """One observation, in words and numbers."""

    text: str
    favours: Favours

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Finding:
    """An outcome and why. measure: what decided, "accuracy" or "KL" or other words."""

    outcome: Outcome
    why: str
    evidence: tuple[Evidence, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "why": self.why,
            "evidence": [piece.to_json() for piece in self.evidence],
        }


def missing(what: str) -> Finding:
    """Nothing to judge by."""
    return Finding("open", f"Not measured: {what}.")


def every(evidence: Sequence[Evidence]) -> Outcome:
    favours = {piece.favours for piece in evidence}
    if "against" in favours:
        return "contradicts"
    return "supports" if favours == {"for"} else "open"


def some(evidence: Sequence[Evidence]) -> Outcome:
    favours = {piece.favours for piece in evidence}
    if "for" in favours:
        return "supports"
    return "contradicts" if favours == {"against"} else "open"


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """A claim of several parts: it stands if all do, and falls if one does."""
    found = set(outcomes)
    if "contradicts" in found:
        return "contradicts"
    return "supports" if found == {"supports"} else "open"


def balance(evidence: Sequence[Evidence]) -> Outcome:
    favours = {piece.favours for piece in evidence} - {"neither"}
    if favours == {"for"}:
        return "supports"
    return "contradicts" if favours == {"against"} else "open"


DEFAULT_WORDS = ("as the paper says", "the other way")


def tally(
    evidence: Sequence[Evidence], what: str = "comparison", words: tuple[str, str] = DEFAULT_WORDS
) -> str:
    """ "6 comparisons: 3 as the paper says, 1 the other way, 2 undecided"."""
    found = [sum(piece.favours == name for piece in evidence) for name in ("for", "against")]
    parts = [f"{count} {word}" for count, word in zip(found, words, strict=True) if count]
    undecided = len(evidence) - sum(found)
    parts += [f"{undecided} undecided"] if undecided else []
    return f"{plural(len(evidence), what)}: {', '.join(parts)}"


def plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def points(difference: Difference) -> str:
    """A difference of accuracies: "-4.2 points [-6.1, -2.3], p = 0.003"."""
    d = difference
    return (
        f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], "
        f"{p_value(d.adjusted)}"
    ).replace("-", "−")


def factor(difference: Difference) -> str:
    """A ratio of KL: "3.1 times [2.0, 4.8], p = 0.001"."""
    d = difference
    low, value, high = (_times(x) for x in (d.low, d.value, d.high))
    return f"{value} times [{low}, {high}], {p_value(d.adjusted)}"


def _times(log: float) -> str:
    return f"{math.exp(max(-50.0, min(50.0, log))):.3g}"


def p_value(p: float) -> str:
    if math.isnan(p):
        return "p not known"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
