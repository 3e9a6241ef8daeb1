"""llama.cpp as a peer: the file it reads, and what it computes from it."""

from __future__ import annotations

import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from moebound.bench.offload import OffloadSettings, run
from moebound.bench.offload.gguf_file import write_gguf
from moebound.bench.offload.gguf_quantized import gguf_sizes, quantize_gguf
from moebound.bench.offload.launch import launch
from moebound.bench.offload.model import Shapes, make_checkpoint
from moebound.bench.offload.settings import LlamaFile
from moebound.bench.offload.subjects import LlamaCpp
from moebound.bench.offload.table import render_offload
from moebound.errors import MethodError, MoeboundError, UnsupportedArchitectureError

SHAPES = Shapes(layers=1, experts=4, hidden=64, intermediate=32, top_k=2, vocab=96)
PROMPT, TEXT = 12, 32


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gguf") / "raw", SHAPES)


@pytest.fixture(scope="module")
def f32(bf16: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)
    model.save_pretrained(bf16.with_name("raw32"))
    return bf16.with_name("raw32")


def logits_of_both(source: Path, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, vocab] from the last one of the prompt on: llama.cpp's, and transformers' in float32
    of the same weights."""
    ids = np.random.default_rng(1).integers(0, SHAPES.vocab, TEXT).tolist()
    subject = LlamaCpp({"source": str(file), "prompt": PROMPT, "warm": 0, "tokens": 20,
                        "options": {}}, None)  # fmt: skip
    found = []
    for tokens in (ids[:PROMPT], *([token] for token in ids[PROMPT:])):
        total = subject.step(tokens)
        found.append(subject.logits())
        assert total == pytest.approx(float(found[-1].astype(np.float64).sum()))
    subject.begin(0)  # another text begins: nothing is left of the one before
    subject.step(ids[:PROMPT])
    assert np.array_equal(subject.logits(), found[0])
    subject.close()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, PROMPT - 1 :]
    return np.stack(found), expected.numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-3), ("bf16", 1e-2)])
@pytest.mark.slow
def test_llama_cpp_computes_what_transformers_does(
    dtype: str, tolerance: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its bf16 products round their inputs too."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    source: Path = request.getfixturevalue(dtype)
    found, expected = logits_of_both(source, write_gguf(source, tmp_path / "model.gguf"))
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert np.array_equal(found.argmax(1), expected.argmax(1))


@pytest.mark.slow
def test_a_file_has_every_weight_once(bf16: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = write_gguf(bf16, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(file)
    model = AutoModelForCausalLM.from_pretrained(bf16)
    written = sum(int(tensor.n_elements) for tensor in reader.tensors)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    in_buffers = dict(model.named_buffers())[bias].numel()
    assert written == sum(p.numel() for p in model.parameters()) + in_buffers
    experts = {t.name: t for t in reader.tensors}["blk.1.ffn_down_exps.weight"]
    assert experts.shape.tolist() == [SHAPES.intermediate, SHAPES.hidden, SHAPES.experts]
    third = model.model.layers[1].mlp.experts.down_proj[2].view(torch.uint8)
    assert np.array_equal(experts.data[2].reshape(-1), third.numpy().reshape(-1))
    made = file.stat().st_mtime_ns
    assert write_gguf(bf16, file).stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("option", "value"), [("q_lora_rank", 16), ("n_group", 2), ("rope_interleave", False)]
)
@pytest.mark.slow
def test_models_that_are_not_written(option: str, value: object, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    options: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    config = DeepseekV3Config(**{**options, option: value})
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedArchitectureError, match=f"expected {option} .*found {value!r}"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_without_llama_cpp_its_run_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = OffloadSettings(
        shapes=replace(SHAPES, hidden=64), tiers=(), peers=("llama.cpp",), tokens=2
    )
    (row,) = run(settings, tmp_path).rows
    assert (row["name"], row["routing"]) == ("llama.cpp, own routing", "own")
    assert "llama.cpp needs llama-cpp-python and gguf: pip install" in row["error"]
    assert not (tmp_path / "raw.gguf").exists()


@pytest.mark.parametrize(("how", "policy"), [("llama.cpp", None), ("offloaded", "PASSIVE")])
def test_its_threads_wait_as_they_are_meant_to(
    how: str, policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(options["env"])
        return subprocess.CompletedProcess(command, 0, stdout="{}", stderr="")

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(subprocess, "run", start)
    assert launch({"how": how, "source": "nothing"}, tmp_path, timeout_s=1) == {}
    assert [environment.get("OMP_WAIT_POLICY") for environment in seen] == [policy]
    assert all("PATH" in environment for environment in seen)


@pytest.mark.slow
def test_a_run_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    settings = OffloadSettings(
        shapes=SHAPES,
        tiers=(),
        peers=("stock", "llama.cpp"),
        routing=("own",),
        prompt=8,
        warm=2,
        tokens=4,
    )
    stock, llama = run(settings, tmp_path).rows
    assert "error" not in llama
    assert len(llama["tpot_s"]) == 4
    assert llama["threads"] == stock["threads"]
    assert llama["logits_sum"] == pytest.approx(stock["logits_sum"], abs=0.2)


BLOCKS = Shapes(layers=1, experts=4, hidden=256, intermediate=384, top_k=2, vocab=96)
"""Rows of `gate` and `up` are one block of 256 weights; those of `down` are none."""


@pytest.mark.parametrize(
    ("peer", "file"),
    [
        ("llama.cpp", LlamaFile()),
        ("llama.cpp:q4_k_m", LlamaFile("q4_k_m")),
        ("llama.cpp:mapped", LlamaFile(mapped=True)),
        ("llama.cpp:iq4_xs:mapped", LlamaFile("iq4_xs", mapped=True)),
    ],
)
def test_files_of_llama_cpp_by_name(peer: str, file: LlamaFile) -> None:
    assert OffloadSettings(peers=("stock", peer)).llama_files == (file,)
    assert file.name == peer.replace(":", " ")


@pytest.mark.parametrize(
    "peer", ["llama.cpp:", "llama.cpp:int4", "llama.cpp:mapped:q2_k", "stock:q4_k_m", "ollama:q2_k"]
)
def test_files_that_llama_cpp_has_not(peer: str) -> None:
    with pytest.raises(MoeboundError, match=r"peers: expected some of stock, .*found \['"):
        OffloadSettings(peers=(peer,))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_runs_of_files_of_fewer_bits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    settings = OffloadSettings(
        shapes=BLOCKS, budgets=(1.0,), tiers=("disk",), routing=("own",), prompt=8,
        warm=2, tokens=4, peers=("llama.cpp:q4_k_m", "llama.cpp:q4_k_m:mapped", "llama.cpp:iq1_s"),
    )  # fmt: skip
    report = run(settings, tmp_path)
    raw, ours, four, mapped, one = report.rows
    assert (raw["expert_bits"], one["name"]) == (16, "llama.cpp iq1_s, own routing")
    assert "llama.cpp's quantizer to iq1_s ended with" in one["error"]  # without importance matrix
    n_weights = BLOCKS.experts * BLOCKS.expert_weights
    for row in (four, mapped):
        assert "error" not in row
        assert row["logits_sum"] == pytest.approx(raw["logits_sum"], abs=1)
        assert len(row["expert_types"]) == 2  # what `down` falls back to
        assert 8 * sum(row["expert_types"].values()) / n_weights == row["expert_bits"]
        assert 4.5 < row["expert_bits"] < 8
    assert ours["expert_bits"] == 8 * report.expert_bytes["compressed"] / n_weights
    made = sorted(file.name for file in tmp_path.glob("*.gguf*"))
    assert made == ["raw-q4_k_m.gguf"]  # what it was made from is gone
    assert four["file_bytes"] == (tmp_path / made[0]).stat().st_size
    console = Console(width=200, file=io.StringIO())
    console.print(render_offload(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{four['expert_bits']:.2f}" in shown
    assert f"{ours['expert_bits']:.2f}" in shown


@pytest.mark.slow
def test_a_file_of_fewer_bits_is_made_once(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    raw = make_checkpoint(tmp_path / "raw", BLOCKS)
    plain = write_gguf(raw, tmp_path / "raw.gguf")
    assert gguf_sizes(plain).expert_bits == 16
    file = quantize_gguf(plain, tmp_path / "raw-q8_0.gguf", "q8_0")
    made, sizes = file.stat().st_mtime_ns, gguf_sizes(file)
    assert (sizes.expert_bits, set(sizes.expert_types)) == (8.5, {"Q8_0"})
    assert quantize_gguf(plain, file, "q8_0").stat().st_mtime_ns == made
    with pytest.raises(MethodError, match="has no file type 'q9_0'"):
        quantize_gguf(plain, tmp_path / "raw-q9_0.gguf", "q9_0")
    assert len(list(tmp_path.glob("*.gguf*"))) == 2


def test_a_mapped_file_is_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """llama.cpp is asked not to copy tensors into another order."""
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    defaults = llama_cpp.llama_cpp.llama_model_default_params
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", defaults)
    plain = write_gguf(make_checkpoint(tmp_path / "raw", SHAPES), tmp_path / "raw.gguf")
    for mapped in (False, True):
        spec = {"source": str(plain), "prompt": 4, "warm": 0, "tokens": 4,
                "options": {"mapped": mapped}}  # fmt: skip
        subject = LlamaCpp(spec, None)
        assert subject._model.model_params.use_extra_bufts is not mapped
        subject.close()
