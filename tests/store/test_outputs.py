"""Outputs on the text that a store was made by: certified, computed again; no figure can lie."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.calibrate import Text, collect
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.evaluate.loading import Loaded, Source
from moebound.files.formats.statistics import Statistics, read_statistics, save_statistics
from moebound.store import open_store, verify, write_card
from moebound.types import ErrorBound, ExpertKey
from tiny_models import model_class

from .conftest import MakeSource, run
from .test_lies import leaves, one_of_a_kind, others, put, records_of, seal, write_records


def statistics(source: Path, folder: Path, rows: int = 9) -> Statistics:
    config: Any = __import__("transformers").AutoConfig.from_pretrained(source)
    model = model_class(config).from_pretrained(source, dtype=torch.float32).train(False)
    text = Text("rows", tuple(tuple(range(2 + i, 40 + i)) for i in range(rows)))
    return collect(Loaded(model, None, Source("t", "checkpoint", "float32", "")), text, folder)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def made(
    request: pytest.FixtureRequest, source: MakeSource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Statistics, Path]:
    src, at = source(request.param), tmp_path_factory.mktemp("outputs")
    stats = statistics(src, at / "stats")
    some = {"experts": {0, 2}} if request.param == "gpt_oss" else {}
    run(src, at / "dst", bound=ErrorBound(0.5, "rate", "expert"), method="calibrated",
        calibration=stats, **some)  # fmt: skip
    return src, stats, at / "dst"


def test_outputs_are_certified_and_computed_again(made: tuple[Path, Statistics, Path]) -> None:
    src, stats, dst = made
    report = verify(dst, against=src, calibration=stats)
    assert report.ok, report.problems
    assert report.calibration == str(stats.folder)
    assert report.outputs is not None
    assert report.outputs.largest is not None
    assert report.outputs.median is not None
    assert 0 < report.outputs.median <= report.outputs.largest < 1
    assert report.outputs.few_tokens + report.outputs.without_tokens <= report.outputs.n_experts
    assert verify(dst, calibration=stats.folder).ok
    plain = verify(dst, against=src)
    assert plain.ok
    assert plain.calibration is None
    settings = open_store(dst).settings
    assert settings.calibration is not None
    assert settings.calibration.of == stats.of
    for expert in open_store(dst).experts():
        for matrix in expert.matrices:
            outputs = matrix.record.certificate.outputs
            if expert.exact:
                assert outputs is None
                continue
            assert outputs is not None
            assert outputs.tokens == stats.tokens()[expert.key]
            assert outputs.error <= outputs.promised


@pytest.mark.slow
def test_no_figure_of_a_record_can_lie(made: tuple[Path, Statistics, Path], tmp_path: Path) -> None:
    """As `test_lies`: changed into another that could be true, and sealed again."""
    src, stats, there = made
    dst, original = Path(shutil.copytree(there, tmp_path / "dst")), open_checkpoint(src)
    records, believed = records_of(dst), []
    for number in one_of_a_kind(records):
        if records[number]["kind"] != "expert":
            continue
        for path, value in leaves(records[number]):
            for other in others(value, path):
                lied = json.loads(json.dumps(records))
                put(lied[number], path, other)
                seal(dst, lied)
                if verify(dst, against=original, calibration=stats, jobs=1).ok:
                    believed.append((path, value, other))
    assert believed == []


def test_methods_that_nobody_knows_are_said(
    made: tuple[Path, Statistics, Path], tmp_path: Path
) -> None:
    """And not raised from where the calibration is looked at."""
    dst = Path(shutil.copytree(made[2], tmp_path / "dst"))
    records = records_of(dst)
    for record in records:
        if record["kind"] == "expert":
            record["method"] = "calibratedx"
    seal(dst, records)
    found = verify(dst, jobs=1)
    assert not found.ok
    assert any("calibratedx" in str(problem) for problem in found.problems)


def test_what_is_seen_without_original_and_text(
    made: tuple[Path, Statistics, Path], tmp_path: Path
) -> None:
    src, stats, there = made
    dst = Path(shutil.copytree(there, tmp_path / "dst"))
    records = records_of(dst)
    number = next(i for i, r in enumerate(records) if r["kind"] == "expert" and not r["exact"])

    def seen(name: str, field: str, factor: float, **given: Any) -> bool:
        lied = json.loads(json.dumps(records))
        at = lied[number]["matrices"][0]["certificate"][name]
        at[field] = type(at[field])(at[field] * factor)
        seal(dst, lied)
        return not verify(dst, jobs=1, **given).ok

    for field in ("narrowest", "widest"):
        assert seen("columns", field, 0.9)  # the bytes say them
    assert seen("columns", "kept", 0.01)
    assert seen("columns", "kept", 0.999, against=src)
    assert seen("outputs", "tokens", 2)  # the expert's other matrices say them
    assert seen("outputs", "promised", 1e-6)  # below the error
    assert seen("outputs", "promised", 1.01, calibration=stats)
    for field in ("error", "power"):
        assert not seen("outputs", field, 0.99, against=src)
        assert seen("outputs", field, 0.99, against=src, calibration=stats)


def test_outputs_that_are_not_there(made: tuple[Path, Statistics, Path], tmp_path: Path) -> None:
    _, _, there = made
    dst = Path(shutil.copytree(there, tmp_path / "dst"))
    for name in ("columns", "outputs"):
        records = records_of(there)
        for record in records:
            for matrix in record.get("matrices", ()):
                matrix["certificate"].pop(name, None)
        seal(dst, records)
        assert not verify(dst, jobs=1).ok
    config = json.loads((dst / "config.json").read_text())
    del config["quantization_config"]["calibration"]
    (dst / "config.json").write_text(json.dumps(config))
    write_records(dst, records_of(there))
    assert any("outputs" in p.message for p in verify(dst, jobs=1).problems)


def test_statistics_of_another_text(
    made: tuple[Path, Statistics, Path], source: MakeSource, tmp_path: Path
) -> None:
    src, stats, dst = made
    name = "gpt_oss" if "gpt_oss" in str(src) else "mixtral"
    other = statistics(source(name), tmp_path / "other", rows=4)
    report = verify(dst, against=src, calibration=other)
    assert [p.kind for p in report.problems] == ["calibration"]
    assert "text_sha256" in report.problems[0].message
    assert report.calibration is None
    plain = tmp_path / "plain"
    run(src, plain)
    report = verify(plain, calibration=stats)
    assert ["was not made by statistics" in p.message for p in report.problems] == [True]
    missing = verify(dst, calibration=tmp_path / "none").problems
    assert ["no such folder" in p.message for p in missing] == [True]


def test_damaged_statistics(made: tuple[Path, Statistics, Path], tmp_path: Path) -> None:
    _, stats, dst = made
    folder = Path(shutil.copytree(stats.folder, tmp_path / "stats"))
    file = folder / stats.parts[0].file
    file.write_bytes(file.read_bytes()[:-100])
    problems = verify(dst, calibration=folder).problems
    assert {p.kind for p in problems} == {"calibration"}
    assert str(file) in problems[0].message


def test_the_card_says_it(made: tuple[Path, Statistics, Path], tmp_path: Path) -> None:
    _, stats, there = made
    dst = Path(shutil.copytree(there, tmp_path / "dst"))
    card = write_card(dst).read_text()
    assert stats.of.text_sha256 in card
    assert f"rows, 9 sequences, {stats.of.n_tokens} tokens" in card
    assert "experts that saw no token" in card
    assert "error of a matrix's outputs over their power, largest" in card
    assert "its outputs" not in (write_card(there).read_text())


def test_the_command_says_what_was_not_checked(
    made: tuple[Path, Statistics, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    src, stats, dst = made
    for options, wanted in (
        ([], "not checked: --calibration STATS"),
        (["--against", str(src)], "not checked: --calibration STATS"),
        (["--calibration", str(stats.folder)], "--against has the errors"),
        (["--against", str(src), "--calibration", str(stats.folder)], "computed again"),
    ):
        assert main(["verify", str(dst), *options]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert wanted in said


def test_an_expert_that_no_token_reached(source: MakeSource, tmp_path: Path) -> None:
    """It is rounded by its layer's moments, and counted."""
    from safetensors.numpy import load_file, save_file

    src = source("mixtral")
    stats = statistics(src, tmp_path / "stats")
    part = stats.parts[0]
    content = load_file(stats.folder / part.file)
    for array in content.values():
        array[0] = 0
    save_file(content, stats.folder / part.file)
    run(src, tmp_path / "dst", bound=ErrorBound(0.5, "rate", "expert"), method="calibrated",
        calibration=stats)  # fmt: skip
    report = verify(tmp_path / "dst", against=src, calibration=stats)
    assert report.ok, report.problems
    assert report.outputs is not None
    assert report.outputs.without_tokens == 1
    expert = open_store(tmp_path / "dst").expert(ExpertKey(part.layer, 0))
    columns = expert.matrices[0].record.certificate.columns
    assert columns is not None
    assert columns.narrowest < columns.widest  # not plain rounding
    assert "| experts that saw no token | 1 of" in (tmp_path / "dst" / "README.md").read_text()


def test_of_statistics_without_any_token(source: MakeSource, tmp_path: Path) -> None:
    """A layer that saw nothing is rounded plainly."""
    from safetensors.numpy import load_file, save_file

    src = source("mixtral")
    stats = statistics(src, tmp_path / "stats")
    for part in stats.parts:
        content = load_file(stats.folder / part.file)
        save_file({k: np.zeros_like(v) for k, v in content.items()}, stats.folder / part.file)
    of = dataclasses.replace(stats.of, n_tokens=stats.of.n_tokens)
    save_statistics(stats.folder, of, stats.parts)
    run(src, tmp_path / "dst", bound=ErrorBound(0.5, "rate", "expert"), method="calibrated",
        calibration=read_statistics(stats.folder))  # fmt: skip
    report = verify(tmp_path / "dst", against=src, calibration=stats)
    assert report.ok, report.problems
    assert report.outputs is not None
    assert report.outputs.largest is None
