"""verify finds what is wrong, names it, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebound import codec
from moebound.checkpoint import open_checkpoint, read_header
from moebound.errors import StoreError
from moebound.store import Progress, open_store, verify
from moebound.types import ErrorBound

from .conftest import MakeSource, MakeStore, run
from .test_reader import CERTIFICATES, last_shard, reseal


def flip(file: Path, at: int) -> None:
    with open(file, "r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_good_store(name: str, shared_store: MakeStore) -> None:
    src, dst = shared_store(name)
    seen: list[Progress] = []
    alone = verify(dst, progress=seen.append)
    against = verify(dst, against=open_checkpoint(src), jobs=1)
    assert alone.ok
    assert against.ok
    assert against.worst is not None
    assert alone.worst == against.worst <= 1
    assert alone.n_experts == len(open_store(dst).experts())
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[-1].done_experts == seen[-1].total_experts == alone.n_experts
    assert json.loads(json.dumps(against.to_json()))["ok"] is True


def test_a_flipped_byte_in_any_tensor_is_found_and_named(own_store: MakeStore) -> None:
    _, dst = own_store()
    rng = np.random.default_rng(1)
    for shard in sorted(dst.glob("*.safetensors")):
        for tensor in read_header(shard)[0].values():
            if tensor.n_bytes:
                at = tensor.offset + int(rng.integers(tensor.n_bytes))
                flip(shard, at)
                report = verify(dst, jobs=1)
                assert not report.ok
                assert {problem.tensor for problem in report.problems} == {tensor.name}
                assert "hash" in {problem.kind for problem in report.problems}
                flip(shard, at)
    assert verify(dst).ok


def test_a_flipped_byte_anywhere_else_is_found(own_store: MakeStore) -> None:
    _, dst = own_store()
    rng = np.random.default_rng(2)
    for file in sorted(dst.iterdir()):
        if file.suffix == ".md":
            continue
        size = file.stat().st_size
        if file.suffix == ".safetensors":
            size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for at in {0, size - 1, *rng.integers(0, size, 20).tolist()}:
            flip(file, at)
            assert not verify(dst, jobs=1).ok, (file.name, at)
            flip(file, at)
    assert verify(dst).ok


def test_documents_may_be_edited(own_store: MakeStore) -> None:
    _, dst = own_store()
    (dst / "README.md").write_text("# a model card")
    (dst / "notes.md").write_text("new")
    assert verify(dst).ok
    (dst / "tokenizer.json").write_text("{}")
    report = verify(dst)
    assert [(p.kind, p.tensor) for p in report.problems] == [("file", "tokenizer.json")]


def test_all_problems_are_reported(own_store: MakeStore) -> None:
    _, dst = own_store()
    broken = []
    for expert in open_store(dst).experts()[::2]:
        tensor = expert.matrices[1].tensor
        flip(tensor.file, tensor.offset + tensor.n_bytes // 2)
        broken.append(tensor.name)
    report = verify(dst)
    assert sorted({p.tensor for p in report.problems}) == sorted(broken)
    assert {p.kind for p in report.problems} == {"hash", "decode"}
    assert "expected" in report.problems[0].message


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_store_that_does_not_open_is_a_problem(jobs: int, own_store: MakeStore) -> None:
    _, dst = own_store()
    shard = last_shard(dst)
    (dst / shard).unlink()
    report = verify(dst, jobs=jobs)
    assert [p.kind for p in report.problems] == ["store"]
    assert shard in report.problems[0].message
    with pytest.raises(StoreError, match="no such folder"):
        verify(dst / "nowhere")
    with pytest.raises(StoreError, match="moebound compress builtin:wordmath DST"):
        verify("builtin:wordmath")


def test_another_original(source: MakeSource, shared_store: MakeStore) -> None:
    _, dst = shared_store()
    report = verify(dst, against=open_checkpoint(source(seed=1)))
    assert {p.kind for p in report.problems} >= {"original", "bound"}
    assert report.worst is not None
    assert report.worst > 1
    wrong = verify(dst, against=open_checkpoint(source("mixtral")))
    assert {p.kind for p in wrong.problems} >= {"original"}


def _forge(dst: Path, change: Any) -> str:
    """Encode one matrix anew, wider than promised, and certify it as if it were not."""
    stored = open_store(dst).experts()[3]
    matrix = stored.matrices[0]
    array = matrix.decode(open_store(dst).read_expert(stored.key).matrix(0))
    certificate = matrix.record.certificate
    assert certificate.abs_bound is not None
    data = codec.encode(change(array), certificate.abs_bound, codec="raw")
    # Same length, so that the shard stays as it is otherwise.
    with open(matrix.tensor.file, "r+b") as handle:
        handle.seek(matrix.tensor.offset)
        handle.write(data)
    assert len(data) == matrix.tensor.n_bytes

    def certify(record: dict[str, Any]) -> None:
        for m in record.get("matrices", ()):
            if m["name"] == matrix.record.name:
                m["certificate"]["sha256_encoded"] = codec.certificate.sha256(data)

    reseal(dst / CERTIFICATES, certify)
    return matrix.tensor.name


def test_a_forged_certificate_is_measured_against_the_original(own_store: MakeStore) -> None:
    src, dst = own_store(codec="raw")
    name = _forge(dst, lambda array: (array.astype(np.float32) * 1.5).astype(array.dtype))
    # What is lossless has to decode to the original's hash, which is there without the original.
    assert {(p.kind, p.tensor) for p in verify(dst).problems} == {("certificate", name)}
    report = verify(dst, against=open_checkpoint(src))
    assert {p.tensor for p in report.problems} == {name}
    assert {p.kind for p in report.problems} == {"bound", "certificate"}
    assert report.worst is not None
    assert report.worst > 1


def test_a_bound_that_was_resolved_wrongly(own_store: MakeStore) -> None:
    src, dst = own_store()

    def other(record: dict[str, Any]) -> None:
        for m in record.get("matrices", ()):
            m["certificate"]["bound"] = ErrorBound(0.05, "rate", "expert").to_json()

    reseal(dst / CERTIFICATES, other)
    assert {p.kind for p in verify(dst).problems} == {"certificate"}  # config.json says another
    report = verify(dst, against=open_checkpoint(src))
    assert {p.kind for p in report.problems} == {"bound", "certificate"}


def test_a_certificate_that_convicts_itself(own_store: MakeStore) -> None:
    _, dst = own_store()

    def worse(record: dict[str, Any]) -> None:
        for m in record.get("matrices", ()):
            m["certificate"]["max_abs_error"] = 2 * m["certificate"]["abs_bound"]

    reseal(dst / CERTIFICATES, worse)
    assert {p.kind for p in verify(dst).problems} == {"certificate"}


def test_rmse_is_checked_as_an_average(source: MakeSource, tmp_path: Path) -> None:
    run(source(), tmp_path / "dst", bound=ErrorBound(0.05, "rmse"))
    alone = verify(tmp_path / "dst")
    against = verify(tmp_path / "dst", against=open_checkpoint(source()))
    assert alone.ok
    assert against.ok
    assert alone.worst == pytest.approx(against.worst)
