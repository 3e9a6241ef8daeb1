"""Load a checkpoint or a store with plain transformers, and let it answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moebound.demo.prompts import Sample
from moebound.runtime.quiet import without_bars

NEW_TOKENS = 48
"""Longer than every solution in the sample."""


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Padded on the right, position t of every row is its t-th token; answering pads on the left.
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path) -> Any:
    """In float32: the bf16 weights are exact in it, so no other rounding is measured than ours."""
    from transformers import AutoModelForCausalLM

    from moebound.runtime import register

    register()
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    model.train(False)
    return model


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, samples: list[Sample]) -> list[str]:
    """Greedy decoding, one answer a sample."""
    encoded = tokenizer(
        [sample.prompt for sample in samples],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    tokens = model.generate(**encoded, max_new_tokens=NEW_TOKENS, do_sample=False)
    return [
        str(tokenizer.decode(row, skip_special_tokens=True)).strip()
        for row in tokens[:, encoded["input_ids"].shape[1] :]
    ]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of 2,048 weights gain nothing from a second thread, and on a busy machine the
    threads of torch wait for one another many times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
