"""Tensors that are no routed expert's: coded, certified, checked, and decoded at every door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import AutoModelForCausalLM

import moebound
from moebound.checkpoint import ShardWriter, TensorSpec, open_checkpoint, read_header, read_tensor
from moebound.codec.arrays import to_numpy
from moebound.errors import BoundError, CorruptionError, MoeboundError
from moebound.store import Store, decoded_weights, decompress, open_store, verify
from moebound.store.format import certificates_bytes
from moebound.store.others import bound_of, encode_other
from moebound.types import NO_LOSS, NUMPY_DTYPES, ErrorBound
from quantized_models import plain_model, quantized
from tiny_models import SMALL, TINY, make_tiny, model_class, tiny_config

from .conftest import MakeSource, run
from .test_lies import leaves, others, put, records_of
from .test_reader import CERTIFICATES

FROZEN = Path(__file__).parent / "fixtures" / "v3"
RATE = 0.1
IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebound.store.others.LEAST_WEIGHTS", 64)


@pytest.fixture
def made(source: MakeSource, tmp_path: Path) -> tuple[Path, Path]:
    src, dst = source(), tmp_path / "dst"
    run(src, dst, others=RATE)
    return src, dst


def other_tensors(store: Store) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """What is no expert's, as engines get it."""
    others = {*store.kept, *store.coded}
    for name, tensor in decoded_weights(store):
        if name in others:
            yield name, to_numpy(tensor)


