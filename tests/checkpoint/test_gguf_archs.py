"""Files of every architecture that llama.cpp's own conversion made: the model, bit for bit.

With llama-cpp-python, llama.cpp computes the same of them. With a checkout of llama.cpp in the
environment variable LLAMA_CPP, its conversion still makes the recorded files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import gguf_cases
import moebound
from gguf_cases import CASES, recorded
from gguf_models import Values, rewrite
from moebound.checkpoint import Checkpoint, open_checkpoint, read_tensor
from moebound.codec.arrays import to_torch
from moebound.errors import CheckpointError, CorruptionError, UnsupportedArchitectureError
from moebound.model.pretrained import load_model
from moebound.store import compress
from moebound.types import ErrorBound

pytest.importorskip("gguf")

IDS = torch.arange(3, 43)[None] * 7 % 64


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits[0]
    return found


def bits(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: to_torch(read_tensor(one)) for name, one in checkpoint.tensors.items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_it_was_made_of(case: str, tmp_path: Path) -> None:
    model: Any = gguf_cases.make(case, tmp_path / "model")
    model.float()
    file = recorded(case, tmp_path / "m.gguf")
    same(bits(open_checkpoint(file)), load_file(tmp_path / "model" / "model.safetensors"))
    assert torch.equal(logits(load_model(str(file), dtype=torch.float32)), logits(model))


UNLIKE = {
    "moonlight": "llama.cpp takes queries without a low rank of 26, 27 and 48 layers only",
    "phimoe": "llama.cpp has RMS norms and a plain softmax there, the model neither",
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if case in UNLIKE:
        pytest.skip(UNLIKE[case])
    file = rewrite(recorded(case, tmp_path / "m.gguf"), tmp_path / "f32.gguf")
    engine = llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # keys and values in float32
    engine.eval(IDS[0].tolist())
    wanted = torch.from_numpy(engine.scores[: IDS.shape[1]].copy())
    found = logits(load_model(str(file), dtype=torch.float32))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_llama_cpps_conversion_makes_these_files(tmp_path: Path) -> None:
    root = os.environ.get("LLAMA_CPP")
    if not root:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    import gguf

    pairs = [(tmp_path / case, tmp_path / f"{case}.gguf") for case in CASES]
    for folder, _ in pairs:
        gguf_cases.make(folder.name, folder)
    gguf_cases.convert(Path(root), pairs)
    for folder, file in pairs:
        new = gguf.GGUFReader(file)
        old = gguf.GGUFReader(recorded(folder.name, tmp_path / "old.gguf"))
        assert {k: f.contents() for k, f in new.fields.items() if not k.startswith("GGUF.")} == {
            k: f.contents() for k, f in old.fields.items() if not k.startswith("GGUF.")
        }
        for one, other in zip(new.tensors, old.tensors, strict=True):
            assert one.name == other.name
            assert np.array_equal(one.data, other.data), one.name


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """As llama.cpp repacks what is published: what transformers dequantizes."""
    truth = gguf_cases.make_mxfp4(tmp_path / "model")
    checkpoint = open_checkpoint(recorded("gpt_oss_mxfp4", tmp_path / "m.gguf"))
    assert "MXFP4 of 3 tensors" in str(checkpoint.stored_as)
    same(bits(checkpoint), truth)


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4"])
@pytest.mark.parametrize(
    "case", ["deepseek_v3", "qwen3_5_moe", "gpt_oss", "llama4", "granitemoe", "phimoe"]
)
def test_quantized_experts_are_what_gguf_dequantizes(case: str, kind: str, tmp_path: Path) -> None:
    plain = recorded(case, tmp_path / "m.gguf")
    packed = rewrite(plain, tmp_path / "packed.gguf", kind=kind)
    checkpoint = open_checkpoint(packed)
    assert kind in str(checkpoint.stored_as)
    # The same values in float32, which the tests above know to be read.
    same(bits(checkpoint), bits(open_checkpoint(rewrite(packed, tmp_path / "f32.gguf"))))


def test_keys_and_values_of_older_files(tmp_path: Path) -> None:
    """Before llama.cpp split `kv_b_proj`."""
    new = recorded("deepseek_v3", tmp_path / "m.gguf")

    def joined(values: Values) -> Values:
        for layer in range(2):
            keys = values.pop(f"blk.{layer}.attn_k_b.weight").swapaxes(1, 2)
            both = np.concatenate([keys, values.pop(f"blk.{layer}.attn_v_b.weight")], axis=1)
            values[f"blk.{layer}.attn_kv_b.weight"] = both.reshape(-1, both.shape[-1])
        return values

    at = "deepseek2.attention."
    keys = {f"{at}key_length_mla": None, f"{at}value_length_mla": None, f"{at}key_length": 16,
            f"{at}value_length": 8, f"{at}head_count_kv": 4}  # fmt: skip
    old = rewrite(new, tmp_path / "old.gguf", keys=keys, change=joined)
    assert open_checkpoint(old).config == open_checkpoint(new).config
    same(bits(open_checkpoint(old)), bits(open_checkpoint(new)))


def test_gate_and_up_in_one_tensor(tmp_path: Path) -> None:
    """As `convert_hf_to_gguf.py --fuse-gate-up-exps` has them."""
    apart = recorded("qwen3_5_moe", tmp_path / "m.gguf")

    def fused(values: Values) -> Values:
        for layer in range(2):
            both = [values.pop(f"blk.{layer}.ffn_{one}_exps.weight") for one in ("gate", "up")]
            values[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(both, axis=1)
        return values

    file = rewrite(apart, tmp_path / "fused.gguf", change=fused, kind="Q8_0")
    plain = rewrite(apart, tmp_path / "apart.gguf", kind="Q8_0")
    same(bits(open_checkpoint(file)), bits(open_checkpoint(plain)))


def test_layers_that_predict_several_tokens_are_left_out(tmp_path: Path) -> None:
    plain = recorded("glm4_moe", tmp_path / "m.gguf")

    def longer(values: Values) -> Values:
        last = {name.replace("blk.1.", "blk.2."): one for name, one in values.items()
                if name.startswith("blk.1.")}  # fmt: skip
        return values | last | {"blk.2.nextn.eh_proj.weight": np.zeros((32, 64), np.float32)}

    keys = {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    file = rewrite(plain, tmp_path / "long.gguf", keys=keys, change=longer)
    found = open_checkpoint(file)
    same(bits(found), bits(open_checkpoint(plain)))
    assert "of layers that predict several tokens are left out" in str(found.stored_as)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("deepseek_v3", "deepseek2.rope.scaling.yarn_log_multiplier"),
        ("deepseek_v3", "deepseek2.rope.scaling.original_context_length"),
        ("deepseek_v3", "deepseek2.attention.kv_lora_rank"),
        ("gpt_oss", "gpt-oss.attention.sliding_window"),
        ("gpt_oss", "gpt-oss.expert_used_count"),
        ("qwen3_next", "qwen3next.ssm.state_size"),
        ("mixtral", "llama.attention.layer_norm_rms_epsilon"),
        ("granitemoeshared", "granitemoe.block_count"),
    ],
)
def test_a_key_that_is_missing_is_named(case: str, key: str, tmp_path: Path) -> None:
    plain = recorded(case, tmp_path / "m.gguf")
    file = rewrite(plain, tmp_path / "less.gguf", keys={key: None})
    with pytest.raises(CheckpointError, match=f"no {key}"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("case", "key", "value", "said"),
    [
        ("olmoe", "olmoe.rope.scaling.type", "dynamic", "scaled as 'dynamic'"),
        ("qwen3_moe", "qwen3moe.attention.sliding_window", 64, "a sliding window of 64"),
        ("qwen3_moe", "qwen3moe.rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor"),
        ("minimax_m2", "minimax-m2.expert_gating_func", 1, "expert_gating_func 1"),
        ("deepseek_v2", "deepseek2.expert_weights_norm", True, "expert_weights_norm"),
        ("llama4", "llama4.attention.sliding_window", 0, "full attention in all layers"),
    ],
)
def test_what_no_config_could_say(
    case: str, key: str, value: Any, said: str, tmp_path: Path
) -> None:
    plain = recorded(case, tmp_path / "m.gguf")
    file = rewrite(plain, tmp_path / "other.gguf", keys={key: value})
    with pytest.raises(UnsupportedArchitectureError, match=said):
        open_checkpoint(file)


def test_an_architecture_that_is_not_read_is_named_beside_those_that_are(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "dbrx")
    writer.add_expert_count(16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'dbrx' is not read; supported: .*dots1"
    ):
        open_checkpoint(tmp_path / "m.gguf")


def test_frequencies_that_are_not_llama_3s(tmp_path: Path) -> None:
    def other(values: Values) -> Values:
        return values | {"rope_freqs.weight": np.linspace(3, 1, 8, dtype=np.float32)}

    plain = recorded("mixtral", tmp_path / "m.gguf")
    with pytest.raises(UnsupportedArchitectureError, match="rope_freqs"):
        open_checkpoint(rewrite(plain, tmp_path / "other.gguf", change=other))


def test_shapes_are_those_of_the_metadata(tmp_path: Path) -> None:
    plain = recorded("deepseek_v3", tmp_path / "m.gguf")
    # The last makes no model at all.
    for key, value in (
        ("expert_count", 4),
        ("attention.kv_lora_rank", 8),
        ("attention.head_count", 0),
    ):
        file = rewrite(plain, tmp_path / "other.gguf", keys={f"deepseek2.{key}": value})
        with pytest.raises(CorruptionError):
            open_checkpoint(file)


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss_mxfp4", "granitemoe"])
def test_a_file_runs_offloaded_as_it_is(case: str, tmp_path: Path) -> None:
    file = recorded(case, tmp_path / "m.gguf")
    model = load_model(str(file), dtype=torch.float32)
    with moebound.load(file, dtype="float32") as offloaded, torch.no_grad():
        assert (offloaded.model(IDS).logits - model(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_a_store_of_it_runs_offloaded(case: str, tmp_path: Path) -> None:
    file = recorded(case, tmp_path / "m.gguf")
    compress(file, tmp_path / "store", bound=ErrorBound(0.3, "rate"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "store", dtype=torch.float32)
    with moebound.load(tmp_path / "store", dtype="float32") as offloaded, torch.no_grad():
        assert (offloaded.model(IDS).logits - model(IDS).logits).abs().max() < 1e-5
