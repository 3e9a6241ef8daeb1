"""The suites that come with moebound: `paper` and `quick`.

`paper` has every condition of MoE-Compression (2509.07727, sections 3.2 to 3.6: tables 3 to 9),
with every error source, and what its open questions need: every layer as a whole at several
bounds, deep layers over many magnitudes, all experts together. `quick` looks at the same places
with three sources, mostly by their effect on predictions.

The paper's layers L1 to L26 are its model's MoE layers; depth d below is (L - 1) / 25.
Table 4's first line is Table 3's last: it is measured once, for Table 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from moebound.files.formats.study import EXTRA, Share
from moebound.paper.study.suite import Entry, ModelFacts, Suite, all_sources

_L1, _L13, _L20, _L26 = "@0", "@0.48", "@0.76", "@1"
_GROUPS = (("@0", "@0.36"), ("@0.32", "@0.68"), ("@0.64", "@1"))
_RATES = (0.3, 0.5, 0.8)
_CURVE = (0.1, 0.3, 0.5, 0.8)

_T3 = {0.3: (0.82, 0.96), 0.5: (0.80, 0.96), 0.8: (0.79, 0.95)}
_T4 = {_L13: (0.75, 0.94), _L20: (0.89, 0.96), _L26: (0.96, 0.96)}
_T5 = {_L1: (0.74, 0.90), _L26: (0.90, 0.93)}
_T6 = {_L1: (0.33, 0.71), _L13: (0.38, 0.65), _L20: (0.61, 0.80), _L26: (0.85, 0.90)}
_Values = dict[float, tuple[Share, Share]]
_T7: tuple[_Values, ...] = (
    {0.3: (0.86, 0.94), 0.5: (0.81, 0.91), 0.8: (None, None)},
    {0.3: (0.81, 0.89), 0.5: (0.69, 0.75), 0.8: (None, None)},
    {0.3: (0.91, 0.95), 0.5: (0.92, 0.94), 0.8: (None, None)},
)
_T8 = {_L1: (0.60, 0.65), _L13: (0.56, 0.60), _L20: (0.62, 0.68), _L26: (0.66, 0.70)}
_T9: tuple[_Values, ...] = (
    {0.3: (0.60, 0.63), 0.5: (0.50, 0.58)},
    {0.3: (0.58, 0.62), 0.5: (0.43, 0.50)},
    {0.3: (0.63, 0.65), 0.5: (0.56, 0.60)},
)

_FIRST = ("gaussian-sd", "codec:bound", "gaussian-power", "codec:sz3")
_WIDEST = "gaussian-var"

_ONE, _ALL = "layer {}, most used expert", "layer {}, all experts"


def _tables(facts: ModelFacts) -> list[Entry]:
    """The paper's, in its order. Table 5's six experts are as many as its model chooses a token."""
    top = f"top:{facts.top_k}"
    entries = [
        Entry("3.2.1", "layer @0, expert 0", "expert:@0:0", (0.1, *_RATES)),
        Entry("3", _ONE.format(_L1), f"most-used:{_L1}", _RATES, paper=_T3),
    ]
    for at, found in _T4.items():
        entries.append(Entry("4", _ONE.format(at), f"most-used:{at}", (0.8,), paper={0.8: found}))
    for at, found in _T5.items():
        label = f"layer {at}, {facts.top_k} most used experts"
        entries.append(Entry("5", label, f"{top}:{at}", (0.8,), paper={0.8: found}))
    for at, found in _T6.items():
        entries.append(Entry("6", _ALL.format(at), f"layer:{at}", (0.8,), paper={0.8: found}))
    entries += _groups("7", _RATES, 0, _T7)
    for at, found in _T8.items():
        paper = {0.8: found}
        entries.append(Entry("8", _ONE.format(at), f"most-used:{at}", (0.8,), task=1, paper=paper))
    entries += _groups("9", (0.3, 0.5), 1, _T9)
    return [part for entry in entries for part in _by_source(entry)]


def _by_source(entry: Entry) -> list[Entry]:
    """Randomising has no size: one condition, and the paper does it to expert 0 alone. What the
    variance reading breaks is broken with any seed, and a broken model writes on to the limit."""
    sized = tuple(s for s in _sources() if s not in ("randomise", _WIDEST))
    parts = [replace(entry, sources=sized), replace(entry, sources=(_WIDEST,), n_seeds=1)]
    if entry.table == "3.2.1":
        parts.append(replace(entry, sources=("randomise",)))
    return parts


def _sources() -> tuple[str, ...]:
    """All of them, those that say most first."""
    rest = [s for s in all_sources() if s not in (*_FIRST, _WIDEST)]
    return (*_FIRST, *rest, _WIDEST)


def _groups(
    table: str, rates: tuple[float, ...], task: int,
    paper: Sequence[_Values],
) -> list[Entry]:  # fmt: skip
    return [
        Entry(table, f"layers {first} to {last}, most used expert of each",
              f"group:{first}-{last}", rates, task=task, paper=found)
        for (first, last), found in zip(_GROUPS, paper, strict=True)
    ]  # fmt: skip


def _every_layer(
    facts: ModelFacts, sources: tuple[str, ...], rates: tuple[float, ...]
) -> list[Entry]:
    """Each MoE layer as a whole, by its effect on predictions: where is it sensitive, and what
    `plan --study` divides a budget by."""
    return [
        Entry(EXTRA, _ALL.format(layer), f"layer:{layer}", rates, sources=sources, n_seeds=1,
              answers=False)
        for layer in facts.layers
    ]  # fmt: skip


def _paper(facts: ModelFacts) -> list[Entry]:
    both = ("gaussian-sd", "codec:bound")
    deep = [
        Entry(EXTRA, _ONE.format(_L26), f"most-used:{_L26}", (0.3, 1.6), sources=both),
        Entry(EXTRA, _ALL.format(_L26), f"layer:{_L26}", (0.3, 0.5, 1.2), sources=both),
        Entry(EXTRA, "layers @0.64 to @1, most used expert of each", "group:@0.64-@1", (1.2,),
              sources=both),
    ]  # fmt: skip
    together = Entry(EXTRA, "all experts", "all", _RATES, task=None, n_seeds=1)
    return [
        *_every_layer(facts, ("codec:bound",), _CURVE),
        *_every_layer(facts, ("gaussian-sd", "gaussian-power"), (0.3, 0.8)),
        *_tables(facts),
        *_by_source(together),
        *deep,
    ]


def _quick(facts: ModelFacts) -> list[Entry]:
    """Answers where the paper's conclusions are about answers, with one seed; else the effect on
    predictions, with every seed: KL of one draw cannot be told from the draw's luck."""
    entries = []
    for entry in _tables(facts):
        rates = {"7": (0.5,), "9": (0.5,), "3.2.1": (0.8,)}.get(entry.table, entry.rates)
        for source, rate in product(entry.sources or (), rates):
            answers = (
                (entry.table in ("6", "7") or (entry.table, rate) in (("3.2.1", 0.8), ("3", 0.8)))
                and source in (*_FIRST[:2], "randomise")
            )  # fmt: skip
            entries.append(
                replace(entry, rates=(rate,), sources=(source,), answers=answers, n_answered=1)
            )
    return [*_every_layer(facts, ("codec:bound",), (0.3, 0.8)), *entries]


def builtin(name: str) -> Suite | None:
    """`paper` or `quick`; None for another name."""
    if name == "paper":
        return Suite("paper", _paper, _sources(), n_seeds=3, n_problems=500, n_read=128)
    if name == "quick":
        sources = ("gaussian-sd", "codec:bound", "gaussian-power", "randomise")
        return Suite("quick", _quick, sources, n_seeds=2, n_problems=128, n_read=32)
    return None
