"""What compress writes: a checkpoint that stock tools open, the same bytes however it ran."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from moebound.checkpoint import open_checkpoint, read_header
from moebound.codec import codec_ids
from moebound.errors import CheckpointError, CodecError, StoreError
from moebound.store import Progress, open_store, verify
from moebound.types import ErrorBound, ExpertKey

from .conftest import RATE, MakeSource, MakeStore, contents, run

# Per-expert tensors; fused; fused and transposed with biases; 3-D below other names.
FAMILIES = ("deepseek_v3", "mixtral", "gpt_oss", "llama4", "granitemoe", "nemotron_h")


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_safetensors_opens_every_shard(name: str, shared_store: MakeStore) -> None:
    src, dst = shared_store(name)
    index = json.loads((dst / "model.safetensors.index.json").read_text())["weight_map"]
    seen = {}
    for shard in sorted(dst.glob("*.safetensors")):
        with safe_open(shard, "pt") as stock:
            for key in stock.keys():  # noqa: SIM118
                seen[key] = shard.name
                assert stock.get_tensor(key).dtype is not None
    assert seen == index
    # Every original name is still there, if only as a stand-in.
    assert set(open_checkpoint(src).tensors) <= set(index)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_experts_matrices_stand_together(name: str, shared_store: MakeStore) -> None:
    src, dst = shared_store(name)
    store = open_store(dst)
    experts = open_checkpoint(src).experts()
    assert [e.key for e in store.experts()] == [e.key for e in experts]
    where = {t.name: t for f in dst.glob("*.safetensors") for t in read_header(f)[0].values()}
    ends: dict[Path, int] = defaultdict(int)
    for expert in experts:
        stored = [
            where[m.name if m.index is None else f"{m.name}.moebound.{m.index}"]
            for m in expert.matrices
        ]
        assert len({t.file for t in stored}) == 1
        for before, after in pairwise(stored):
            assert before.offset + before.n_bytes == after.offset
        # ... and the experts of a shard, in the order of the model.
        assert stored[0].offset >= ends[stored[0].file]
        ends[stored[0].file] = stored[-1].offset + stored[-1].n_bytes


def test_kept_tensors_are_the_same_bytes(shared_store: MakeStore) -> None:
    src, dst = shared_store()
    before, store = open_checkpoint(src), open_store(dst)
    kept = {tensor.name for tensor in before.passthrough()}
    assert set(store.kept) == kept
    for name in kept:
        a, b = before.tensors[name], store.tensors[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        with open(a.file, "rb") as x, open(b.file, "rb") as y:
            x.seek(a.offset)
            y.seek(b.offset)
            assert x.read(a.n_bytes) == y.read(b.n_bytes)


def test_config_and_other_files(shared_store: MakeStore) -> None:
    src, dst = shared_store()
    before = json.loads((src / "config.json").read_text())
    after = json.loads((dst / "config.json").read_text())
    settings = after.pop("quantization_config")
    assert after == before
    assert settings["quant_method"] == "moebound"
    assert (settings["version"], settings["method"]) == (2, "bounded:bound")
    assert ErrorBound.from_json(settings["bound"]) == RATE
    for name in ("tokenizer.json", "generation_config.json"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()
    # A store has a card of its own, and keeps the source's.
    assert (dst / "README.original.md").read_bytes() == (src / "README.md").read_bytes()
    assert "moebound" in (dst / "README.md").read_text()
    assert not [f.name for f in dst.iterdir() if "partial" in f.name or "journal" in f.name]


@pytest.mark.parametrize("codec", ["bound", "raw"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_jobs_do_not_change_a_byte(
    name: str, codec: str, source: MakeSource, tmp_path: Path
) -> None:
    for jobs in (1, 2, 5):
        run(source(name), tmp_path / str(jobs), jobs=jobs, codec=codec)
    one = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == one
    assert contents(tmp_path / "5") == one


@pytest.mark.parametrize("codec", codec_ids())
def test_every_codec_keeps_the_bound(codec: str, source: MakeSource, tmp_path: Path) -> None:
    summary = run(source(), tmp_path / "dst", codec=codec)
    report = verify(tmp_path / "dst", against=open_checkpoint(source()))
    assert report.ok
    assert report.worst == pytest.approx(summary.worst)
    assert summary.worst is not None
    assert summary.worst <= 1


@pytest.mark.parametrize(
    "bound",
    [
        ErrorBound(0.001),
        ErrorBound(0.2, "rate", "expert"),
        ErrorBound(0.2, "rate", "matrix"),
        ErrorBound(0.01, "range"),
        ErrorBound(0.05, "rmse"),
    ],
    ids=str,
)
def test_every_way_to_state_a_bound(bound: ErrorBound, source: MakeSource, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source())
    summary = run(source(), tmp_path / "dst", bound=bound)
    assert verify(tmp_path / "dst", against=checkpoint).ok
    assert summary.worst is not None
    assert 0.2 < summary.worst <= 1
    store = open_store(tmp_path / "dst")
    for expert, stored in zip(checkpoint.experts(), store.experts(), strict=True):
        arrays = [checkpoint.read(m).astype(np.float64) for m in expert.matrices]
        mean = sum(np.abs(a).sum() for a in arrays) / sum(a.size for a in arrays)
        decoded = store.decode_expert(expert.key)
        for array, matrix in zip(arrays, stored.matrices, strict=True):
            error = np.abs(decoded[matrix.record.role].astype(np.float64) - array)
            if bound.mode == "rmse":
                found, asked = np.sqrt((error**2).mean()), 0.05 * np.sqrt((array**2).mean())
            else:
                found = error.max()
                asked = {
                    "abs": 0.001,
                    "rate": 0.2 * (mean if bound.scope == "expert" else np.abs(array).mean()),
                    "range": 0.01 * np.ptp(array),
                }[bound.mode]
            assert found <= asked * (1 + 1e-12)


def test_summary_counts_real_bytes(source: MakeSource, tmp_path: Path) -> None:
    src, dst = source(), tmp_path / "dst"
    summary, checkpoint = run(src, dst), open_checkpoint(src)
    store = open_store(dst)
    experts = checkpoint.experts()
    assert summary.n_experts == len(experts)
    assert summary.n_weights == sum(e.size for e in experts)
    assert summary.expert_bytes_before == sum(e.n_bytes for e in experts)
    assert summary.expert_bytes_after == sum(e.n_bytes for e in store.experts())
    assert summary.model_bytes_before == checkpoint.total_bytes
    assert summary.model_bytes_after == sum(t.n_bytes for t in store.tensors.values())
    assert summary.store_bytes == sum(f.stat().st_size for f in dst.iterdir())
    assert summary.expert_bits_per_weight < 16
    whole = (
        8 * summary.model_bytes_after / sum(np.prod(t.shape) for t in checkpoint.tensors.values())
    )
    assert summary.model_bits_per_weight == pytest.approx(float(whole))
    as_json = json.loads(json.dumps(summary.to_json()))
    assert as_json["bound"] == RATE.to_json()
    assert as_json["expert_bits_per_weight"] == summary.expert_bits_per_weight


def test_progress_ends_at_the_total(source: MakeSource, tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(source(), tmp_path / "dst", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == open_checkpoint(source()).total_bytes
    assert seen[-1].done_experts == seen[-1].total_experts == 8
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)


def test_shared_experts_are_an_option(source: MakeSource, tmp_path: Path) -> None:
    run(source(), tmp_path / "without")
    run(source(), tmp_path / "with", shared_experts=True)
    without, with_them = open_store(tmp_path / "without"), open_store(tmp_path / "with")
    extra = {e.key for e in with_them.experts()} - {e.key for e in without.experts()}
    assert extra == {ExpertKey(1, 0, True), ExpertKey(2, 0, True)}
    assert any("shared" in name for name in without.kept)
    assert not any("shared" in name for name in with_them.kept)
    assert verify(tmp_path / "with", against=open_checkpoint(source())).ok


def test_selected_layers_and_experts(source: MakeSource, tmp_path: Path) -> None:
    run(source(), tmp_path / "dst", layers={2}, experts={0, 3})
    store = open_store(tmp_path / "dst")
    assert [e.key for e in store.experts()] == [ExpertKey(2, 0), ExpertKey(2, 3)]
    assert "model.layers.2.mlp.experts.1.up_proj.weight" in store.kept
    assert verify(tmp_path / "dst", against=open_checkpoint(source())).ok


def test_unselected_slices_of_a_fused_tensor_stay_exact(source: MakeSource, tmp_path: Path) -> None:
    src = source("gpt_oss")
    summary = run(src, tmp_path / "dst", layers={1}, experts={2})
    store, checkpoint = open_store(tmp_path / "dst"), open_checkpoint(src)
    assert [(e.key, e.exact) for e in store.experts()] == [
        (ExpertKey(1, e), e != 2) for e in range(4)
    ]
    assert "model.layers.0.mlp.experts.gate_up_proj" in store.kept
    assert summary.n_experts == 1
    for expert in checkpoint.experts():
        if expert.key.layer == 1 and expert.key.expert != 2:
            for matrix in expert.matrices:
                decoded = store.decode_expert(expert.key)[matrix.role]
                assert decoded.tobytes() == checkpoint.read(matrix).tobytes()
    assert verify(tmp_path / "dst", against=checkpoint).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {1, 7}}, r"--layers: 7 asked; experts are in 1, 2"),
        ({"experts": {9}}, r"--experts: 9 asked; experts are in 0, 1, 2, 3"),
        ({"layers": set()}, r"--layers: nothing asked"),
        ({"jobs": 0}, r"jobs 0"),
    ],
)
def test_bad_options(
    options: dict[str, object], message: str, source: MakeSource, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=message):
        run(source(), tmp_path / "dst", **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_codec_before_any_work(source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="nosuch"):
        run(source(), tmp_path / "dst", codec="nosuch")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_no_source(shared_store: MakeStore) -> None:
    with pytest.raises(CheckpointError, match="already compressed"):
        open_checkpoint(shared_store()[1])


def test_an_error_names_file_and_tensor(
    source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise CodecError("no such luck")

    monkeypatch.setattr("moebound.methods.bounded.encode_certified", broken)
    with pytest.raises(CodecError, match=r"model\.safetensors: tensor '.*experts.0.*no such luck"):
        run(source(), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
