"""Pieces of HTML that several sections have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TypeVar

from moebound.demo.columns import Column
from moebound.score.statistics import Interval

R = TypeVar("R")


def section(anchor: str, title: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}</section>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def how(*commands: str) -> str:
    """The commands that give the figures beside them."""
    lines = "\n".join(escape(command) for command in commands)
    return f'<div class="how"><p>The command for it</p><pre>{lines}</pre></div>'


def facts(items: Mapping[str, str]) -> str:
    found = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items.items()
    )
    return f"<dl>{found}</dl>"


def figure(drawn: str, caption: str, *, wide: bool = False, narrow: bool = False) -> str:
    """caption: HTML. wide: to be scrolled where there is no room. narrow: not as wide as others, so
    that letters are of one size."""
    inner = f'<div class="scroll">{drawn}</div>' if wide else drawn
    kind = f' class="wide{" narrow" if narrow else ""}"' if wide else ""
    return f"<figure{kind}>{inner}<figcaption>{caption}</figcaption></figure>"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(found: Interval) -> str:
    return f"{percent(found.value)} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def plain_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody></table></div>"
    )


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
