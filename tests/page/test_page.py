"""What pages have in common: nothing to fetch, drawings in the page's colours, ids of their own."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moebound.page import INK, SERIES, document, drawing, style


def _line(figure: Any) -> None:
    axes = figure.add_subplot()
    axes.plot([1, 2], [1, 2], marker="o", color=SERIES[5], label="a $b$ <i>漢\x07")
    axes.legend()


def test_a_document_is_whole_and_fetches_nothing() -> None:
    page = document("a <b> & c", ["<p>x</p>", "", "<p>y</p>"], more_style=".z { color: red; }")
    assert page.startswith("<!doctype html>")
    assert "<title>a &lt;b&gt; &amp; c</title>" in page
    assert "default-src 'none'" in page
    assert page.index("--paper") < page.index(".z {") < page.index("<p>x</p>\n<p>y</p>")
    assert "@import" not in style()
    assert "url(" not in style()


def test_drawings_follow_the_pages_colours() -> None:
    svg = drawing((3, 2), _line, name="one", alt='a "line" <b>')
    assert svg.startswith('<svg class="plot" role="img" aria-label="a &quot;line&quot; &lt;b&gt;"')
    assert "var(--series-5)" in svg
    assert "var(--ink)" in svg
    assert INK not in svg
    assert SERIES[5] not in svg
    assert "a $b$ &lt;i&gt;" in svg
    assert not re.search(r'<svg[^>]* (width|height|xmlns)="', svg)


def test_every_series_has_a_colour() -> None:
    for theme in style().split("@media screen and (prefers-color-scheme: dark)"):
        assert all(f"--series-{index}:" in theme for index in range(len(SERIES)))


@pytest.mark.parametrize("name", ["two", "Two words / more"])
def test_ids_are_the_drawings_own(name: str) -> None:
    first, second = (drawing((3, 2), _line, name=n, alt="x") for n in ("one", name))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    for svg, known in zip((first, second), ids, strict=True):
        wanted = re.findall(r'href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
        assert wanted
        assert set(wanted) <= known


def test_the_same_figure_is_the_same_bytes() -> None:
    assert drawing((3, 2), _line, name="a", alt="b") == drawing((3, 2), _line, name="a", alt="b")
