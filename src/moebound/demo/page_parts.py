"""Tables that several sections have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import TypeVar

from moebound.demo.columns import Column

R = TypeVar("R")


def grouped_table(
    columns: Sequence[Column[R]],
    rows: Sequence[R],
    *,
    group_of: Callable[[R], str],
    first: Callable[[R], str] = lambda row: "",
    broken: Callable[[R], bool] = lambda row: False,
) -> str:
    """A line above each new group of rows. first: HTML in front of the first cell. broken: whose
    promise was not kept, which the third cell then says."""
    groups = "".join(
        f'<th class="group" colspan="{len(list(members))}">{escape(name)}</th>' if name
        else "".join("<th></th>" for _ in members)
        for name, members in groupby(columns, key=lambda column: column.group)
    )  # fmt: skip
    names = "".join(f'<th scope="col">{escape(column.name)}</th>' for column in columns)
    body, last = [], None
    for row in rows:
        cells = [f"<td>{escape(column.cell(row))}</td>" for column in columns]
        cells[0] = f"<td>{first(row)}{escape(columns[0].cell(row))}</td>"
        if broken(row):
            cells[2] = f'<td><span class="off">{escape(columns[2].cell(row))} broken</span></td>'
        begins = ' class="first"' if group_of(row) != last else ""
        body.append(f"<tr{begins}>{''.join(cells)}</tr>")
        last = group_of(row)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{groups}</tr>\n<tr>{names}</tr></thead>\n'
        "<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )
