"""The sample prompts with their reference solutions, tokenized into one padded batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROMPTS_FILE = "sample_prompts.jsonl"


@dataclass(frozen=True)
class Sample:
    """One prompt, and a solution that was not made by the model."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class Batch:
    """All samples as prompt + solution + end, padded on the right. B samples, T tokens.

    input_ids, attention_mask: [B, T]. Position t of a row predicts token t + 1, so the masks below
    are [B, T - 1]: `predicts` are the positions whose next token is there (not padding), `answers`
    those of them whose next token belongs to the solution or is its end.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts: torch.Tensor
    answers: torch.Tensor


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
    rows = [p + s + [tokenizer.eos_token_id] for p, s in zip(prompts, solutions, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    answers = torch.zeros((len(rows), length - 1), dtype=torch.bool)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
        answers[index, len(prompt) - 1 : len(row) - 1] = True
    return Batch(input_ids, attention_mask, attention_mask[:, 1:].bool(), answers)
