"""A real vLLM answers with stores: the same tokens and logprobs, bit for bit, as with what
`moebound decompress` makes of them, and near those of `moebound.load`.

MOEBOUND_VLLM names the Python of an environment with vLLM that runs here and moebound
(docs/engines.md says how one without a GPU is made). Without one, nothing is tried. What is
installed there is what is tested: `pip install --no-deps .` there again after a change here.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import moebound
import tiny_models
from moebound import ErrorBound
from moebound.store import compress, decompress
from moebound.wordmath.builtin import resolve
from tiny_models import Tiny, make_tiny

PYTHON = os.environ.get("MOEBOUND_VLLM")
"""Not resolved: an environment's Python is a link, which tells Python where the packages are."""
PROGRAM = Path(__file__).with_name("answer.py")
RATE = ErrorBound(0.3, "rate", "expert")
PROMPTS = [list(range(5, 25)), [7, 8, 9, 30]]
TOKENS = 12

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        PYTHON is None,
        reason="no vLLM: docs/engines.md says how to set one up; name its Python in MOEBOUND_VLLM",
    ),
]

# Widths that vLLM's kernels of a CPU take: heads of 32, of 576 with latent attention.
WIDE = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
LATENT = WIDE | {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "qk_head_dim": 96,
    "v_head_dim": 32, "head_dim": 64,
}  # fmt: skip
# What published DeepSeek-V3 configs say, and transformers' own class does not.
BIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (WIDE, {"bound": RATE}),
    "qwen3_moe": (WIDE, {"bound": RATE, "others": "lossless"}),
    "olmoe": (WIDE, {"bound": RATE, "others": 0.05}),
    "granitemoe": (WIDE, {"bound": RATE}),
    "gpt_oss": (WIDE, {"bound": RATE, "others": "lossless"}),
    "deepseek_v3": (LATENT | BIASED, {"bound": RATE, "shared_experts": True}),
}
"""By family: what its config says, how it is compressed."""


def options(model: Path, load_format: str, **more: Any) -> dict[str, Any]:
    """Of vllm.LLM."""
    return {
        "model": str(model), "load_format": load_format, "enforce_eager": True, "max_num_seqs": 4,
        "max_model_len": 128, "gpu_memory_utilization": 0.2, "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
    } | more  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    } | more  # fmt: skip


def ask(folder: Path, asked: list[dict[str, Any]], **more: str) -> list[Any]:
    """What answer.py answers. more: of the environment."""
    ran = run(folder, asked, **more)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-6000:]
    answers: list[Any] = json.loads((folder / "answers.json").read_text("utf-8"))
    return answers


def run(folder: Path, asked: list[dict[str, Any]], **more: str) -> subprocess.CompletedProcess[str]:
    jobs = [{"options": of, "prompts": PROMPTS, "tokens": TOKENS} for of in asked]
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    return subprocess.run(
        [os.path.abspath(str(PYTHON)), str(PROGRAM), "jobs.json", "answers.json"],
        cwd=folder, env=environment(**{"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | more),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def ours(store: Path, answers: list[Any]) -> list[list[float]]:
    """The logprobs of moebound.load for the tokens of prompts, but their first, and answers."""
    found = []
    with moebound.load(store) as loaded, torch.no_grad():
        for prompt, of in zip(PROMPTS, answers, strict=True):
            ids = torch.tensor([[*prompt, *of["tokens"]]])
            logits = loaded.model(ids).logits[0, :-1].double()
            said = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            found.append(said.tolist())
    return found


def chosen(of: dict[str, Any]) -> list[float]:
    steps = zip(of["tokens"], of["logprobs"], strict=True)
    return [*of["prompt"], *(dict(step)[token] for token, step in steps)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """By family: its store, what vLLM answers with it, and with what `decompress` makes of it. One
    process for all, because vLLM takes longest to start."""
    folder = tmp_path_factory.mktemp("answers")
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        for name, (config, how) in MODELS.items():
            wide = Tiny(tiny_models.TINY[name].overrides | config)
            patched.setitem(tiny_models.TINY, name, wide)
            place = folder / name
            compress(make_tiny(name, place / "src"), place / "store", **how)
            decompress(place / "store", place / "plain")
            asked += [options(place / "store", "moebound"), options(place / "plain", "auto")]
    made = ask(folder, asked)
    return {
        name: (folder / name / "store", store, plain)
        for name, store, plain in zip(MODELS, made[::2], made[1::2], strict=True)
    }


@pytest.mark.parametrize("name", [*MODELS])
def test_answers_are_those_of_the_decompressed_checkpoint(
    name: str, answers: dict[str, tuple[Path, Any, Any]]
) -> None:
    _, store, plain = answers[name]
    assert store == plain


@pytest.mark.parametrize("name", [*MODELS])
def test_answers_are_near_ours(name: str, answers: dict[str, tuple[Path, Any, Any]]) -> None:
    place, store, _ = answers[name]
    for theirs, loaded in zip(store, ours(place, store), strict=True):
        assert chosen(theirs) == pytest.approx(loaded, abs=0.05)


def test_two_processes_answer_with_the_built_in_model(tmp_path: Path) -> None:
    """Tensor parallelism, as a server has it; a trained model, whose likeliest tokens are ours."""
    store, plain = tmp_path / "store", tmp_path / "plain"
    compress(resolve("builtin:wordmath-mixtral"), store, bound=RATE, others="lossless")
    decompress(store, plain)
    both = [
        options(model, load_format, tensor_parallel_size=2, distributed_executor_backend="mp")
        for model, load_format in ((store, "moebound"), (plain, "auto"))
    ]
    # Two processes on however few cores there are.
    with_store, with_plain = ask(
        tmp_path, both, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    assert with_store == with_plain
    for theirs, loaded in zip(with_store, ours(store, with_store), strict=True):
        assert chosen(theirs) == pytest.approx(loaded, abs=0.2)


def test_a_store_without_its_load_format_is_refused(tmp_path: Path) -> None:
    compress(make_tiny("mixtral", tmp_path / "src"), tmp_path / "store", bound=RATE)
    ran = run(tmp_path, [options(tmp_path / "store", "auto")])
    assert ran.returncode != 0
    assert "which vLLM loads with --load-format moebound" in ran.stdout + ran.stderr
