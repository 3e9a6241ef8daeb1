"""Second moments to round by: those of an expert, shrunk toward its layer's, and damped.

An expert that saw few tokens has an H of few directions, and rounding by it alone gives up all
others. So its layer speaks for it, as if it had seen P tokens more, of the layer's mean; and
its diagonal is raised by a share d of its mean, the more, the fewer tokens T there were for its N
channels:

    H'_e = H_e + P · Σ H / Σ tokens     (sums over the layer's experts)
    H''_e = H'_e + d · mean(diag H'_e) · I     d = N / (10 T), from 0.1 to 0.3, and P = 4

which is nearly H_e after many tokens, and the layer's where none came. Both numbers are those with
the least error of outputs on text held out, from 59 tokens an expert on; less damping than 0.1
would have less of it still after thousands, and more KL (docs/log.md). Statistics on disk stay what
was seen. Of Fisher statistics d begins at 0.03, which has less KL there, and the weights of rows
are shrunk and damped alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Self, cast, get_args

import numpy as np

from moebound.files.documents import number
from moebound.files.formats.statistics import SecondMoments, Side, Statistics
from moebound.types import Array, ExpertKey


@dataclass(frozen=True)
class Rule:
    """The numbers above, as a store says them: d goes from least_damping to most_damping."""

    pseudo_tokens: float = 4.0
    tokens_a_channel: float = 10.0
    least_damping: float = 0.1
    most_damping: float = 0.3

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises FormatError for numbers that are none, and as reading JSON of another form."""
        return cls(**{name: number(value, name) for name, value in data.items()})


RULE = Rule()
FISHER_RULE = Rule(least_damping=0.03)
ROW_DAMPING = 0.02
"""Of the weights of rows, in their mean."""


def rule_of(statistics: Statistics) -> Rule:
    return FISHER_RULE if statistics.of.fisher else RULE


ROW_SUMS = ("gate_rows", "up_rows", "down_rows")
_LAYERS = 2
"""Layers whose means are kept: experts are asked for in the order of the model."""


class Shrinkage:
    """Shrunk moments of one folder of statistics. From any thread."""

    def __init__(self, statistics: Statistics, rule: Rule | None = None) -> None:
        self.statistics, self.rule = statistics, rule or rule_of(statistics)
        self._means: OrderedDict[tuple[int, str], Array] = OrderedDict()
        n_names = len(get_args(Side)) + len(ROW_SUMS) * statistics.of.fisher
        self._kept = _LAYERS * n_names
        self._lock = Lock()

    def moments(self, key: ExpertKey, side: SecondMoments) -> Array:
        """H'' of one expert, float64, as `Statistics.moments`. Raises as that."""
        found = self.statistics.packed(key, side)
        if self.rule.pseudo_tokens:
            found += self.rule.pseudo_tokens * self._mean(key.layer, side)
        whole = self.statistics.whole(found, side)
        diagonal = whole if whole.ndim == 1 else np.einsum("ii->i", whole)  # a view
        tokens = max(self.statistics.tokens_of(key), 1)
        share = len(whole) / max(self.rule.tokens_a_channel * tokens, 1)
        share = (
            min(share, self.rule.most_damping) - self.rule.least_damping
        )  # of all, `Geometry.of`
        if share > 0:
            diagonal += share * diagonal.mean()
        return whole

    def row_weights(self, key: ExpertKey, role: str) -> Array:
        """[rows] float64, of the rows of a matrix: Σ δ² of Fisher statistics, shrunk and damped, of
        mean 1. role: gate, up or down. Raises MoeboundError for statistics without."""
        found = self.statistics.array(key, f"{role}_rows")
        if self.rule.pseudo_tokens:
            found = found + self.rule.pseudo_tokens * self._mean(key.layer, f"{role}_rows")
        mean = float(found.mean())
        whole = found / mean if mean > 0 else np.ones_like(found)
        return (whole + ROW_DAMPING) / (1 + ROW_DAMPING)

    def _mean(self, layer: int, name: str) -> Array:
        """An array of the layer a token: H packed, or what rows sum up; zeros where the layer saw
        none."""
        with self._lock:
            found = self._means.pop((layer, name), None)
            if found is None:
                found = self._read(layer, name)
            self._means[layer, name] = found
            while len(self._means) > self._kept:
                self._means.popitem(last=False)
            return found

    def _read(self, layer: int, name: str) -> Array:
        def read(key: ExpertKey) -> Array:
            if name in ROW_SUMS:
                return self.statistics.array(key, name)
            return self.statistics.packed(key, cast(SecondMoments, name))

        keys = [key for key in self.statistics.keys if key.layer == layer]
        total, tokens = read(keys[0]), self.statistics.tokens_of(keys[0])
        for key in keys[1:]:  # one at a time: those of a layer may not fit
            total += read(key)
            tokens += self.statistics.tokens_of(key)
        return total / max(tokens, 1)


@lru_cache(maxsize=2)
def shrunk(statistics: Statistics) -> Shrinkage:
    """By the rule; one for each folder, so that a layer's mean is read once."""
    return Shrinkage(statistics)


def wanted(
    statistics: Statistics, names: Collection[str], keys: Sequence[ExpertKey]
) -> dict[str, Mapping[ExpertKey, Array]]:
    """What a method asks for of these experts, by the names it asks for. Where tokens are weighted
    by what the loss feels, the weights of rows stand beside the moments."""
    rows = ROW_SUMS if statistics.of.fisher and set(names) & set(get_args(SecondMoments)) else ()
    return {name: _Read(statistics, name, keys) for name in sorted({*names, *rows})}


@dataclass(frozen=True, eq=False)
class _Read(Mapping[ExpertKey, Array]):
    """One kind of statistics, each expert's read when it is asked for: second moments of all
    experts of a layer may be larger than the layer."""

    statistics: Statistics
    name: str
    keys_: Sequence[ExpertKey]

    def __getitem__(self, key: ExpertKey) -> Array:
        if self.name in get_args(SecondMoments):
            return shrunk(self.statistics).moments(key, cast(SecondMoments, self.name))
        if self.name in ROW_SUMS:
            return shrunk(self.statistics).row_weights(key, self.name.removesuffix("_rows"))
        return self.statistics.array(key, self.name)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)
