"""A trace as a cache sees it: one visit per forward pass and layer, each expert in it once.

The only file of the cache that knows routing traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moebound.cache.catalog import Catalog
from moebound.cache.trace import LayerTrace, Trace, load_trace
from moebound.errors import CacheError
from moebound.types import Array, ExpertKey

__all__ = [
    "LEADING_SHARE",
    "LayerTrace",
    "Trace",
    "Visits",
    "gather",
    "leading_first",
    "load_trace",
    "one_by_one",
    "shares_above",
    "uniform",
]

LEADING_SHARE = 0.6
"""HOBBIT's T₁ (2411.01433): in decode, an expert matters most unless the experts with larger gates
have more than this share of the token's gate together. In prefill all do."""

_CHUNK = 1 << 13
_MAX_EXPERTS = 1 << 15  # indices are int16

Visit = tuple[int, int, list[int], list[int] | None, int, bool, bool]
"""step, place of the layer, experts, tokens of each (None: one each), how many lead, whether the
step is decode only, whether a sequence begins with this step (at its first visit)."""


@dataclass(frozen=True, eq=False)
class Visits:
    """All visits of a trace, V of them, with A accesses together; experts by catalog number.

    experts, tokens: [A] int32. starts: [V + 1], where each visit's begin. step, place, leading:
    [V] int32. decode, fresh: [V] bool. top_k: the most experts that one token chooses in a layer.
    """

    catalog: Catalog
    experts: Array
    tokens: Array
    starts: Array
    step: Array
    place: Array
    leading: Array
    decode: Array
    fresh: Array
    n_tokens: int
    top_k: int

    @classmethod
    def of_trace(cls, trace: Trace, catalog: Catalog) -> Visits:
        """Raises CacheError if the trace uses an expert that the catalog has not, or none at all,
        and as `uniform`."""
        _check_layers(trace)
        steps, step_of = np.unique(trace.step, return_inverse=True)
        prefill = np.bincount(step_of, weights=~trace.decode, minlength=len(steps)) > 0
        parts = list[tuple[Array, ...]]()
        for entry in trace.layers:
            if not (entry.index >= 0).any():
                continue
            numbers = _numbers(catalog, entry)
            row, expert, tokens, leads = _by_step(
                entry.index, entry.weights, step_of, entry.n_experts, prefill
            )
            number = numbers[expert]
            if (number < 0).any():
                lacking = ExpertKey(entry.layer, int(expert[number < 0][0]))
                raise CacheError(f"{lacking}: chosen in the trace, but not among the experts")
            place = np.full(len(row), catalog.layers.index(entry.layer), np.int64)
            parts.append((row, place, number, tokens, leads))
        if not parts:
            raise CacheError("the trace has no tokens, or no experts are chosen in it")
        row, place, number, tokens, leads = (np.concatenate(p) for p in zip(*parts, strict=True))
        visit = row * len(catalog.layers) + place
        order = np.argsort(visit, kind="stable")
        visit = visit[order]
        first = np.flatnonzero(np.diff(visit, prepend=-1))
        starts = np.append(first, len(visit))
        step = row[order][first].astype(np.int32)
        begins = np.zeros(len(steps), bool)
        begins[step_of[np.unique(trace.sequence, return_index=True)[1]]] = True
        return cls(
            catalog,
            number[order].astype(np.int32),
            tokens[order].astype(np.int32),
            starts,
            step,
            place[order][first].astype(np.int32),
            np.add.reduceat(leads[order].astype(np.int32), first),
            ~prefill[step],
            begins[step] & (np.diff(step, prepend=-1) > 0),
            trace.n_tokens,
            max(entry.index.shape[1] for entry in trace.layers),
        )

    @property
    def n_accesses(self) -> int:
        return len(self.experts)

    @property
    def n_steps(self) -> int:
        return int(self.step[-1]) + 1

    def __len__(self) -> int:
        return len(self.step)

    def walk(self) -> Iterator[Visit]:
        """In order: by step, then by layer. Python objects are made some thousands at a time."""
        for low in range(0, len(self), _CHUNK):
            high = min(low + _CHUNK, len(self))
            begin, end = int(self.starts[low]), int(self.starts[high])
            experts = self.experts[begin:end].tolist()
            counted = self.tokens[begin:end]
            tokens = None if counted.max() == 1 else counted.tolist()
            starts = (self.starts[low : high + 1] - begin).tolist()
            fields = (self.step, self.place, self.leading, self.decode, self.fresh)
            columns = [field[low:high].tolist() for field in fields]
            a = 0
            for b, step, place, leading, decode, fresh in zip(starts[1:], *columns, strict=True):
                yield (step, place, experts[a:b], None if tokens is None else tokens[a:b],
                       leading, decode, fresh)  # fmt: skip
                a = b


