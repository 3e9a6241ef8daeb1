"""The page: alone, escaped, drawn, and the command that makes it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moebound.cli.main import main
from moebound.paper.report import Report, make_report, read_study
from moebound.paper.report.page import render

from .synthetic import write_study

HOSTILE = "</svg></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{$"
VOID = {"meta", "img", "br", "link", "path", "use", "rect", "stop", "circle", "line"}


class Tags(HTMLParser):
    """Every tag with its attributes; fails on tags that close what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, tag
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def page(paperlike_report: Report) -> str:
    return render(paperlike_report)


@pytest.mark.slow
def test_it_needs_nothing_else(page: str) -> None:
    tags = parsed(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data", "action")
            assert not name.startswith("on")
            if name == "href":
                assert (value or "").startswith("#")
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    tags = parsed(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)


def test_it_shows_tables_verdicts_and_figures(page: str, paperlike_report: Report) -> None:
    text = " ".join(parsed(page).text)
    for name in ("Table 3", "Table 9", "Section 3.2.1", "Sensitivity by depth",
                 "Where an error goes", "Accuracies with their intervals"):  # fmt: skip
        assert name in text
    for verdict in paperlike_report.verdicts:
        assert verdict.claim.text in text
        assert verdict.claim.rule in text
    assert page.count('<svg class="plot"') >= 8
    assert "<td>/</td>" in page.replace(' class="edge"', "")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "x", n=30, seeds=1, sources=("gaussian-sd", "codec:bound"), model=HOSTILE,
        label=lambda text: f"{text} {HOSTILE}",
    )  # fmt: skip
    document = json.loads((folder / "study.json").read_text())
    document |= {"suite": HOSTILE, "created": HOSTILE}
    (folder / "study.json").write_text(json.dumps(document))
    lines = (folder / "rows.jsonl").read_text().replace("codec:bound", "codec:<b onclick=1>")
    (folder / "rows.jsonl").write_text(lines)
    found = parsed(render(make_report(read_study(folder))))
    assert not {tag for tag, _ in found.tags} & {"script", "img", "b onclick=1"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert any(HOSTILE in text for text in found.text)


@pytest.mark.parametrize("keep", [0, 2, 9])
def test_a_partial_study_has_a_page(tmp_path: Path, keep: int) -> None:
    folder = write_study(tmp_path / "x", n=20, seeds=1, sources=("gaussian-sd", "codec:bound"))
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:keep]))
    text = " ".join(parsed(render(make_report(read_study(folder)))).text)
    assert "not measured yet" in text


def test_command(paperlike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    assert main(["report", str(paperlike), "-o", str(page), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["page"] == str(page)
    assert page.read_text().startswith("<!doctype html>")
    assert {v["outcome"] for v in document["verdicts"]} == {"supports", "contradicts", "open"}
    assert [t["id"] for t in document["tables"]][:2] == ["3.2.1", "3"]
    assert document["statistics"]["n_comparisons"] > 100


def test_the_page_goes_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "s", n=10, seeds=1, sources=("gaussian-sd",),
                         keep=lambda place: place.table == "3")  # fmt: skip
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()
    said = capsys.readouterr().out
    assert "in the most used expert of the first layer, reasoning (PIA) stays as good." in said
    assert "used-expert-robust" not in said


def test_boxes_that_scroll_and_sections_are_reachable(page: str) -> None:
    boxes = re.findall(r'<div class="scroll"[^>]*>|<pre[^>]*>', page)
    assert boxes
    for box in boxes:
        assert 'tabindex="0" role="region" aria-label="' in box
    anchors = re.findall(r'<li><a href="#([a-z0-9-]+)">', page)
    assert anchors == re.findall(r'<h2 id="([^"]+)">', page)
    assert len(set(anchors)) == page.count("<h2")


@pytest.mark.parametrize("make", ["nothing", "empty", "damaged"])
def test_bad_folders_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: str
) -> None:
    folder = tmp_path / "s"
    if make != "nothing":
        folder.mkdir()
    if make == "damaged":
        (folder / "study.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    shown = capsys.readouterr()
    assert str(folder) in shown.err
    assert "Traceback" not in shown.err
    assert not (folder / "report.html").exists()
