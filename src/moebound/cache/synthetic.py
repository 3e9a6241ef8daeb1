"""Routing traces drawn from a distribution, for use without a recording.

In each layer, experts are popular by Zipf's law in an order of the layer's own: the r-th has weight
r^-exponent. Each sequence has a topic: it multiplies all weights by exp(topic · N(0, 1)), drawn
once for the sequence. A token takes the top k of log weight + Gumbel noise, which is a draw of k
experts without replacement, in proportion to the weights. Temporal locality: from one token to the
next, each expert keeps its noise with probability `locality`, else it gets a new one. So every
token by itself is an exact Zipf draw, and a choice lasts for 1 / (1 - locality) tokens or so.

Gates are the softmax of what was drawn, over the k chosen. Each sequence begins with a prompt that
is computed in one step; the rest is decoded token by token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Self

import numpy as np

from moebound.cache.visits import LayerTrace, Trace
from moebound.errors import CacheError
from moebound.types import Array

NAME = "zipf"
_CHUNK = 512
_MAX_DRAWS = 10**11


@dataclass(frozen=True)
class ZipfTrace:
    """What to draw. Raises CacheError for values that make no trace.

    layers are decoder indices 1 .. layers. tokens: of all sequences together.
    """

    layers: int = 26
    experts: int = 64
    top_k: int = 6
    tokens: int = 4096
    sequences: int = 8
    prompt: int = 64
    exponent: float = 1.0
    topic: float = 1.0
    locality: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"layers": 1, "experts": 1, "top_k": 1, "tokens": 1, "sequences": 1, "prompt": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise CacheError(f"{NAME}: {name} {getattr(self, name)}: expected {value} or more")
        if not self.top_k <= self.experts < 1 << 15:
            raise CacheError(
                f"{NAME}: {self.experts} experts, {self.top_k} of them chosen: expected top_k or "
                "more of them, and fewer than 32768"
            )
        if self.sequences > self.tokens:
            raise CacheError(f"{NAME}: {self.sequences} sequences of {self.tokens} tokens together")
        if not (0 <= self.locality < 1 and 0 <= self.exponent < 100 and 0 <= self.topic < 100):
            raise CacheError(
                f"{NAME}: locality {self.locality}, exponent {self.exponent}, topic {self.topic}: "
                "expected locality from 0 to below 1, and the others from 0 to below 100"
            )
        if self.seed < 0 or self.layers * self.experts * self.tokens > _MAX_DRAWS:
            raise CacheError(f"{NAME}: seed below 0, or more than {_MAX_DRAWS} draws")

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "zipf" or "zipf:tokens=1000,exponent=0.8". Raises CacheError for anything else."""
        name, _, rest = text.partition(":")
        kinds = {name: type(value) for name, value in asdict(cls()).items()}
        if name != NAME:
            raise CacheError(f"{text!r}: expected {NAME} or {NAME}:name=value,...")
        given: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in kinds:
                raise CacheError(f"{text!r}: {key!r} is none of {', '.join(kinds)}")
            try:
                given[key] = kinds[key](value)
            except ValueError:
                raise CacheError(f"{text!r}: {key} {value!r} is no {kinds[key].__name__}") from None
        return cls(**given)  # type: ignore[arg-type]  # each converted to its field's own type

    def draw(self) -> Trace:
        """The trace; the same for the same settings."""
        rng = np.random.default_rng(self.seed)
        L, E, K = self.layers, self.experts, self.top_k
        popular = -self.exponent * np.log(np.arange(1, E + 1))
        popularity = np.stack([popular[rng.permutation(E)] for _ in range(L)])
        sequence = np.arange(self.tokens) * self.sequences // self.tokens
        position = np.arange(self.tokens) - np.searchsorted(sequence, sequence)
        index = np.empty((self.tokens, L, K), np.int16)
        weights = np.empty((self.tokens, L, K), np.float16)
        noise = rng.gumbel(size=(L, E)).astype(np.float32)
        for begin in np.flatnonzero(position == 0).tolist():
            topic = popularity + self.topic * rng.standard_normal((L, E))
            end = int(np.searchsorted(sequence, sequence[begin], side="right"))
            for low in range(begin, end, _CHUNK):
                high = min(low + _CHUNK, end)
                drawn = self._noise(rng, noise, high - low)
                noise = drawn[-1]
                index[low:high], weights[low:high] = _route(drawn + topic.astype(np.float32), K)
        decode = position >= self.prompt
        alone = decode | (position == 0)
        return Trace(
            tuple(
                LayerTrace(place + 1, E, index[:, place], weights[:, place]) for place in range(L)
            ),
            token=np.full(self.tokens, -1, np.int32),
            position=position.astype(np.int32),
            sequence=sequence.astype(np.int32),
            step=(np.cumsum(alone) - 1).astype(np.int32),
            decode=decode,
            model=NAME,
            task=", ".join(f"{field.name} {getattr(self, field.name):g}" for field in fields(self)),
        )

    def _noise(self, rng: np.random.Generator, last: Array, n: int) -> Array:
        """n more tokens of noise, [n, L, E]: each kept from the token before, or new."""
        drawn = np.concatenate([last[None], rng.gumbel(size=(n, *last.shape)).astype(np.float32)])
        new = rng.random((n, *last.shape), dtype=np.float32) >= self.locality
        at = np.zeros((n + 1, *last.shape), np.int64)
        at[1:] = np.where(new, np.arange(1, n + 1)[:, None, None], 0)
        np.maximum.accumulate(at, axis=0, out=at)
        return np.take_along_axis(drawn, at, axis=0)[1:]


def _route(scores: Array, k: int) -> tuple[Array, Array]:
    """The k highest of the last axis, highest first, and their softmax."""
    some = np.argpartition(-scores, k - 1, axis=-1)[..., :k]
    found = np.take_along_axis(scores, some, axis=-1)
    order = np.argsort(-found, axis=-1, kind="stable")
    top = np.take_along_axis(found, order, axis=-1)
    weights = np.exp(top - top[..., :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.take_along_axis(some, order, axis=-1), weights
