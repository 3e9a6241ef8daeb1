"""The frame of a page: head, style sheet, body; a table of contents, and boxes that scroll."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape, unescape
from importlib.resources import files


def style() -> str:
    """The style sheet that all pages begin with."""
    return files("moebound.page").joinpath("base.css").read_text(encoding="utf-8")


def document(
    title: str, sections: Sequence[str], *, more_style: str = "", contents: bool = False
) -> str:
    """The whole page. title: plain text. sections: HTML; empty ones are left out. contents: a table
    of them behind the page's header; their headings are anchors then."""
    body = "\n".join(section for section in sections if section)
    if contents:
        body = _with_contents(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a hostile file brought in that was not escaped: nothing runs, nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{style()}{more_style}</style>\n</head>\n<body>\n"
        + _reachable(body)
        + "\n</body>\n</html>\n"
    )


def _with_contents(body: str) -> str:
    entries, taken = list[str](), Counter[str]()

    def anchored(heading: re.Match[str]) -> str:
        text = _text(heading[1])
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
        taken[name] += 1
        if taken[name] > 1:
            name += f"-{taken[name]}"
        entries.append(f'<li><a href="#{name}">{escape(text)}</a></li>')
        return f'<h2 id="{name}">{heading[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", anchored, body, flags=re.DOTALL)
    header, end, rest = body.partition("</header>")
    listed = "".join(entries)
    return f'{header}{end}\n<nav aria-label="Contents"><ol>{listed}</ol></nav>\n{rest.lstrip()}'


_BOX = re.compile(r'<h[1-3][^>]*>(.*?)</h[1-3]>|<div class="scroll">|<pre>', re.DOTALL)


def _reachable(body: str) -> str:
    """Boxes that scroll get the keyboard's focus, and are named by the heading above them."""
    above = ""

    def named(found: re.Match[str]) -> str:
        nonlocal above
        if found[1] is not None:
            above = _text(found[1])
            return found[0]
        what = "command" if found[0] == "<pre>" else "figures"
        label = escape(f"{above}: {what}" if above else what)
        return f'{found[0][:-1]} tabindex="0" role="region" aria-label="{label}">'

    return _BOX.sub(named, body)


def _text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html)).strip()
