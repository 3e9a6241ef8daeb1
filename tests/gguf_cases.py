"""Tiny models of the architectures that are read from GGUF, and files that llama.cpp's own
conversion made of them (`tests/checkpoint/fixtures/gguf`, compressed).

    python tests/gguf_cases.py LLAMA.CPP [CASE ...]

writes these files again. LLAMA.CPP is a checkout, or the vendor/llama.cpp of a source distribution
of llama-cpp-python. Weights are whole numbers of 64ths, so that files are small when compressed;
norms, biases and all else that llama.cpp changes is random, too.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PreTrainedModel

import tiny_models
from tiny_models import TINY, Tiny, model_class, tiny_config

FIXTURES = Path(__file__).parent / "checkpoint" / "fixtures" / "gguf"
CONVERT = Path(__file__).parent / "gguf_convert.py"


@dataclass(frozen=True)
class Case:
    """family: of `tiny_models`. overrides: of its config. hub: what configs on the hub say besides
    those that transformers writes, and llama.cpp's conversion reads."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)


_MLA = {"num_key_value_heads": 4, "num_hidden_layers": 2}
_SIGMOID = {"scoring_func": "sigmoid"}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
         "original_max_position_embeddings": 32}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
_GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}

CASES = {
    "deepseek_v2": Case("deepseek_v2", _MLA, {"scoring_func": "softmax"}),
    "deepseek_v2_yarn": Case(
        "deepseek_v2",
        {**_MLA, "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {"scoring_func": "softmax"},
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        {**_MLA, **_GROUPS, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0,
                                                "beta_fast": 16.0, "beta_slow": 2.0}},
        _SIGMOID,
    ),
    "moonlight": Case("deepseek_v3", {**_MLA, "q_lora_rank": None}, _SIGMOID),
    "glm4_moe_lite": Case(
        "glm4_moe_lite", {"num_key_value_heads": 4}, {**_SIGMOID, "first_k_dense_replace": 1}
    ),
    "gpt_oss": Case(
        "gpt_oss", {"rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0,
                                        "truncate": False}},
    ),
    "olmoe": Case("olmoe", {"num_key_value_heads": 4}),
    "glm4_moe": Case("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    "dots1": Case(
        "dots1", {"n_shared_experts": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
                  "num_hidden_layers": 3, "num_key_value_heads": 4}, _SIGMOID,
    ),
    "exaone_moe": Case(
        "exaone_moe",
        {"num_hidden_layers": 4, "mlp_layer_types": None, "layer_types": None, "head_dim": 16,
         "first_k_dense_replace": 1, "num_shared_experts": 1, "sliding_window": 16,
         "sliding_window_pattern": 4, "routed_scaling_factor": 2.5}, _SIGMOID,
    ),
    "qwen3_next": Case("qwen3_next", {"head_dim": 16}),
    "qwen3_5_moe": Case(
        "qwen3_5_moe_text",
        {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0,
                                             "partial_rotary_factor": 0.25,
                                             "mrope_section": [2, 1, 1]}},
    ),
    "granitemoe": Case(
        "granitemoe", {"attention_multiplier": 0.25, "embedding_multiplier": 3.0,
                       "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granitemoeshared": Case("granitemoeshared"),
    "phimoe": Case(
        "phimoe",
        {"attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 128,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                             "short_factor": [1.0, 1.25, 1.5, 2.0],
                             "long_factor": [1.0, 2.0, 4.0, 8.0],
                             "short_mscale": 1.1832159566199232,
                             "long_mscale": 1.1832159566199232,
                             "original_max_position_embeddings": 32}},
        {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 32},
    ),
    "ernie4_5_moe": Case("ernie4_5_moe"),
    "hunyuan_v1_moe": Case(
        "hunyuan_v1_moe", {},
        {"moe_intermediate_size": [48, 48], "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    ),
    "minimax_m2": Case(
        "minimax_m2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                             "partial_rotary_factor": 0.5}},
        {**_SIGMOID, "rotary_dim": 4},
    ),
    "llama4": Case(
        "llama4_text",
        {"num_hidden_layers": 4, "layer_types": None, "interleave_moe_layer_step": 2,
         "moe_layers": None, "head_dim": 16, "rope_parameters": _LLAMA3},
    ),
    "mixtral": Case("mixtral", {"head_dim": 16, "rope_parameters": _LLAMA3}),
    "mixtral_linear": Case(
        "mixtral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0,
                                        "factor": 4.0}},
    ),
    "qwen2_moe": Case("qwen2_moe"),
    "qwen3_moe": Case("qwen3_moe", {"norm_topk_prob": True, "rope_parameters": _YARN}),
}  # fmt: skip


def make(name: str, folder: Path) -> PreTrainedModel:
    """The model of a case, saved to `folder` as on the hub. Biases and norms are random too."""
    case = CASES[name]
    tiny = TINY[case.family]
    small = {"vocab_size": 64, **tiny.overrides, **case.overrides}
    with _Entry(case.family, Tiny(small, tiny.parts)):
        config = tiny_config(case.family)
    model: PreTrainedModel = model_class(config)._from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.bfloat16
    )
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            drawn = torch.randint(-7, 8, value.shape, generator=generator) / 64
            if value.dim() == 1 and "norm" in key:
                drawn = drawn + 1
            value.copy_(drawn)
    model.save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | case.hub))
    model.train(False)
    return model


class _Entry:
    """`tiny_models.TINY` with another entry, for as long as a config is made."""

    def __init__(self, family: str, tiny: Tiny) -> None:
        self.family, self.tiny, self.was = family, tiny, TINY[family]

    def __enter__(self) -> None:
        tiny_models.TINY[self.family] = self.tiny

    def __exit__(self, *_: object) -> None:
        tiny_models.TINY[self.family] = self.was


def make_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """GPT-OSS with experts in MXFP4, as it is published. Returns what transformers dequantizes."""
    from quantized_models import quantized

    CASES["gpt_oss_mxfp4"] = Case("gpt_oss", {"intermediate_size": 32, "num_hidden_layers": 1})
    plain = folder.with_name("plain")
    make("gpt_oss_mxfp4", plain)
    del CASES["gpt_oss_mxfp4"]
    return quantized(plain, folder, "mxfp4").truth


def recorded(name: str, file: Path) -> Path:
    """The file that llama.cpp's conversion made of a case, written to `file`."""
    file.write_bytes(lzma.decompress((FIXTURES / f"{name}.gguf.xz").read_bytes()))
    return file


def convert(llama_cpp: Path, pairs: list[tuple[Path, Path]], kind: str = "bf16") -> None:
    """Run llama.cpp's conversion: folder -> file."""
    flat = [str(path) for pair in pairs for path in pair]
    command = [sys.executable, str(CONVERT), str(llama_cpp), kind, *flat]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def main(llama_cpp: str, *names: str) -> None:
    """Write the recorded files."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = []
        for name in names or (*CASES, "gpt_oss_mxfp4"):
            if name == "gpt_oss_mxfp4":
                make_mxfp4(Path(scratch) / name)
            else:
                make(name, Path(scratch) / name)
            pairs.append((Path(scratch) / name, Path(scratch) / f"{name}.gguf"))
        convert(Path(llama_cpp), pairs)
        for _, file in pairs:
            data = lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
            (FIXTURES / f"{file.name}.xz").write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
