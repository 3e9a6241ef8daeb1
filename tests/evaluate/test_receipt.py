"""The receipt of `moebound compare`: how far, on which text, with every byte counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.cli.main import main
from moebound.errors import CheckpointError
from moebound.evaluate.fidelity import Baseline, logits_of
from moebound.evaluate.loading import load
from moebound.evaluate.receipt import Reading, bytes_of, receipt
from moebound.evaluate.text import pad, solved_rows
from moebound.score import Score
from moebound.store import compress
from moebound.tasks import get_task
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve
from tiny_models import make_tiny

SRC = "builtin:wordmath"
LIMIT = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("receipt") / "store"
    compress(SRC, folder, bound=ErrorBound(0.5, "rate", "expert"))
    return folder


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["compare", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.fixture
def by_task(store: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    task = ["--task", "wordmath-hard", "--limit", str(LIMIT)]
    return compared(capsys, SRC, str(store), *task)


def score_of(store: Path) -> Score:
    loaded, task = load(SRC), get_task("wordmath-hard")
    rows = solved_rows(loaded.tokenizer, task, task.problems(LIMIT))
    return Baseline.of(loaded.model, rows).compare(load(store).model)


def test_it_says_what_a_baseline_says(store: Path, by_task: dict[str, Any]) -> None:
    expected = score_of(store)
    found = by_task["kl"]
    assert found["mean"] == pytest.approx(expected.kl_nats)
    assert found["median"] == pytest.approx(expected.kl_median_nats)
    assert found["p99"] == pytest.approx(expected.kl_p99_nats)
    assert 0 < found["median"] < found["mean"] < found["p99"] <= found["p999"]
    assert by_task["top1"] == expected.top1_agreement
    answers = by_task["answers"]
    assert answers["kl"]["mean"] == pytest.approx(expected.answer_kl_nats)
    assert answers["top1"] == expected.answer_top1_agreement
    assert by_task["text"]["tokens"] == expected.n_tokens
    assert by_task["noise_floor"] is None


def test_perplexities_are_those_of_each_model(store: Path, by_task: dict[str, Any]) -> None:
    task = get_task("wordmath-hard")
    for name, side in ((SRC, by_task["original"]), (str(store), by_task["other"])):
        loaded = load(name)
        rows = solved_rows(loaded.tokenizer, task, task.problems(LIMIT))
        nats, of_answers = [], []
        for row in rows:
            batch = pad([row], 0)
            logs = torch.log_softmax(logits_of(loaded.model, batch)[0, :-1].double(), -1)
            each = -logs.gather(1, batch.input_ids[0, 1:, None])[:, 0]
            nats += each.tolist()
            of_answers += each[len(row[0]) - 1 :].tolist()
        assert side["perplexity"]["nats"] == pytest.approx(sum(nats) / len(nats))
        expected = sum(of_answers) / len(of_answers)
        assert side["answers"]["perplexity"]["nats"] == pytest.approx(expected)


def test_every_byte_is_counted(store: Path, by_task: dict[str, Any]) -> None:
    n_bytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert by_task["other"]["n_bytes"] == n_bytes == bytes_of(str(store))
    n_weights = sum(p.numel() for p in load(SRC).model.parameters())
    assert by_task["n_weights"] == n_weights
    assert by_task["whole_bits_per_weight"] == 8 * n_bytes / n_weights


def test_a_model_is_not_far_from_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, SRC, SRC, "--task", "wordmath", "--limit", "3")
    assert found["kl"]["mean"] == found["kl"]["p999"] == 0
    assert found["top1"] == found["answers"]["top1"] == 1
    assert found["other"]["perplexity"] == found["original"]["perplexity"]


def test_a_text_has_no_answers(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Eli has 42 coins. Eli gives 17 coins to Ava. " * 8)
    options = ["--text", str(text), "--window", "32", "--limit", "2"]
    found = compared(capsys, SRC, str(store), *options)
    assert found["answers"] is found["text"]["answer_tokens"] is None
    assert found["text"]["tokens"] == 2 * 31
    assert found["kl"]["mean"] > 0
    again = compared(capsys, SRC, str(store), *options)
    assert again["text"]["sha256"] == found["text"]["sha256"]
    assert main(["compare", SRC, str(store), *options]) == 0
    assert "solutions" not in capsys.readouterr().out


def test_problems_can_be_left_out(
    store: Path, by_task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "wordmath-hard", "--limit", str(LIMIT), "--skip", "3"]
    found = compared(capsys, SRC, str(store), *options)
    assert found["text"]["sequences"] == LIMIT
    assert found["text"]["sha256"] != by_task["text"]["sha256"]


def test_it_goes_into_the_card(
    store: Path, by_task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    (tmp_path / "receipt.json").write_text(json.dumps(by_task))
    assert main(["card", str(copy), "--measured", str(tmp_path / "receipt.json")]) == 0
    card = (copy / "README.md").read_text()
    assert f"| kl: p99 | {by_task['kl']['p99']:.5g} |" in card
    assert by_task["text"]["sha256"] in card


def test_a_gguf_file_is_run_by_llama_cpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason="pip install '.[peers]'")
    from moebound.bench.offload.gguf_file import write_gguf

    file = write_gguf(Path(resolve(SRC)), tmp_path / "model.gguf")
    options = ["--task", "wordmath", "--limit", "3", "--floor", str(file)]
    found = compared(capsys, SRC, str(file), *options)
    assert found["other"]["engine"].startswith("llama.cpp")
    assert found["other"]["n_bytes"] == file.stat().st_size
    assert 0 < found["kl"]["mean"] < 0.05  # its products are in bfloat16
    assert found["noise_floor"]["kl"] == found["kl"]


def test_what_cannot_be_compared(store: Path, tmp_path: Path) -> None:
    task = ["--task", "wordmath", "--limit", "2"]
    with pytest.raises(CheckpointError, match="vocabulary of 96 tokens, expected the original's"):
        _other_vocabulary(tmp_path)
    for wrong in (
        [SRC, str(store)],
        [SRC, str(store), *task, "--window", "8"],
        [SRC, str(store), *task, "--floor", "a.gguf"],
        [SRC, str(tmp_path / "no.gguf"), *task],
        [SRC, str(store), "--task", "wordmath", "--skip", "100000000"],
    ):
        assert main(["compare", *wrong]) == 2


def _other_vocabulary(folder: Path) -> None:
    make_tiny("mixtral", folder / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve(SRC)) / name, folder / "other")
    rows = [((1, 2), (3, 4))]
    receipt(SRC, str(folder / "other"), lambda loaded: Reading("t", "0", rows, True))
