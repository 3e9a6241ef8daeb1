"""The figures of one model beside the original, on the same problems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moebound.errors import FormatError
from moebound.score.statistics import Interval, mcnemar, wilson

QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}
"""Of KL by token: as a Score's fields call them."""
Tokens = Literal["all", "answers"]
"""Which tokens a KL is the mean over: all that were read, prompts included, or those of the
solutions and their ends."""

DOWN_SHARE = 0.1
"""With fewer valid outputs than this share, a condition is down."""


@dataclass(frozen=True)
class Tally:
    """Counts of a set of answers. unfinished: cut off at the limit."""

    n: int
    ica: int
    pia: int
    valid: int
    unfinished: int

    @property
    def ica_share(self) -> Interval:
        return wilson(self.ica, self.n)

    @property
    def pia_share(self) -> Interval:
        return wilson(self.pia, self.n)

    @property
    def down(self) -> bool:
        """The paper's "/"."""
        return self.n > 0 and self.valid < DOWN_SHARE * self.n

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "down": self.down,
            "ica_share": self.ica_share.to_json(),
            "pia_share": self.pia_share.to_json(),
        }


@dataclass(frozen=True)
class Score:
    """How far a model is from the original, and what it answers if it was asked.

    kl_nats: KL(original || model), the mean over all tokens read, prompts included. answer_kl_nats:
    over the tokens of the solutions and their ends. Each with its standard error, problems (not
    tokens, which are not independent) being the sample; so have the quantiles of the same KL by
    token: the median, 99 % (p99) and 99.9 % (p999). top1_agreement, answer_top1_agreement:
    share of those tokens where both hold the same one for the most likely. reproduced: problems
    whose solution is, token for token, what greedy decoding gives. n_problems, n_tokens,
    n_answer_tokens: what was read. exact: False where the rare tokens of a large vocabulary were
    compared as one, in some places at least, which makes a KL a lower limit.

    tally: of greedy answers; lost, gained: problems that only the original, only the model solves
    in any format.

    per_problem: of each, mean KL over its solution's tokens, and whether it was reproduced.
    kl_sums: of each, KL summed over all its tokens, and over its solution's; of two models on the
    same text they can be subtracted. where: what changed layer by layer (see
    `paper/study/flow.py`), None if nobody listened. None of these is in the JSON.

    A mean that was not measured is NaN, and not in the JSON, nor is its error. One that is no
    number, since the model says nothing any more, is infinite: null in the JSON. A standard error
    that cannot be known is NaN: null.
    """

    kl_nats: float = math.nan
    kl_stderr: float = math.nan
    answer_kl_nats: float = math.nan
    answer_kl_stderr: float = math.nan
    top1_agreement: float = math.nan
    answer_top1_agreement: float = math.nan
    reproduced: int | None = None
    n_problems: int | None = None
    n_tokens: int | None = None
    n_answer_tokens: int | None = None
    exact: bool = True
    tally: Tally | None = None
    lost: int | None = None
    gained: int | None = None
    per_problem: tuple[tuple[float, bool | None], ...] = ()
    kl_sums: tuple[tuple[float, float], ...] = ()
    where: Mapping[str, Any] | None = None
    kl_median_nats: float = math.nan
    kl_median_stderr: float = math.nan
    kl_p99_nats: float = math.nan
    kl_p99_stderr: float = math.nan
    kl_p999_nats: float = math.nan
    kl_p999_stderr: float = math.nan
    answer_kl_median_nats: float = math.nan
    answer_kl_median_stderr: float = math.nan
    answer_kl_p99_nats: float = math.nan
    answer_kl_p99_stderr: float = math.nan
    answer_kl_p999_nats: float = math.nan
    answer_kl_p999_stderr: float = math.nan

    def __eq__(self, other: object) -> bool:
        """Figures that were not measured are equal: the same NaN, which a dataclass says is not
        since Python 3.13."""
        if not isinstance(other, Score):
            return NotImplemented
        return all(
            mine is its or mine == its
            for mine, its in ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )

    @property
    def ica(self) -> Interval | None:
        return None if self.tally is None else self.tally.ica_share

    @property
    def pia(self) -> Interval | None:
        return None if self.tally is None else self.tally.pia_share

    @property
    def p(self) -> float | None:
        """Of PIA like the original's."""
        unknown = self.lost is None or self.gained is None
        return None if unknown else mcnemar(self.lost or 0, self.gained or 0)

    def kl(self, tokens: Tokens) -> tuple[float, float]:
        """Nats a token, and the standard error."""
        if tokens == "all":
            return self.kl_nats, self.kl_stderr
        return self.answer_kl_nats, self.answer_kl_stderr

    def to_json(self) -> dict[str, Any]:
        """The figures that are known."""
        found: dict[str, Any] = {}
        for name in _STORED:
            value = getattr(self, name)
            if isinstance(value, float):
                if not math.isnan(getattr(self, name.replace("_stderr", "_nats"))):
                    found[name] = finite(value)
            elif value is not None:
                found[name] = asdict(value) if isinstance(value, Tally) else value
        return found

    @classmethod
    def from_json(cls, data: Any) -> Score:
        """Of what `to_json` gave; fields that are not there were not measured. Raises FormatError,
        naming the field."""
        if not isinstance(data, Mapping):
            raise FormatError(f"expected an object, found {str(data)[:40]!r}")
        return cls(**{name: _read(name, data[name]) for name in _STORED if name in data})


def tokens_of(value: Any) -> Tokens:
    """As a file has it. Raises FormatError."""
    for known in get_args(Tokens):
        if value == known:
            found: Tokens = known
            return found
    raise FormatError(f"tokens: expected {' or '.join(get_args(Tokens))}, found {value!r}")


def finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


_UNSTORED = ("per_problem", "kl_sums", "where")
_STORED = [field.name for field in fields(Score) if field.name not in _UNSTORED]


def _read(name: str, value: Any) -> Any:
    if name == "tally":
        counts = value if isinstance(value, Mapping) else {}
        return Tally(**{count: _read(f"tally: {count}", counts.get(count)) for count in _COUNTS})
    if isinstance(getattr(Score, name, None), float):
        if value is None:
            return math.nan if name.endswith("_stderr") else math.inf
        kinds: tuple[type, ...] = (int, float)
    else:
        kinds = (bool,) if name == "exact" else (int,)
    right = isinstance(value, kinds) and isinstance(value, bool) == (name == "exact")
    if not right or not 0 <= value < math.inf:
        raise FormatError(f"{name}: expected {kinds[-1].__name__} of 0 or more, found {value!r}")
    return float(value) if kinds[-1] is float else value


_COUNTS = [field.name for field in fields(Tally)]
