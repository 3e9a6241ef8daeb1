"""response_format, by the real client: what comes is JSON, and of the schema."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import openai
import pytest

from moebound.text.serve.engine import PlainEngine

from ..test_grammar import SCHEMA, Babble
from ..tokenizers_made import byte_level
from .live import NAME, PATIENCE_S, Live, running

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_of_the_schema(stream: bool) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[serve]'")
    tokenizer = byte_level()
    engine = PlainEngine(Babble(len(tokenizer)), tokenizer)
    wrapped: Any = {"type": "json_schema", "json_schema": {"name": "things", "schema": SCHEMA}}
    with (
        running(engine, chat_template=TEMPLATE) as live,
        openai.OpenAI(base_url=live.url, api_key="-", max_retries=0, timeout=PATIENCE_S) as client,
    ):
        options: dict[str, Any] = {
            "model": NAME, "messages": [{"role": "user", "content": "a thing"}],
            "response_format": wrapped, "temperature": 0, "max_tokens": 600,
        }  # fmt: skip
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**options).choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
        assert reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
        for wrong in (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 1}}},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**{**options, "response_format": wrong})
            assert caught.value.param == "response_format"


def test_without_the_package_it_is_refused(shared: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with shared.client() as client:
        body = {"prompt": "a", "response_format": {"type": "json_object"}}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "unsupported_parameter")
    assert ".[serve]" in error["message"]