def names_and_arrays(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for name, tensor in open_checkpoint(folder).tensors.items():
        yield name, read_tensor(tensor)


@pytest.mark.parametrize("asked", ["lossless", RATE])
def test_what_engines_load(asked: Any, source: MakeSource, tmp_path: Path) -> None:
    """As `decompress` writes it, from coded tensors too."""
    run(source("deepseek_v3"), tmp_path / "dst", others=asked)
    store = open_store(tmp_path / "dst")
    assert store.coded
    decompress(tmp_path / "dst", tmp_path / "plain")
    expected = dict(names_and_arrays(tmp_path / "plain"))
    found = {name: to_numpy(tensor) for name, tensor in decoded_weights(store)}
    assert sorted(found) == sorted(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("asked", ["lossless", RATE])
def test_every_promise_is_kept(asked: Any, source: MakeSource, tmp_path: Path) -> None:
    src, dst = source("deepseek_v3", shard_size="40KB"), tmp_path / "dst"
    summary = run(src, dst, others=asked)
    store, before = open_store(dst), dict(names_and_arrays(src))
    assert store.settings.version == 3
    assert store.settings.others == asked
    assert store.coded
    assert not set(store.coded) & set(store.kept)
    assert summary.coded.n_tensors == len(store.coded)
    kept = run(src, tmp_path / "kept", others="keep")
    assert summary.model_bits_per_weight < kept.model_bits_per_weight
    for name, array in other_tensors(store):
        wanted = before[name]
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape
        exact = name in store.kept or bound_of(name, array.shape, asked) == NO_LOSS
        assert exact or asked == RATE
        if exact:
            assert array.tobytes() == wanted.tobytes(), name
        else:
            off = np.abs(array.astype(np.float64) - wanted.astype(np.float64)).max()
            assert 0 < off <= RATE * np.abs(wanted.astype(np.float64)).mean(), name
    of_experts = {m.tensor.name for e in store.experts() for m in e.matrices}
    assert {name for name, _ in other_tensors(store)} == store.tensors.keys() - of_experts
    report = verify(dst, against=src)
    assert report.ok, report.problems
    assert report.coded.n_tensors == len(store.coded)
    decompress(dst, tmp_path / "out")
    after = dict(names_and_arrays(tmp_path / "out"))
    assert after.keys() == before.keys()
    for name, array in other_tensors(store):
        assert after[name].tobytes() == array.tobytes()
    homes = {n: t.file.name for n, t in open_checkpoint(src).tensors.items()}
    assert {n: t.file.name for n, t in open_checkpoint(tmp_path / "out").tensors.items()} == homes


def test_routers_norms_and_biases_lose_nothing() -> None:
    for name in (
        "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.router.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.experts.down_proj_bias", "x.bias",
    ):  # fmt: skip
        assert bound_of(name, (64, 64), 0.1) == NO_LOSS, name
    assert bound_of("model.norm.weight", (4096,), 0.1) == NO_LOSS
    assert bound_of("visual.patch_embed.weight", (8, 3, 14, 14), 0.1) == NO_LOSS
    for name in ("model.layers.0.mlp.gate_proj.weight", "lm_head.weight", "a.q_proj.weight"):
        assert bound_of(name, (64, 64), 0.1) == ErrorBound(0.1, "rate"), name


@pytest.mark.parametrize("asked", ["lossless", RATE])
def test_a_quantized_source(asked: Any, tmp_path: Path) -> None:
    plain = plain_model("deepseek_v3", tmp_path / "plain")
    src = quantized(plain, tmp_path / "fp8", "fp8").folder
    run(src, tmp_path / "dst", others=asked)
    store, before = open_store(tmp_path / "dst"), open_checkpoint(src).tensors
    assert any("self_attn" in name for name in store.coded)
    for name, array in other_tensors(store):
        wanted = read_tensor(before[name])
        if name in store.kept or bound_of(name, array.shape, asked) == NO_LOSS:
            assert array.tobytes() == wanted.tobytes(), name
    report = verify(tmp_path / "dst", against=src)
    assert report.ok, report.problems


def test_what_is_not_used_is_not_written(source: MakeSource, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("moebound.store.others.LEAST_WEIGHTS", 1 << 30)
    found = []
    for name, asked in (("keep", "keep"), ("lossless", "lossless"), ("rate", 0.1)):
        run(source(), tmp_path / name, others=asked)
        found.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert found[0] == found[1] == found[2]
    assert open_store(tmp_path / "keep").settings.version == 2


def test_bytes_do_not_depend_on_jobs_and_interruptions(source: MakeSource, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    run(source(), tmp_path / "one", others=RATE, jobs=1)
    seen = []

    def stop(progress: Any) -> None:
        seen.append(progress)
        if len(seen) == 8:
            raise Stop

    with pytest.raises(Stop):
        run(source(), tmp_path / "two", others=RATE, jobs=3, progress=stop)
    assert run(source(), tmp_path / "two", others=RATE, jobs=3).resumed
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    with pytest.raises(MoeboundError, match="another store"):
        run(source(), tmp_path / "two", others="lossless", on_existing="resume")


@pytest.mark.parametrize("asked", ["none", -1.0, 0, float("nan"), True])
def test_what_is_no_setting(asked: Any, source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(BoundError):
        run(source(), tmp_path / "dst", others=asked)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_loads(name: str, tmp_path: Path) -> None:
    make_tiny(name, tmp_path / "src")
    run(tmp_path / "src", tmp_path / "dst", others=RATE, shard_bytes=1 << 30)
    decompress(tmp_path / "dst", tmp_path / "out")
    load = model_class(tiny_config(name)).from_pretrained
    one, other = (load(tmp_path / f, dtype="auto").state_dict() for f in ("dst", "out"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), other[key].view(-1).view(torch.uint8))


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_and_tied(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "tie_word_embeddings", tied)
    src = make_tiny("mixtral", tmp_path / "src")
    run(src, tmp_path / "dst", others=RATE)
    decompress(tmp_path / "dst", tmp_path / "out")
    assert ("lm_head.weight" in open_store(tmp_path / "dst").tensors) != tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted = plain(IDS).logits
        with moebound.load(tmp_path / "dst", dtype="float32") as offloaded:
            assert (offloaded.model(IDS).logits - wanted).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    asked=st.sampled_from(["lossless", 0.01, 0.5, 3.0]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_any_tensor(tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: Any,
                    asked: Any, scale: float, seed: int) -> None:  # fmt: skip
    array = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(NUMPY_DTYPES[dtype])
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    name = "a.q_proj.weight"
    with ShardWriter(file, [TensorSpec(name, dtype, tuple(shape))]) as out:
        out.write(name, array.reshape(-1).view("u1").data)
    record, data = encode_other(read_header(file)[0][name], asked)
    decoded = np.asarray(moebound.decode(data))
    assert decoded.shape == array.shape
    off = np.abs(decoded.astype(np.float64) - array.astype(np.float64)).max()
    mean = np.abs(array.astype(np.float64)).mean()
    lossy = not isinstance(asked, str) and len(shape) == 2 and min(shape) > 1
    assert off <= (asked * mean if lossy else 0)
    assert record.ratio is not None
    assert record.ratio <= 1


# Hostile stores.


def sealed(dst: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records]
    (dst / CERTIFICATES).write_bytes(b"".join(certificates_bytes(lines, version=3)))


def test_no_field_can_lie(made: tuple[Path, Path]) -> None:
    src, dst = made
    original, records, believed = open_checkpoint(src), records_of(dst), []
    coded = [i for i, r in enumerate(records) if r["kind"] == "coded"]
    lossy = [i for i in coded if records[i]["certificate"]["guarantee"] == "max_abs"]
    exact = [i for i in coded if i not in lossy]
    for number in (lossy[0], exact[0]):
        for path, value in leaves(records[number]):
            for other in others(value, path):
                lied = json.loads(json.dumps(records))
                put(lied[number], path, other)
                sealed(dst, lied)
                if verify(dst, against=original, jobs=1).ok:
                    believed.append((path, value, other))
    assert believed == []


def test_records_and_bytes_that_change_places(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, dst = made
    records = records_of(dst)
    by_name = {r["name"]: r for r in records if r["kind"] == "coded"}
    one, other = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    by_name[one]["name"], by_name[other]["name"] = other, one
    sealed(dst, records)
    assert not verify(dst).ok
    with pytest.raises(MoeboundError, match="o_proj"):
        decompress(dst, tmp_path / "out")
    with pytest.raises(MoeboundError, match="o_proj"):
        AutoModelForCausalLM.from_pretrained(dst)
    with pytest.raises(MoeboundError, match="o_proj"):
        list(other_tensors(open_store(dst)))
    by_name[one]["name"], by_name[other]["name"] = one, other
    wrong = {**by_name[one], "name": "model.layers.1.mlp.experts.0.up_proj.weight"}
    for lied in ([*records, wrong], [*records, by_name[one]], records[1:]):
        sealed(dst, lied)
        with pytest.raises(CorruptionError):
            open_store(dst)


def test_an_expert_is_not_taken_for_another_tensor(made: tuple[Path, Path]) -> None:
    _, dst = made
    records = records_of(dst)
    number = next(i for i, r in enumerate(records) if r["kind"] == "expert")
    expert = records.pop(number)
    for matrix in expert["matrices"]:
        records.append({"kind": "coded", **{k: matrix[k] for k in ("name", "home", "ratio",
                                                                  "certificate")}})  # fmt: skip
    sealed(dst, records)
    with pytest.raises(CorruptionError, match="named as a routed expert"):
        open_store(dst)


def test_an_earlier_version_has_none(made: tuple[Path, Path]) -> None:
    _, dst = made
    records = records_of(dst)
    lines = [json.dumps(r).encode() + b"\n" for r in records]
    (dst / CERTIFICATES).write_bytes(b"".join(certificates_bytes(lines, version=2)))
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (dst / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptionError, match="version 2 has no coded tensors"):
        open_store(dst)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_bytes(damage: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    _, dst = made
    tensor = next(iter(open_store(dst).coded.values())).tensor
    data = bytearray(tensor.file.read_bytes())
    if damage == "flip":
        data[tensor.offset + tensor.n_bytes // 2] ^= 4
    tensor.file.write_bytes(data[: len(data) - 5 * (damage == "cut")])
    assert not verify(dst).ok
    for door in (lambda: decompress(dst, tmp_path / "out"),
                 lambda: AutoModelForCausalLM.from_pretrained(dst),
                 lambda: moebound.load(dst),
                 lambda: list(other_tensors(open_store(dst)))):  # fmt: skip
        with pytest.raises(MoeboundError):
            door()


# Frozen stores.


@pytest.mark.parametrize("name", ["lossless", "rate"])
def test_version_3_is_read_for_ever(name: str, tmp_path: Path) -> None:
    says = json.loads((FROZEN / f"{name}.expected.json").read_bytes())
    found = {f.name: sha256(f.read_bytes()).hexdigest() for f in (FROZEN / name).iterdir()}
    assert found == says["files"]
    schema = Path(__file__).parents[2] / "docs" / "schemas" / "certificates.schema.json"
    check = Draft202012Validator(json.loads(schema.read_bytes()))
    for line in (FROZEN / name / CERTIFICATES).read_bytes().splitlines():
        assert check.is_valid(json.loads(line)), line
    store = open_store(FROZEN / name)
    assert store.settings.to_json() == {k: v for k, v in says["settings"].items() if v is not None}
    assert verify(FROZEN / name).ok

    def of(array: Any) -> dict[str, Any]:
        digest = sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}

    decoded = {key: of(array) for key, array in other_tensors(store)}
    assert {key: decoded[key] for key in store.coded} == says["coded"]
    assert {key: decoded[key] for key in store.kept} == says["kept"]
    decompress(FROZEN / name, tmp_path / "out")
    assert {k: of(a) for k, a in names_and_arrays(tmp_path / "out")} == says["decompressed"]
