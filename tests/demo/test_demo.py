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
from moebound.demo.page import render
from moebound.demo.road import SRC, Asked, run
from moebound.errors import StoreError
from moebound.plan import Plan
from moebound.wordmath.builtin import MODELS
from untrained import untrained

MODEL = MODELS[1]
"""A quarter of the work of the first one; .ci/run has that go the same road."""
VOID = {"meta", "link", "br", "hr", "img", "input"}
N = 4
SUITE: dict[str, Any] = {
    "problems": 2,
    "read": 2,
    "seeds": 2,
    "sources": ["gaussian-sd", "codec:bound"],
    "conditions": [
        {"selector": "layer:@0", "rate": 0.8, "table": "6"},
        {"selector": "layer:@1", "rate": 0.8, "table": "6", "answers": False},
        {"selector": "most-used:@0", "rate": [0.3, 0.8], "table": "3", "answers": False},
    ],
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("suite") / "few.json"
    path.write_text(json.dumps(SUITE))
    return [
        "--model", MODEL, "--rates", "1.5,0.3", "--codecs", "bound,lossless", "--prompts", str(N),
        "--suite", str(path), "-q",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    """In this process: others would have to load the model again, four times."""
    out = tmp_path_factory.mktemp("demo") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebound.demo.road.MOST_WORKERS", 1)
        patch.setattr("moebound.demo.road.FULL_SIZE_SECONDS", 0.05)
        assert main(["demo", "-o", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "demo.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rows_say_what_was_asked_and_kept(data: dict[str, Any]) -> None:
    assert data["ok"] is True
    assert [(row["name"], row["rate"]) for row in data["rows"]] == [
        ("bound-0.3", 0.3), ("bound-1.5", 1.5), ("lossless", None),
        ("planned-0.3", 0.3), ("planned-1.5", 1.5),
    ]  # fmt: skip
    fine, coarse, exact, *planned = data["rows"]
    for row in (fine, coarse, *planned):
        assert row["verified"]
        assert 0 < row["worst"] <= 1
        assert 0 < row["kl_nats"] < 1
        assert row["tally"]["n"] == N
        assert (
            row["tally"]["pia"]
            == data["original"]["wordmath-hard"]["pia"] - row["lost"] + (row["gained"])
        )
        # What is not compressed makes the whole model's bits more than the experts'.
        assert row["expert_bits_per_weight"] < row["model_bits_per_weight"] < 16
    assert coarse["expert_bits_per_weight"] < fine["expert_bits_per_weight"]
    assert coarse["kl_nats"] > fine["kl_nats"]
    assert exact["worst"] == exact["kl_nats"] == exact["lost"] == exact["gained"] == 0
    assert exact["top1"] == 1
    for uniform, row in zip((fine, coarse), planned, strict=True):
        assert row["expert_bytes"] == row["predicted_bytes"] <= uniform["expert_bytes"]
        assert row["expert_bytes"] > 0.99 * uniform["expert_bytes"]


@pytest.mark.slow
def test_every_step_leaves_what_its_command_leaves(folder: Path, data: dict[str, Any]) -> None:
    assert {entry.name for entry in folder.iterdir()} == {
        "answers", "demo.json", "index.html", "map.json", "plan-1.5.json", "plan.json",
        "profile.json", "settings.json", "speeds.json", "stores", "stores.jsonl", "study",
    }  # fmt: skip
    assert {entry.name for entry in (folder / "stores").iterdir()} == {
        row["name"] for row in data["rows"]
    }
    assert Plan.load(folder / "plan.json").bits_per_weight == pytest.approx(
        data["rows"][3]["expert_bits_per_weight"]
    )
    for name in ("bound-0.3", "planned-1.5"):
        store = str(folder / "stores" / name)
        assert main(["verify", store, "--against", MODEL, "-q"]) == 0
    assert main(["report", str(folder / "study"), "-o", str(folder.parent / "r.html"), "-q"]) == 0


@pytest.mark.slow
def test_damage_is_found(data: dict[str, Any]) -> None:
    assert data["damage"]["store"] == "bound-0.3"
    assert "SHA-256" in data["damage"]["said"]


@pytest.mark.slow
def test_full_size_matrices_are_measured_too(data: dict[str, Any]) -> None:
    rows = data["speeds"]["rows"]
    assert [(row["codec"], row["rate"]) for row in rows] == [("bound", 0.3), ("bound", 1.5)]
    assert all(row["max_abs_error"] <= row["abs_bound"] for row in rows)
    assert all(row["decode_gweights_per_s"] > 0 for row in rows)


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


@pytest.mark.slow
def test_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    inside = {r[1:] for r in checker.references if r.startswith("#")}
    outside = {r for r in checker.references if not r.startswith(("#", "data:image/png;base64,"))}
    assert inside <= set(checker.ids)
    assert outside == {"https://arxiv.org/abs/2509.07727"}  # to be followed, not fetched
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    for section in ("model", "routing", "study", "plan", "stores", "verified", "speeds"):
        assert f'<section id="{section}">' in page


@pytest.mark.slow
def test_page_has_the_figures_their_commands_and_no_machine_paths(
    folder: Path, data: dict[str, Any], page: str
) -> None:
    command = f"moebound demo -o page --model {MODEL} --rates 1.5,0.3 --codecs bound,lossless"
    assert f"{command} --prompts {N}" in page
    for row in data["rows"]:
        assert f"<td>{row['expert_bits_per_weight']:.2f}</td>" in page
        assert f"<td>{row['kl_nats']:.5f} ± " in page
    bits = data["rows"][0]["expert_bits_per_weight"]
    for said in (
        f"moebound eval {MODEL} --task wordmath-hard --limit {N}",
        f"moebound profile {MODEL} --task wordmath-hard --limit {N} --read references",
        "moebound report study",
        f"moebound plan {MODEL} --sensitivity map.json --bpw {bits:.4f}",
        f"moebound compress {MODEL} planned --plan plan.json",
        f"moebound verify small --against {MODEL}",
        "moebound bench codec --rates 0.3,1.5 --codecs bound",
    ):
        assert said in page
    for path in (folder.parent, Path(__file__).parents[2]):
        assert str(path) not in page
        assert str(path) not in json.dumps(data)


@pytest.mark.slow
def test_commands_on_the_page_are_commands(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that is shown exists."""
    blocks = re.findall(r'<div class="how">.*?<pre[^>]*>(.*?)</pre>', page, flags=re.DOTALL)
    lines = [line.split() for block in blocks for line in block.splitlines()]
    seen = set()
    for program, *words in lines:
        command = words[: 2 if words[0] == "bench" else 1]
        assert program == "moebound"
        assert main([*command, "--help"]) == 0
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("-")), words
        seen.add(command[-1])
    assert seen == {
        "eval", "profile", "study", "report", "sensitivity", "plan", "compress", "verify",
        "quality", "codec",
    }  # fmt: skip


def test_kept_over_asked_is_never_rounded_across_one() -> None:
    assert kept_over_asked(0.999996) == "0.9999"
    assert kept_over_asked(1.0) == "1.0000"
    assert kept_over_asked(1.0000001) == "1.0001"
    assert kept_over_asked(0.0) == "0.0000"


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on(folder: Path, options: list[str]) -> None:
    """Nothing that is finished is made again: not a file's content, not a row."""
    before = (folder / "stores.jsonl").read_bytes(), (folder / "study" / "rows.jsonl").read_bytes()
    (folder / "demo.json").unlink()
    asked = Asked(
        (0.3, 1.5), ("bound", "lossless"), N, options[options.index("--suite") + 1], MODEL
    )
    said: list[str] = []
    report = run(folder, asked, workers=1, say=lambda what, *_: said.append(what))
    after = (folder / "stores.jsonl").read_bytes(), (folder / "study" / "rows.jsonl").read_bytes()
    assert before == after
    assert len(report.rows) == 5
    assert not any(what.startswith(("store ", "layer ", "speed: ")) for what in said)


@pytest.mark.long
def test_another_model_goes_the_same_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the second's kind, untrained: its name is in every command, and nothing is left of
    the first's."""
    monkeypatch.setattr("moebound.demo.road.FULL_SIZE_SECONDS", 0.01)
    model = str(untrained(tmp_path / "model", "builtin:wordmath-mixtral"))
    suite = tmp_path / "one.json"
    suite.write_text(json.dumps({**SUITE, "seeds": 1, "conditions": SUITE["conditions"][1:2]}))
    asked = Asked((0.8,), ("bound",), 2, str(suite), model)
    report = run(tmp_path / "page", asked, workers=1)
    assert report.ok
    assert [row.name for row in report.rows] == ["bound-0.8", "planned-0.8"]
    assert report.model.name == model
    assert (report.model.model_type, report.model.n_experts) == ("mixtral", 3 * 8)
    assert (report.model.experts_per_token, report.model.n_moe_layers) == (2, 3)
    page = render(report)
    for said in (
        "moebound eval ",
        "moebound profile ",
        "moebound plan ",
        "moebound bench quality ",
    ):
        assert f"{said}{model} " in page
    assert SRC not in page.replace(model, "")


def test_the_command_hands_the_model_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Asked, str]] = []

    def stop(folder: Path, asked: Asked, *, command: str, say: object) -> None:
        taken.append((asked, command))
        raise StoreError("far enough")

    monkeypatch.setattr("moebound.demo.road.run", stop)
    second = "builtin:wordmath-mixtral"
    assert main(["demo", "-o", str(tmp_path / "a"), "--model", second, "-q"]) == 2
    assert main(["demo", "-o", str(tmp_path / "a"), "-q"]) == 2
    assert [asked.src for asked, _ in taken] == [second, SRC]
    assert [command for _, command in taken] == [
        f"moebound demo -o a --model {second}", "moebound demo -o a",
    ]  # fmt: skip
    assert main(["demo", "-o", str(tmp_path / "a"), "--model", "builtin:nosuch", "-q"]) == 2
    assert len(taken) == 2
