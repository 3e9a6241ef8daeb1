"""How each figure of a Score is called and spelled. A new metric is a field there and one here.

Tables, pages and the command line show what is in TABLE, in this order: KL of the solutions' tokens
never without that of all tokens, which is what a plan for the solutions pays with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moebound.score.record import Score
from moebound.score.statistics import Interval, mcnemar

Digits = tuple[str, str]
"""Formats of a figure and of its standard error."""


@dataclass(frozen=True)
class Field:
    """name: of the figure in a Score. title: above a column. about: what it is, for a caption.
    digits: of the figure, and of its standard error. percent: a share, shown as such. stderr: the
    name of its standard error. read: of the predictions, so a mean over repetitions means
    something."""

    name: str
    title: str
    about: str
    digits: Digits
    unit: str = ""
    stderr: str = ""
    percent: bool = False
    read: bool = True
    of: Callable[[Score], Any] | None = None

    def value(self, score: Score) -> Any:
        return self.of(score) if self.of is not None else getattr(score, self.name)

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
        if isinstance(value, str):
            return value
        text = self.number(value, digits)
        if self.stderr:
            text += f" ± {getattr(score, self.stderr):{(digits or self.digits)[1]}}"
        return text


def _share(name: str) -> Callable[[Score], str | None]:
    def text(score: Score) -> str | None:
        if score.tally is None:
            return None
        return "/" if score.tally.down else share(getattr(score.tally, f"{name}_share"))

    return text


def share(found: Interval) -> str:
    """ "98.4 (97.0-99.1)", in percent."""
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def _p(score: Score) -> float | None:
    if score.lost is None or score.gained is None:
        return None
    return mcnemar(score.lost, score.gained)


_KL = ("nats a token", (".3g", ".2g"))

FIELDS = {
    field.name: field
    for field in (
        Field("answer_kl_nats", "KL, answers", "of the solutions' tokens, nats, ± its standard "
              "error", _KL[1], _KL[0], "answer_kl_stderr"),
        Field("kl_nats", "KL, all text", "of all tokens, prompts included", _KL[1], _KL[0],
              "kl_stderr"),
        Field("answer_top1_agreement", "same top token", "share of the solutions' tokens where "
              "both hold the same for the most likely", (".2f", ""), percent=True),
        Field("ica", "ICA", "right in the format asked, with 95 % intervals", ("", ""),
              read=False, of=_share("ica")),
        Field("pia", "PIA", "right in any format", ("", ""), read=False, of=_share("pia")),
        Field("p", "p", "exact McNemar of PIA to the original, not corrected for the number of "
              "rows", (".2g", ""), read=False, of=_p),
    )
}  # fmt: skip
TABLE = tuple(FIELDS.values())
READ = tuple(field for field in TABLE if field.read)
"""Those of the predictions."""


KL = (FIELDS["answer_kl_nats"], FIELDS["kl_nats"])
"""What stands wherever a KL does: the solutions' tokens, and all."""


def kl_lines(score: Score, digits: Digits | None = None) -> list[tuple[Field, str]]:
    """KL as far as it was measured: files of the first version have no KL of all tokens."""
    return [(field, field.text(score, digits)) for field in KL if field.known(score)]
