"""The frame of a page: head, style sheet, body."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def style() -> str:
    """The style sheet that all pages begin with."""
    return files("moebound.page").joinpath("base.css").read_text(encoding="utf-8")


def document(title: str, sections: Sequence[str], *, more_style: str = "") -> str:
    """The whole page. title: plain text. sections: HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a hostile file brought in that was not escaped: nothing runs, nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{style()}{more_style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
