"""Bits a weight against KL, a figure for each kind of method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moebound.bench.methods.rows import MethodRow
from moebound.methods.bases.approximation import Approximation
from moebound.methods.keeping import Keeping
from moebound.methods.registry import METHODS, method_class
from moebound.page import DASHES, FAINT, MARKERS, SERIES, SOFT, drawing

KINDS = {
    "integers": "Integers, bounds, and bounds on what a base leaves",
    "bases": "Low rank and shared bases, 16 bits a number, as published",
    "fewer": "The same, with numbers in fewer bits",
    "kept": "Experts left out, merged, or in pairs, and the rest as it is",
    "coded": "Experts left out, merged, cut, or in pairs, and the rest coded",
}
"""By kind, what stands under its figure."""
REFERENCE = "bound"
_PANELS = (("kl_nats", "all tokens"), ("answer_kl_nats", "solutions' tokens"))


def kind_of(method: str) -> str:
    """Of a method as it was asked for."""
    own, plus, _ = method.partition("+")
    name, colon, _ = own.partition(":")
    if plus:
        return "coded"
    if not METHODS.knows(name):
        return "integers"
    cls = method_class(name)
    if issubclass(cls, Keeping) or name.startswith("puzzle"):
        return "kept"
    if issubclass(cls, Approximation) and not name.startswith("milo"):
        return "fewer" if colon else "bases"
    return "integers"


def bits_against_kl(kind: str, rows: Sequence[MethodRow], every: Sequence[MethodRow]) -> str:
    """rows: of this kind. every: among which is the reference."""

    def draw(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        panels = figure.subplots(1, 2, sharey=True)
        for axes, (field, title) in zip(panels, _PANELS, strict=True):
            reference = [row for row in every if row.method == REFERENCE]
            if kind != "integers":
                _line(axes, reference, field, color=SOFT, linewidth=1.0, label=REFERENCE)
            for at, name in enumerate(dict.fromkeys(row.method for row in rows)):
                _line(
                    axes, [row for row in rows if row.method == name], field, label=name,
                    color=SERIES[at % len(SERIES)], marker=MARKERS[at % len(MARKERS)],
                    linestyle=DASHES[at // len(SERIES) % len(DASHES)], markersize=5, linewidth=1.5,
                    markerfacecolor="none", elinewidth=1.0, capsize=2,
                )  # fmt: skip
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(title)
            axes.set_xlabel("bits a weight, experts")
            axes.grid(color=FAINT, linewidth=0.7)
        panels[0].set_ylabel("KL to the original, nats a token")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)

    return drawing((11.5, 4.6), draw, name=f"bits {kind}", alt=f"KL against bits: {KINDS[kind]}")


def _line(axes: Any, rows: Sequence[MethodRow], field: str, **look: Any) -> None:
    points = sorted(
        (row.made.bits_per_weight, value, error)
        for row in rows
        if row.made is not None and row.score is not None
        for value, error in [(getattr(row.score, field), _error(row, field))]
        if math.isfinite(value) and value > 0
    )
    if not points:
        return
    bits, values, errors = zip(*points, strict=True)
    # On a logarithmic axis a bar to 0 has no end.
    low = [min(2 * error, 0.9 * value) for value, error in zip(values, errors, strict=True)]
    axes.errorbar(bits, values, yerr=[low, [2 * error for error in errors]], **look)


def _error(row: MethodRow, field: str) -> float:
    found = float(getattr(row.score, field.replace("_nats", "_stderr")))
    return found if math.isfinite(found) else 0.0
