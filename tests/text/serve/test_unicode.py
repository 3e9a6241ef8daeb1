"""Characters of several tokens and bytes arrive whole, in bodies and in streams."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from ..tokenizers_made import byte_fallback, byte_level
from .live import NAME, chat_body, events, running, texts
from .scripted import ScriptedEngine

SAID = 'Käse für 3 €\u2028 日本語 😀👍🏽 \\ " \x85 \t ende\r\n\nx'
TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(params=[byte_level, byte_fallback], ids=["byte_level", "byte_fallback"])
def engine(request: pytest.FixtureRequest) -> ScriptedEngine:
    return ScriptedEngine.saying(SAID, request.param())


def test_bodies_and_streams_have_the_text(engine: ScriptedEngine) -> None:
    with running(engine, chat_template=TEMPLATE) as live, live.client() as client:
        whole = client.post("/v1/chat/completions", json=chat_body())
        assert whole.json()["choices"][0]["message"]["content"] == SAID
        stream = client.post("/v1/chat/completions", json=chat_body(stream=True))
        *chunks, done = events(stream)
        assert done == "[DONE]"
        assert texts(chunks) == SAID
        assert all("\ufffd" not in texts([chunk]) for chunk in chunks)
        pieces = [texts([chunk]) for chunk in chunks]
        assert "語" in pieces
        assert "😀" in pieces
        # Whatever a client takes for the end of a line, an event is one line.
        assert len(stream.text.splitlines()) == 2 * stream.text.count("data: ")
        with openai.OpenAI(base_url=live.url, api_key="x", max_retries=0) as other:
            created = other.completions.create(model=NAME, prompt="é", max_tokens=200, stream=True)
            said = "".join(chunk.choices[0].text for chunk in created)
            assert said.removeprefix(" ") == SAID  # a continuation, so a first word has its space


def test_a_stop_text_may_be_cut_anywhere(engine: ScriptedEngine) -> None:
    body: dict[str, Any] = chat_body(stop=["本語 😀", "never"])
    with running(engine, chat_template=TEMPLATE) as live, live.client() as client:
        found = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert found["message"]["content"] == SAID.partition("本")[0]
        assert found["finish_reason"] == "stop"


def test_a_character_cut_by_the_limit(engine: ScriptedEngine) -> None:
    with running(engine, chat_template=TEMPLATE) as live, live.client() as client:
        for n_new in range(1, 40):
            found = client.post("/v1/chat/completions", json=chat_body(max_tokens=n_new))
            text = found.content.decode("utf-8")  # strictly
            content = found.json()["choices"][0]["message"]["content"]
            assert SAID.startswith(content.rstrip("\ufffd"))
            assert text


def test_an_engine_is_told_of_each_text(engine: ScriptedEngine) -> None:
    with running(engine, chat_template=TEMPLATE) as live, live.client() as client:
        for _ in range(3):
            client.post("/v1/chat/completions", json=chat_body())
        assert engine.begun == 3
        found = client.get("/stats").json()
    assert found["engine"] == {"kind": "scripted"}
    assert engine.closed == 0  # whoever made it closes it
