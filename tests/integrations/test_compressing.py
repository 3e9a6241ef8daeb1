"""from_pretrained(checkpoint, quantization_config=MoeboundConfig(...)): compressed on loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moebound
from moebound import ErrorBound, MoeboundConfig
from moebound.errors import BoundError, MethodError, UnsupportedArchitectureError
from moebound.model.live import live_experts
from moebound.store import compress
from tiny_models import make_tiny, model_class, tiny_config

RATE = ErrorBound(0.3, "rate", "expert")


def load(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    return model_class(tiny_config(name)).from_pretrained(folder, dtype="auto", **options)


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# One tensor an expert on disk: the very weights of a store.
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "nemotron_h"])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MoeboundConfig(rate=0.3), {"bound": RATE}),
        (MoeboundConfig(bound=ErrorBound(0.01)), {"bound": ErrorBound(0.01)}),
        (MoeboundConfig(rate=0.3, codec="cuszp"), {"bound": RATE, "codec": "cuszp"}),
        (MoeboundConfig(method="rtn:int4:g32"), {"method": "rtn:int4:g32"}),
    ],
    ids=["rate", "abs", "codec", "rtn"],
)
def test_the_weights_are_those_of_a_store(
    name: str, config: MoeboundConfig, options: dict[str, Any], tmp_path: Path
) -> None:
    src = make_tiny(name, tmp_path / "src")
    compress(src, tmp_path / "store", **options)
    loaded = load(name, src, quantization_config=config)
    assert same(loaded, load(name, tmp_path / "store"))
    assert not same(loaded, load(name, src))


# Experts in one tensor, interleaved or the other way round, or in a module of another kind.
@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "llama4", "jetmoe", "qwen3_vl_moe"])
def test_every_weight_keeps_the_bound_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    src = make_tiny(name, tmp_path / "src")
    before = load(name, src)
    after = load(name, src, quantization_config=MoeboundConfig(rate=0.3))
    changed = set()
    for key, expert in live_experts(before).items():
        matrices = {role: m.double() for role, m in expert.matrices.items()}
        count = sum(m.numel() for m in matrices.values())
        bound = 0.3 * sum(float(m.abs().sum()) for m in matrices.values()) / count
        for role, matrix in live_experts(after)[key].matrices.items():
            error = float((matrix.double() - matrices[role]).abs().max())
            assert 0 < error <= bound * (1 + 1e-9)
        changed |= {
            f"{expert.stack.name}.{place.parameter}" for place in expert.stack.places.values()
        }
    after_state = after.state_dict()
    for parameter, tensor in before.state_dict().items():
        assert (parameter in changed) != torch.equal(tensor, after_state[parameter]), parameter


def test_an_ordinary_model_that_saves_as_one(tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    model = load("mixtral", src, quantization_config=MoeboundConfig(rate=0.3))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    assert same(model, load("mixtral", tmp_path / "saved"))
    again = moebound.open_checkpoint(tmp_path / "saved")  # no store: it can be compressed
    assert len(again.experts()) == len(live_experts(model))


def test_a_json_config(tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    config = MoeboundConfig(rate=0.3)
    assert config.to_dict()["bound"] == {"mode": "rate", "value": 0.3, "scope": "expert"}
    a = load("mixtral", src, quantization_config=config)
    b = load("mixtral", src, quantization_config=MoeboundConfig(**config.to_dict()))
    assert same(a, b)


def test_a_store_is_not_compressed_again(tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    compress(src, tmp_path / "store", bound=RATE)
    with pytest.raises(ValueError, match="with MoeboundStoreConfig but you are passing a Moebound"):
        load("mixtral", tmp_path / "store", quantization_config=MoeboundConfig(rate=0.1))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedArchitectureError, match="dense"):
        LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=MoeboundConfig(rate=0.3)
        )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, MethodError, "needs a bound: give MoeboundConfig"),
        ({"rate": -1}, BoundError, "finite number above 0"),
        ({"rate": 0.3, "bound": RATE}, MethodError, "rate and bound: expected one"),
        ({"rate": 0.3, "method": "rtn:int4:g64"}, MethodError, "knows no bound"),
        ({"rate": 0.3, "method": "bounded:bound", "codec": "raw"}, MethodError, "one of them"),
        ({"method": "nothing"}, MethodError, "nothing"),
        ({"method": "reap_re:keep6+rtn:int4:g64"}, MethodError, "while loading: write a store"),
        ({"rate": 0.3, "method": "calibrated"}, MethodError, "needs statistics, which is not"),
        ({"rate": 0.3, "bits": 4}, MethodError, "unknown options bits; expected rate, bound"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        MoeboundConfig(**options)
