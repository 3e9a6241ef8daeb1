"""The demo, whole but small: real stores, a real model, a page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moebound.cli.main import main
from moebound.demo.columns import kept_over_asked

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "page"
    args = ["--rates", "0.3,1.5", "--codecs", "bound,lossless", "--prompts", "6", "-q"]
    assert main(["demo", "-o", str(out), *args]) == 0
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "demo.json").read_text())
    assert isinstance(found, dict)
    return found


def test_rows_say_what_was_asked_and_kept(data: dict[str, Any]) -> None:
    fine, coarse, exact = data["rows"]
    assert data["ok"] is True
    assert [(row["codec"], row["rate"]) for row in data["rows"]] == [
        ("bound", 0.3), ("bound", 1.5), ("lossless", None),
    ]  # fmt: skip
    for row in (fine, coarse):
        assert row["verified"]
        assert 0 < row["kept_rate"] <= row["rate"]
        assert 0 < row["kl_nats"] < 1
        assert row["decode_gweights_per_s"] > 0
        # What is not compressed makes the whole model's bits more than the experts'.
        assert row["expert_bits_per_weight"] < row["model_bits_per_weight"] < 16
    assert coarse["expert_bits_per_weight"] < fine["expert_bits_per_weight"]
    assert coarse["kl_nats"] > fine["kl_nats"]
    assert exact["worst"] == exact["kl_nats"] == 0
    assert exact["top1_agreement"] == 1
    assert exact["reproduced"] == data["model"]["reproduced"]


def test_full_size_matrices_are_measured_too(data: dict[str, Any]) -> None:
    assert [row["rate"] for row in data["full_size"]] == [0.3, 1.5]
    assert all(row["worst"] <= 1 for row in data["full_size"])


def test_a_store_is_left_and_good(folder: Path) -> None:
    assert main(["verify", str(folder / "store"), "--against", "builtin:wordmath", "-q"]) == 0
    assert {entry.name for entry in folder.iterdir()} == {"index.html", "demo.json", "store"}


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")


def test_page_is_well_formed_and_needs_nothing_else(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(reference.startswith("#") for reference in checker.references)
    assert {reference[1:] for reference in checker.references} <= set(checker.ids)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 2


def test_page_has_the_figures_the_command_and_no_machine_paths(
    folder: Path, data: dict[str, Any]
) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "moebound demo -o page --rates 0.3,1.5 --codecs bound,lossless --prompts 6" in page
    for row in data["rows"]:
        assert f"<td>{row['expert_bits_per_weight']:.2f}</td>" in page
        assert f"<td>{row['kl_nats']:.5f}</td>" in page
    assert str(folder.parent) not in page
    assert str(Path(__file__).parents[2]) not in page
    assert str(folder.parent) not in json.dumps(data)


def test_kept_over_asked_is_never_rounded_across_one() -> None:
    assert kept_over_asked(0.999996) == "0.9999"
    assert kept_over_asked(1.0) == "1.0000"
    assert kept_over_asked(1.0000001) == "1.0001"
    assert kept_over_asked(0.0) == "0.0000"


def test_what_is_not_a_store_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("keep me")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert str(tmp_path / "store") in capsys.readouterr().err
    assert (tmp_path / "store" / "mine.txt").read_text() == "keep me"
