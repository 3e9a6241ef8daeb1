"""A model that says what it is told: for texts that the built-in model's words cannot write."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch


class ScriptedModel:
    """After any prompt, these tokens. Its config names no positions, and it has no cache."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    generation_config = None

    def __init__(self, tokens: list[int], vocabulary: int) -> None:
        self._tokens, self._vocabulary = tokens, vocabulary
        self._n_prompt = 0

    def begin(self) -> None:
        self._n_prompt = 0

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(self._vocabulary, 1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        length = input_ids.shape[1]
        self._n_prompt = self._n_prompt or length
        scores = torch.zeros(1, length, self._vocabulary)
        scores[0, -1, self._tokens[length - self._n_prompt]] = 1e4  # at any temperature
        return SimpleNamespace(logits=scores)

    __call__ = forward


@dataclass
class ScriptedEngine:
    """begun, closed: how often it was told so."""

    model: ScriptedModel
    tokenizer: Any
    begun: int = 0
    closed: int = 0
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "scripted"})

    @classmethod
    def saying(cls, text: str, tokenizer: Any) -> ScriptedEngine:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        script = [*tokens, tokenizer.eos_token_id]
        return cls(ScriptedModel(script, len(tokenizer)), tokenizer)

    def begin_sequence(self) -> None:
        self.begun += 1
        self.model.begin()

    def stats(self) -> dict[str, Any]:
        return self.about

    def close(self) -> None:
        self.closed += 1
