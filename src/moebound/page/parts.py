"""Pieces of HTML that several pages have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moebound.score.statistics import Interval


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


def machine(about: Mapping[str, Any]) -> dict[str, str]:
    """What `bench.environment.describe` says, for `facts`."""
    versions = {"Python": about.get("python"), **(about.get("versions") or {})}
    return {
        "processor": f"{about.get('cpu') or 'unknown'}, {about.get('cpus')} cores used",
        "kernel": str(about.get("kernel")),
        "vector units": ", ".join(about.get("cpu_flags") or []) or "none that are used",
        "system": f"{about.get('system')} {about.get('machine')}",
        "versions": ", ".join(f"{name} {text}" for name, text in versions.items() if text),
        "date": str(about.get("date")),
        "commit": str(about.get("commit") or "unknown"),
    }
