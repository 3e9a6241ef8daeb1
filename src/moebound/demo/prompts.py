"""The sample prompts with their reference solutions, tokenized into one padded batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.evaluate.text import Batch, pad

__all__ = ["Batch", "Sample", "make_batch", "read_samples"]

PROMPTS_FILE = "sample_prompts.jsonl"


@dataclass(frozen=True)
class Sample:
    """One prompt, and a solution that was not made by the model."""

    prompt: str
    reference: str


def read_samples(folder: Path) -> list[Sample]:
    lines = (folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return [Sample(row["prompt"], row["reference"]) for row in rows]


def make_batch(samples: list[Sample], tokenizer: Any) -> Batch:
    """Tokenize. The tokenizer closes a prompt with its own mark; a solution ends with eos."""
    prompts = tokenizer([sample.prompt for sample in samples])["input_ids"]
    solutions = tokenizer([sample.reference for sample in samples], add_special_tokens=False)[
        "input_ids"
    ]
    ends = [tokenizer.eos_token_id]
    rows = [(p, s + ends) for p, s in zip(prompts, solutions, strict=True)]
    return pad(rows, tokenizer.pad_token_id)
