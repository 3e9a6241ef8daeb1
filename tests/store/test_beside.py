"""What a store takes over from its source beside weights, and what it says about the rest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebound.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from moebound.store import decompress, open_store, verify, write_card
from moebound.types import ErrorBound

from .conftest import MakeSource, MakeStore, run

TEMPLATES = "additional_chat_templates"


@pytest.fixture
def src(source: MakeSource, tmp_path: Path) -> Path:
    """A source with files of many kinds."""
    folder = Path(shutil.copytree(source("mixtral"), tmp_path / "src"))
    names = dict.fromkeys(load_file(folder / SINGLE_FILE), SINGLE_FILE)
    save_file({"mtp.fc.weight": torch.ones(4, 2)}, folder / "model_mtp.safetensors")
    index = {"weight_map": names | {"mtp.fc.weight": "model_mtp.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    save_file({"extra.weight": torch.ones(3)}, folder / "extra.safetensors")
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "rag.jinja").write_text("R")
    (folder / "original").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "moebound.plan.json").write_text("{}")
    (folder / "x.records.jsonl").write_text("{}")
    return folder


def test_what_is_carried_and_what_is_named(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    summary = run(src, dst)
    assert open_store(dst).tensors["mtp.fc.weight"].shape == (4, 2)
    for name in ("extra.safetensors", f"{TEMPLATES}/rag.jinja", "x.records.jsonl"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()
    left_out = {"moebound.plan.json", "original", "pytorch_model.bin"}
    assert set(summary.left_out) == set(summary.to_json()["left_out"]) == left_out
    assert set(open_store(dst).settings.left_out) == left_out
    for _ in range(2):  # written with the store, and anew
        card = (dst / "README.md").read_text()
        assert "## Left out" in card
        assert all(name in card for name in left_out)
        write_card(dst)
    files = {file.name for file in open_store(dst).files}
    assert files >= {"extra.safetensors", f"{TEMPLATES}/rag.jinja", "tokenizer.json"}
    assert verify(dst, against=open_checkpoint(src)).ok


def test_it_comes_back(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "dst")
    decompress(tmp_path / "dst", tmp_path / "out")
    a, b = open_checkpoint(src), open_checkpoint(tmp_path / "out")
    assert {n: t.file.name for n, t in a.tensors.items()} == {
        n: t.file.name for n, t in b.tensors.items()
    }
    for name in ("extra.safetensors", f"{TEMPLATES}/rag.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()
    [sidecar] = load_file(tmp_path / "out/model_mtp.safetensors").values()
    assert torch.equal(sidecar, torch.ones(4, 2))


@pytest.mark.parametrize("name", ["extra.safetensors", f"{TEMPLATES}/rag.jinja", "tokenizer.json"])
def test_verify_sees_what_was_left_out_or_changed(name: str, src: Path, tmp_path: Path) -> None:
    dst, held = tmp_path / "dst", tmp_path / "held"
    os.rename(src / name, held)
    run(src, dst)
    shutil.copy(held, src / name)
    found = verify(dst, against=open_checkpoint(src)).problems
    assert [(p.kind, p.tensor) for p in found] == [("original", name)]
    assert "not in the store" in found[0].message


def test_verify_sees_another_file_of_the_original(own_store: MakeStore, tmp_path: Path) -> None:
    folder, dst = own_store()
    src = Path(shutil.copytree(folder, tmp_path / "src"))
    (src / "tokenizer.json").write_text("{}")
    found = verify(dst, against=open_checkpoint(src)).problems
    assert [(p.kind, p.tensor) for p in found] == [("original", "tokenizer.json")]


def test_a_store_says_when_files_in_its_folders_change(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    run(src, dst)
    (dst / TEMPLATES / "rag.jinja").write_text("other")
    assert [(p.kind, p.tensor) for p in verify(dst).problems] == [
        ("file", f"{TEMPLATES}/rag.jinja")
    ]


def test_names_that_are_no_text_are_seen_to_before_the_work(src: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"mod\xe8le")
    os.rename(src, folder)
    (folder / os.fsdecode(b"no\xebl.json")).write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": "\ud800"}))
    dst = tmp_path / os.fsdecode(b"d\xe9st")
    summary = run(folder, dst)
    assert "no\\udcebl.json" in summary.left_out
    assert open_store(dst).settings.source == "mod\\udce8le"
    assert open_store(dst).config["note"] == "\ud800"
    assert verify(dst, against=open_checkpoint(folder)).ok
    decompress(dst, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["note"] == "\ud800"


@pytest.mark.parametrize(
    "bound",
    [
        ErrorBound(1e9, "rate", "expert"),
        ErrorBound(1e9, "rate"),
        ErrorBound(5.0, "abs"),
        ErrorBound(1.0, "range"),
        ErrorBound(1.0, "rmse"),
    ],
    ids=str,
)
def test_a_bound_that_lets_everything_go_is_remarked_on(
    bound: ErrorBound, source: MakeSource, tmp_path: Path
) -> None:
    summary = run(source("mixtral"), tmp_path / "dst", bound=bound)
    [remark] = summary.remarks
    assert "lets every weight of an expert become 0" in remark
    again = run(source("mixtral"), tmp_path / "dst", bound=bound, on_existing="resume")
    assert again.remarks == [remark]
    assert run(source("mixtral"), tmp_path / "fine").remarks == []


def test_another_model_is_said_first_and_not_a_thousand_times(
    source: MakeSource, shared_store: MakeStore
) -> None:
    _, dst = shared_store()
    for other in (source(seed=1), source("mixtral")):
        report = verify(dst, against=open_checkpoint(other))
        assert not report.ok
        assert f"was not made from {other}" in report.problems[0].message
        kinds = [problem.kind for problem in report.problems[1:]]
        assert all(kinds.count(kind) <= 5 for kind in kinds)
        assert report.more > 0
