"""A tiny model that reads the built-in word problems, and the studies of it that tests look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from moebound.jobs.workers import InProcess
from moebound.paper.study.measure import Measurer, Setup
from moebound.paper.study.suite import Entry, Suite
from moebound.wordmath.tokenizer import BOS, EOS, PAD, build_tokenizer, vocabulary

N_EXPERTS, LAYERS = 4, (1, 2, 3)
N_PROBLEMS = 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk: random weights, bfloat16, so that codecs meet what they meet in stores."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made = tmp_path_factory.mktemp("models") / "tiny"
    config = DeepseekV3Config(
        vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=48,
        moe_intermediate_size=16, num_hidden_layers=4, first_k_dense_replace=1,
        n_routed_experts=N_EXPERTS, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
        topk_group=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = DeepseekV3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(made)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer_class(
        tokenizer_object=build_tokenizer(), bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", unk_token="<unk>",
    ).save_pretrained(made)  # fmt: skip
    return made


@pytest.fixture(scope="session")
def setup(folder: Path) -> Setup:
    return Setup(str(folder), ("wordmath",), N_PROBLEMS, 3, threads=1)


@pytest.fixture(scope="session")
def measurer(setup: Setup) -> Measurer:
    """Shared: what it measures leaves no trace, which is tested too."""
    return setup.open()


@pytest.fixture
def workers(measurer: Measurer) -> Iterator[InProcess]:
    with InProcess(measurer) as found:
        yield found


ENTRIES = (
    Entry("6", "layer @0, all", "layer:@0", (0.8,), answers=False),
    Entry("3", "layer @0, most used", "most-used:@0", (0.3, 0.8)),
    Entry("7", "two layers", "group:@0-@1", (0.5,), n_seeds=1),
    Entry("3.2.1", "expert 0", "expert:@0:0", (), sources=("randomise",)),
)


@pytest.fixture(scope="session")
def suite() -> Suite:
    """A few conditions of each kind: 13 with the baseline."""
    sources = ("gaussian-sd", "codec:bound", "randomise")
    return small_suite(sources, n_seeds=2)


def small_suite(sources: tuple[str, ...], n_seeds: int) -> Suite:
    entries = [
        entry
        if entry.sources
        else Entry(**{**vars(entry), "sources": ("gaussian-sd", "codec:bound")})
        for entry in ENTRIES
    ]
    return Suite("small", lambda facts: entries, sources, n_seeds, N_PROBLEMS, 3)


Without = Callable[[dict[str, Any]], dict[str, Any]]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row but for how long it took."""
    return {name: value for name, value in row.items() if name != "seconds"}
