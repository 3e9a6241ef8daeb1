"""How numbers are spelled for people, and the plain two-column table most results are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from moebound.demo.columns import kept_over_asked
from moebound.types import NO_LOSS, ErrorBound, Guarantee

if TYPE_CHECKING:
    from moebound.store.format import Others
    from moebound.store.summary import OtherTotals, OutputTotals, WithoutWeights

__all__ = ["bits", "bound", "facts", "grid", "index_ranges", "kept_over_asked", "n_bytes",
           "others", "outputs", "percent", "promise", "ratio", "without_weights"]  # fmt: skip

EXACT = NO_LOSS


def n_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and links are sold: 22.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else "-"


def bits(value: float) -> str:
    return f"{value:.3f} bits per weight"


def bound(asked: ErrorBound | None) -> str:
    if asked is None:
        return "none"
    if asked == EXACT:
        return "an exact copy"
    return str(asked) if asked.pointwise else f"{asked} (an average promise)"


def others(asked: Others, coded: OtherTotals) -> str:
    """What became of tensors that are no expert's."""
    if not coded.n_tensors:
        return "as they were"
    how = "without loss" if isinstance(asked, str) else f"rate {asked:g} of each matrix"
    before, after = coded.bytes_before, coded.bytes_after
    return (
        f"{coded.n_tensors} coded {how}: {n_bytes(before)} -> {n_bytes(after)}, "
        f"{ratio(before, after)}"
    )


def promise(
    guarantee: Guarantee, worst: float | None, max_abs_error: float, how: str = ""
) -> list[tuple[str, str]]:
    """What holds for every weight, and what was measured. how: it was measured."""
    end = f" ({how})" if how else ""
    lines = [("guarantee", GUARANTEES[guarantee])]
    if worst is not None:
        lines.append(("worst kept / asked", kept_over_asked(worst) + end))
    lines.append(("largest error", f"{max_abs_error:.3g} in weight units{end}"))
    return lines


def outputs(found: OutputTotals | None, how: str = "") -> list[tuple[str, str]]:
    """What became of outputs on the text that experts were rounded by."""
    if found is None or found.median is None or found.largest is None:
        return []
    middle, most = f"{100 * found.median:.3g} %", f"{100 * found.largest:.3g} %"
    end = f" ({how})" if how else ""
    said = f"median {middle}, largest {most} of their power on the calibration text{end}"
    return [("error of outputs", said)]


def without_weights(found: WithoutWeights) -> list[tuple[str, str]]:
    """Experts of which nothing is promised; no line where there are none."""
    return [("experts without weights", str(found))] if found else []


GUARANTEES: dict[Guarantee, str] = {
    "max_abs": "no weight is off by more than its bound",
    "lossless": "every weight has the bits it had",
    "rmse": "an average promise: single weights may be off by more",
    "none": "none: the errors were measured, and nothing was promised",
}


def index_ranges(indices: Iterable[int]) -> str:
    """{0, 1, 2, 3, 7} -> "0-3,7", the way --layers takes it."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A name and a value a line. Nothing a path or a model name contains is taken as markup."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None,
                  show_header=False, padding=(0, 2, 0, 0))  # fmt: skip
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> Table:
    """Columns of figures, aligned right, behind `text_columns` of words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for position, name in enumerate(columns):
        table.add_column(
            Text(name), justify="left" if position < text_columns else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def time_left(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s left"
    return f"{minutes:.0f} min left" if minutes < 90 else f"{minutes / 60:.1f} h left"
