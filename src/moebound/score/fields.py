"""How each figure of a Score is called and spelled. A new metric is a field there and one here.

Tables, pages and the command line show what is in TABLE, in this order: KL of the solutions' tokens
never without that of all tokens, which is what a plan for the solutions pays with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moebound.score.record import Score
from moebound.score.statistics import Interval

Digits = tuple[str, str]
"""Formats of a figure and of its standard error."""


@dataclass(frozen=True)
class Field:
    """name: of the figure in a Score. title: above a column. about: what it is, for a caption.
    stderr: the name of its standard error. percent: a share, to be shown as such."""

    name: str
    title: str
    about: str
    digits: Digits = (".3g", ".2g")
    unit: str = ""
    stderr: str = ""
    percent: bool = False

    def value(self, score: Score) -> Any:
        return getattr(score, self.name)

    def known(self, score: Score) -> bool:
        value = self.value(score)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    def number(self, value: float, digits: Digits | None = None) -> str:
        """A figure alone."""
        form = (digits or self.digits)[0]
        return f"{100 * value:{form}} %" if self.percent else f"{value:{form}}"

    def text(self, score: Score, digits: Digits | None = None) -> str:
        """The figure with what is known of its error; nothing where it was not measured."""
        if not self.known(score):
            return ""
        value = self.value(score)
        if isinstance(value, Interval):
            down = score.tally is not None and score.tally.down
            low, at, high = (100 * share for share in (value.low, value.value, value.high))
            return "/" if down else f"{at:.1f} ({low:.1f}-{high:.1f})"
        text = self.number(value, digits)
        if self.stderr:
            text += f" ± {getattr(score, self.stderr):{(digits or self.digits)[1]}}"
        return text


KL = (
    Field(
        "answer_kl_nats", "KL, answers", "of the solutions' tokens, nats, ± its standard error",
        unit="nats a token", stderr="answer_kl_stderr",
    ),
    Field(
        "kl_nats", "KL, all text", "of all tokens, prompts included",
        unit="nats a token", stderr="kl_stderr",
    ),
)  # fmt: skip
"""What stands wherever a KL does."""
READ = (
    *KL,
    Field(
        "answer_top1_agreement", "same top token",
        "share of the solutions' tokens where both hold the same for the most likely",
        (".2f", ""), percent=True,
    ),
)  # fmt: skip
"""Of the predictions."""
TAILS = (
    Field(
        "kl_p99_nats", "99 %, all text", "the KL that one token in a hundred exceeds",
        stderr="kl_p99_stderr",
    ),
    Field(
        "kl_p999_nats", "99.9 %, all text", "one in a thousand", stderr="kl_p999_stderr",
    ),
)  # fmt: skip
"""Of KL by token, where sizes are compared."""
TABLE = (
    *READ,
    Field("ica", "ICA", "right in the format asked, percent, with 95 % intervals"),
    Field("pia", "PIA", "right in any format"),
    Field("p", "p", "exact McNemar of PIA to the original, not corrected for the number of rows",
          (".2g", "")),
)  # fmt: skip


def kl_lines(score: Score, digits: Digits | None = None) -> list[tuple[Field, str]]:
    """KL as far as it was measured: files of the first version have no KL of all tokens."""
    return [(field, field.text(score, digits)) for field in KL if field.known(score)]
