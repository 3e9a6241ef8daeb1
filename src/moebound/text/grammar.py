"""Texts that are JSON, and of one schema: only tokens that it allows are ever taken.

What is allowed comes from llguidance, which reads a vocabulary once and a schema for each text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch

from moebound.errors import MoeboundError
from moebound.extras import need

ANY_OBJECT = '{"type": "object"}'
_VOCABULARIES: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


class Grammar:
    """What one text may be. schema: JSON Schema, as text. vocabulary: tokens that the model has.
    ends: those of them that end a text.

    Raises BackendUnavailable without llguidance, and MoeboundError for a schema that it cannot
    carry out or a tokenizer that it cannot read.
    """

    def __init__(
        self, tokenizer: Any, schema: str, *, vocabulary: int, ends: Collection[int]
    ) -> None:
        library = need("llguidance", "JSON by a schema")
        words = _vocabulary(tokenizer, vocabulary, ends)
        grammar = library.LLMatcher.grammar_from_json_schema(schema)
        if wrong := library.LLMatcher.validate_grammar(grammar, words):
            raise MoeboundError(f"the JSON schema cannot be carried out: {_said(wrong)}")
        self._matcher = library.LLMatcher(words, grammar)
        self._numpy = need("llguidance.numpy", "JSON by a schema")
        self._mask = self._numpy.allocate_token_bitmask(1, words.vocab_size)

    def allowed(self, scores: torch.Tensor) -> torch.Tensor:
        """scores: [vocabulary]. Returns them with minus infinity for what must not come next.
        Raises MoeboundError where nothing may."""
        self._numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        bits = torch.from_numpy(self._mask[0].copy()).view(torch.uint8)
        places = torch.arange(8, dtype=torch.uint8)
        mask = ((bits[:, None] >> places) & 1).bool().flatten()[: len(scores)]
        if len(mask) < len(scores):
            mask = torch.nn.functional.pad(mask, (0, len(scores) - len(mask)))
        if self._matcher.is_error() or not mask.any():
            said = self._matcher.get_error()
            reason = f": {_said(said)}" if said else ""
            raise MoeboundError(
                f"no token of this model's vocabulary can go on with the JSON{reason}"
            )
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))

    def add(self, token: int) -> bool:
        """A token that was taken. Returns whether the text is complete, and nothing may follow."""
        if not self._matcher.consume_token(token):
            raise MoeboundError(f"JSON: {_said(self._matcher.get_error())}")
        return bool(self._matcher.is_stopped())


def _vocabulary(tokenizer: Any, vocabulary: int, ends: Collection[int]) -> Any:
    known = _VOCABULARIES.setdefault(tokenizer, {})
    key = (vocabulary, *sorted(ends))
    if key not in known:
        if not ends:
            raise MoeboundError("JSON needs a model that has an end mark")
        module = need("llguidance.hf", "JSON by a schema")
        try:
            known[key] = module.from_tokenizer(
                tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=sorted(ends)
            )
        except Exception as error:
            raise MoeboundError(
                "llguidance cannot read this model's tokenizer, so JSON cannot be enforced: "
                f"{_said(str(error))}"
            ) from error
    return known[key]


def _said(text: str) -> str:
    """What went wrong, without the library's own state."""
    return " ".join(text.partition("<state>")[0].split())[:300]