def uniform(trace: Trace, n_bytes: int) -> Catalog:
    """A catalog of the trace's own layers, with every expert of n_bytes.

    Raises CacheError for layers that stand in the trace twice, or have an absurd number of experts.
    """
    _check_layers(trace)
    return Catalog.uniform({entry.layer: entry.n_experts for entry in trace.layers}, n_bytes)


def one_by_one(trace: Trace) -> Trace:
    """The same texts, not computed together but one after the other, as a single user has it.

    What a token chooses does not depend on the batch it was in. The tokens of one sequence that
    were computed in one step still are.
    """
    order = np.lexsort((trace.position, trace.step, trace.sequence))
    sequence, step = trace.sequence[order], trace.step[order]
    begins = (np.diff(sequence, prepend=-1) != 0) | (np.diff(step, prepend=-1) != 0)
    return Trace(
        tuple(
            LayerTrace(entry.layer, entry.n_experts, entry.index[order], entry.weights[order])
            for entry in trace.layers
        ),
        token=trace.token[order],
        position=trace.position[order],
        sequence=sequence,
        step=(np.cumsum(begins) - 1).astype(np.int32),
        decode=trace.decode[order],
        model=trace.model,
        task=trace.task,
    )


def gather(index: Array, weights: Array, *, decode: bool) -> tuple[Array, Array, int]:
    """The visit that one forward pass pays to one layer: experts, tokens of each, how many lead.

    index: [T, K], the experts chosen, -1 for none. weights: [T, K]. decode: no prompt among them.
    The leading experts stand first, and otherwise each stands in the order of the layer.
    """
    step_of, n_experts = np.zeros(len(index), np.int64), int(index.max(initial=0)) + 1
    _, expert, tokens, leads = _by_step(index, weights, step_of, n_experts, np.array([not decode]))
    return expert, tokens, int(leads.sum())


def leading_first(experts: list[int], gates: list[float]) -> tuple[list[int], int]:
    """`gather` for one token of a text that is being written, without arrays: its experts, those
    with the largest gates first, and how many of them lead."""
    by_gate = sorted(
        (-abs(gate), expert) for gate, expert in zip(gates, experts, strict=True) if expert >= 0
    )
    total, above, leading = -sum(gate for gate, _ in by_gate), 0.0, 0
    for gate, _ in by_gate:
        leading += above <= LEADING_SHARE * total
        above -= gate
    return [expert for _, expert in by_gate], leading


def _check_layers(trace: Trace) -> None:
    layers = [entry.layer for entry in trace.layers]
    if any(type(layer) is not int or layer < 0 for layer in layers) or len(set(layers)) < len(
        layers
    ):
        raise CacheError(f"trace of layers {layers}: expected decoder indices, each once")
    for entry in trace.layers:
        if type(entry.n_experts) is not int or not 1 <= entry.n_experts <= _MAX_EXPERTS:
            raise CacheError(
                f"trace, layer {entry.layer}: {entry.n_experts} experts, expected 1 to "
                f"{_MAX_EXPERTS}"
            )


def _numbers(catalog: Catalog, entry: LayerTrace) -> Array:
    """Expert of this layer -> catalog number, -1 where it has none."""
    numbers = np.full(entry.n_experts, -1, np.int64)
    for expert in range(entry.n_experts):
        numbers[expert] = catalog.numbers.get(ExpertKey(entry.layer, expert), -1)
    return numbers


def shares_above(gate: Array) -> tuple[Array, Array]:
    """gate: [T, K] float32, 0 or more. Each token's experts by gate, the largest first, and in that
    order the share of the token's gates that the ones before have."""
    by_gate = np.argsort(-gate, axis=1, kind="stable")
    ordered = np.take_along_axis(gate, by_gate, axis=1)
    above = np.cumsum(ordered, axis=1) - ordered
    total = np.maximum(ordered.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return by_gate, above / total


def _by_step(
    index: Array, weights: Array, step_of: Array, n_experts: int, prefill: Array
) -> tuple[Array, Array, Array, Array]:
    """step, expert, tokens that chose it, whether it leads: by step, leading ones first."""
    chosen = index >= 0
    gate = np.where(chosen, np.abs(weights.astype(np.float32)), 0)
    by_gate, share = shares_above(gate)
    leads = np.empty_like(chosen)
    np.put_along_axis(leads, by_gate, share <= LEADING_SHARE, axis=1)
    leads |= prefill[step_of][:, None]
    key = step_of[:, None].astype(np.int64) * n_experts + index
    found, inverse, tokens = np.unique(key[chosen], return_inverse=True, return_counts=True)
    led = np.zeros(len(found), bool)
    led[inverse[leads[chosen]]] = True
    step, expert = np.divmod(found, n_experts)
    order = np.argsort(step * 2 + ~led, kind="stable")
    return step[order], expert[order], tokens[order], led[order]
