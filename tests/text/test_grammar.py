"""Texts that keep to a JSON Schema, whatever the model would rather say."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

from moebound.errors import BackendUnavailable, MoeboundError
from moebound.text.generation import GenerationSettings, generate
from moebound.text.grammar import ANY_OBJECT, Grammar

from .tokenizers_made import byte_fallback, byte_level

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["coin", "book"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


class Babble:
    """Scores that depend on nothing but how many tokens there are: it would never write JSON."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    generation_config = None

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._vocabulary, self._seed = vocabulary, seed

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(self._vocabulary, 1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        generator = torch.Generator().manual_seed(1000 * self._seed + input_ids.shape[1])
        scores = torch.randn(1, input_ids.shape[1], self._vocabulary, generator=generator)
        return SimpleNamespace(logits=scores)

    __call__ = forward


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("llguidance", reason="pip install '.[serve]'")


@pytest.mark.parametrize("made", [byte_level, byte_fallback])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3, "top_p": 0.9}])
@pytest.mark.parametrize("seed", range(3))
def test_any_model_writes_what_the_schema_says(
    made: Any, settings: dict[str, Any], seed: int
) -> None:
    tokenizer = made()
    model = Babble(len(tokenizer) + 5, seed)  # embeddings are often more than tokens
    asked = GenerationSettings(400, json_schema=json.dumps(SCHEMA), **settings)
    pieces = list(generate(model, tokenizer, [5, 6], asked))
    assert pieces[-1].finish is not None
    # White space between its parts has no end of its own, so a text may be cut by its length.
    if pieces[-1].finish.reason == "stop":
        jsonschema.validate(json.loads("".join(piece.text for piece in pieces)), SCHEMA)
    else:
        assert "".join(piece.text for piece in pieces).lstrip()[:1] in ("{", "")


def test_only_what_may_come_next_is_left() -> None:
    tokenizer = byte_level()
    grammar = Grammar(
        tokenizer, '{"const": "a"}', vocabulary=len(tokenizer), ends=[tokenizer.eos_token_id]
    )
    scores = torch.zeros(len(tokenizer) + 7)
    for expected in ('"', "a", '"'):
        allowed = grammar.allowed(scores).isfinite().nonzero().flatten().tolist()
        texts = [tokenizer.decode([token]) for token in allowed]
        assert all('"a"'.startswith(text) or '"a"'.find(text) >= 0 for text in texts)
        (token,) = [token for token, text in zip(allowed, texts, strict=True) if text == expected]
        done = grammar.add(token)
    assert done or grammar.allowed(scores).isfinite().nonzero().flatten().tolist() == [
        tokenizer.eos_token_id
    ]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"type": "strin"}', "strin"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ('{"not": {}}', "not"),
        ('{"type": "string", "pattern": "("}', "unclosed"),
    ],
)
def test_a_schema_that_cannot_be_carried_out(schema: str, said: str) -> None:
    tokenizer = byte_level()
    with pytest.raises(MoeboundError, match=said):
        Grammar(tokenizer, schema, vocabulary=len(tokenizer), ends=[tokenizer.eos_token_id])


def test_a_model_that_has_no_end_mark() -> None:
    with pytest.raises(MoeboundError, match="end mark"):
        Grammar(byte_level(), ANY_OBJECT, vocabulary=300, ends=[])


def test_without_the_package_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendUnavailable, match=r"\.\[serve\]"):
        Grammar(byte_level(), ANY_OBJECT, vocabulary=300, ends=[0])
