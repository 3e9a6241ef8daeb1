"""Opening a store, one read per expert, and stores that contradict themselves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from moebound import decode
from moebound.checkpoint import open_checkpoint
from moebound.codec.certificate import sha256
from moebound.errors import CheckpointError, CorruptionError, FormatError, MoeboundError, StoreError
from moebound.store import compressed_tensors, open_store
from moebound.store.format import certificates_bytes
from moebound.types import Array, ExpertKey

from .conftest import MakeStore

CERTIFICATES = "moebound.certificates.jsonl"
INDEX = "model.safetensors.index.json"


def last_shard(dst: Path) -> str:
    return max(file.name for file in dst.glob("*.safetensors"))


def reseal(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the records of a certificates file, and seal it again."""
    lines = []
    for line in file.read_bytes().splitlines()[1:-1]:
        record = json.loads(line)
        if change(record) is not False:
            lines.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    file.write_bytes(b"".join(certificates_bytes(lines)))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_one_read_fetches_an_expert(
    name: str, shared_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = shared_store(name)
    store, reads = open_store(dst), []
    really = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for expert in open_checkpoint(src).experts():
        reads.clear()
        encoded = store.read_expert(expert.key)
        assert len(reads) == 1
        assert len(encoded.data) == encoded.stored.n_bytes
        for index, matrix in enumerate(encoded.stored.matrices):
            assert sha256(encoded.matrix(index)) == matrix.record.certificate.sha256_encoded


def test_decoded_experts_are_the_tensors_that_stock_safetensors_reads(
    shared_store: MakeStore,
) -> None:
    _, dst = shared_store("gpt_oss")
    store = open_store(dst)
    for stored in store.experts():
        weights = store.decode_expert(stored.key)
        for matrix in stored.matrices:
            with safe_open(matrix.tensor.file, "np") as stock:
                array = decode(stock.get_tensor(matrix.tensor.name).tobytes())
            assert isinstance(array, np.ndarray)
            found: Array = weights[matrix.record.role]
            assert found.tobytes() == array.tobytes()
            assert found.shape == matrix.record.certificate.shape


def test_keys(shared_store: MakeStore) -> None:
    store = open_store(shared_store()[1])
    assert store.expert(ExpertKey(1, 3)).key == ExpertKey(1, 3)
    with pytest.raises(KeyError):
        store.read_expert(ExpertKey(0, 0))


def test_compressed_tensors_are_found_in_shards_alone(shared_store: MakeStore) -> None:
    for name in ("deepseek_v3", "gpt_oss"):
        _, dst = shared_store(name)
        store = open_store(dst)
        found = {t.name for t in compressed_tensors(sorted(dst.glob("*.safetensors")))}
        assert found == set(store.tensors) - set(store.kept)


@pytest.mark.parametrize("shard", ["../{0}", "/tmp/{0}", "sub/{0}", "..", "C:\\{0}", ""])
def test_no_path_in_the_index_leads_outside(shard: str, own_store: MakeStore) -> None:
    _, dst = own_store()
    name = last_shard(dst)
    os.replace(dst / name, dst.parent / name)
    index = json.loads((dst / INDEX).read_text())
    index["weight_map"] = {
        k: shard.format(name) if v == name else v for k, v in index["weight_map"].items()
    }
    (dst / INDEX).write_text(json.dumps(index))
    with pytest.raises((CorruptionError, CheckpointError), match="name of a file beside"):
        open_store(dst)


@pytest.mark.parametrize("field", ["name", "home"])
def test_no_path_in_a_record_leads_outside(field: str, own_store: MakeStore) -> None:
    _, dst = own_store()

    def change(record: dict[str, Any]) -> None:
        if record["kind"] == "file" and field == "name":
            record["name"] = "../secret"
        if record["kind"] == "expert" and field == "home":
            record["matrices"][0]["home"] = "../../out.safetensors"

    reseal(dst / CERTIFICATES, change)
    with pytest.raises(CorruptionError, match="not a plain file name"):
        open_store(dst)


def _first_expert(record: dict[str, Any]) -> Any:
    return record["kind"] == "expert" and (record["layer"], record["expert"]) == (1, 0)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an expert without record": (lambda r: not _first_expert(r), "has no record"),
    "a tensor without record": (
        lambda r: r.get("name") != "model.norm.weight",
        r"'model.norm.weight' has no record",
    ),
    "a record without tensor": (
        lambda r: _first_expert(r) and r["matrices"][0].update(name="nowhere"),
        "'nowhere' is in no shard",
    ),
    "wrong size": (
        lambda r: _first_expert(r) and r["matrices"][0]["certificate"].update(n_bytes=7),
        "expected 7 bytes",
    ),
    "other order": (
        lambda r: _first_expert(r) and r["matrices"].reverse(),
        "does not stand right behind",
    ),
    "no matrices": (lambda r: _first_expert(r) and r["matrices"].clear(), "without matrices"),
    "negative layer": (lambda r: _first_expert(r) and r.update(layer=-1), "whole number from 0"),
    "unknown kind": (lambda r: _first_expert(r) and r.update(kind="code"), "code"),
    "unknown field": (
        lambda r: _first_expert(r) and r["matrices"][0]["certificate"].update(run="x"),
        "TypeError",
    ),
    "unknown role": (
        lambda r: _first_expert(r) and r["matrices"][0].update(role="router"),
        "role 'router'",
    ),
    "bad bound": (
        lambda r: (
            _first_expert(r)
            and r["matrices"][0]["certificate"].update(bound={"mode": "abs", "value": -1})
        ),
        "bound",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions(what: str, own_store: MakeStore) -> None:
    change, message = CONTRADICTIONS[what]
    _, dst = own_store()

    def and_keep(record: dict[str, Any]) -> Any:
        return not (change(record) is False and "without record" in what)

    reseal(dst / CERTIFICATES, and_keep)
    with pytest.raises(CorruptionError, match=message):
        open_store(dst)


def test_certificates_are_sealed(own_store: MakeStore) -> None:
    _, dst = own_store()
    file = dst / CERTIFICATES
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with pytest.raises((CorruptionError, FormatError), match=r"moebound\.certificates"):
            open_store(dst)
    for cut in (0, 1, 70, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(CorruptionError):
            open_store(dst)


def test_newer_versions_are_refused(own_store: MakeStore) -> None:
    _, dst = own_store()
    whole = (dst / CERTIFICATES).read_bytes()
    head, rest = whole.split(b"\n", 1)
    head = head.replace(b'"version":2', b'"version":4')
    (dst / CERTIFICATES).write_bytes(head + b"\n" + rest)
    with pytest.raises(FormatError, match="version 4"):
        open_store(dst)
    (dst / CERTIFICATES).write_bytes(whole)
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["version"] = 4
    (dst / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="store version 4"):
        open_store(dst)


def test_missing_things(own_store: MakeStore, tmp_path: Path) -> None:
    src, dst = own_store()
    with pytest.raises(StoreError, match="no such folder"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no quantization_config of moebound"):
        open_store(src)
    for name in (CERTIFICATES, last_shard(dst), "config.json"):
        data = (dst / name).read_bytes()
        (dst / name).unlink()
        with pytest.raises(MoeboundError, match=name):
            open_store(dst)
        (dst / name).write_bytes(data)
    open_store(dst)


def test_seal_is_a_plain_sha256(shared_store: MakeStore) -> None:
    lines = (shared_store()[1] / CERTIFICATES).read_bytes().splitlines(keepends=True)
    end = json.loads(lines[-1])
    assert end["lines"] == len(lines) - 1
    assert end["sha256"] == hashlib.sha256(b"".join(lines[:-1])).hexdigest()
