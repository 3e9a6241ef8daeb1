"""What a request may not say, and what the server answers to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebound.evaluate.loading import Loaded
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.schema import IGNORED, UNSUPPORTED, ChatRequest

from .live import NAME, QUESTION, Live, chat_body, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "a"}


def refused(live: Live, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error of a request that must have one, in OpenAI's form."""
    with live.client() as client:
        if isinstance(body, (str, bytes)):
            found = client.post(path, content=body, headers=JSON)
        else:
            found = client.post(path, json=body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    "body",
    [
        "", "{", '{"messages": [}', "nothing", b"\xff\xfe", "[" * 40_000, '{"a": 1}}',
        '{"prompt": "a", "temperature": NaN}', "\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_no_json(shared: Live, path: str, body: Any) -> None:
    assert refused(shared, path, body)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        r'{"prompt": "a\ud800"}', r'{"prompt": "a", "stop": "\ud800"}',
        r'{"prompt": "a", "\ud800": 1}', r'{"prompt": "a", "model": "\ud800"}',
        r'{"prompt": "a", "user": ["\ud800"]}',
    ],
)  # fmt: skip
def test_half_of_a_surrogate_pair(shared: Live, body: str) -> None:
    assert "surrogate" in refused(shared, COMPLETIONS, body)["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"logprobs": True},
        {"echo": 0},
        {"n": True},
        {"frequency_penalty": False},
        {"suffix": False},
        {"top_logprobs": False},
    ],
)
def test_0_is_not_false_and_1_not_true(shared: Live, field: dict[str, Any]) -> None:
    error = refused(shared, COMPLETIONS, {"prompt": "a", **field})
    assert [error["param"]] == list(field)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "a"]), inner)
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, *UNSUPPORTED, *IGNORED, "prompt", "x"])


@given(st.dictionaries(FIELDS, VALUES, max_size=4), st.sampled_from([CHAT, COMPLETIONS]))
@settings(max_examples=60)
@example({"prompt": [5], "messages": None}, COMPLETIONS)
def test_no_body_is_too_strange(shared: Live, fields: dict[str, Any], path: str) -> None:
    usual = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    with shared.client() as client:
        found = client.post(path, json={"max_tokens": 1, **usual, **fields})
    assert found.status_code in (200, 400, 404), found.text
    if found.status_code != 200:
        assert found.json()["error"]["message"]


@pytest.mark.parametrize("body", ["[]", "1", '"text"', "null", "[1, 2]"])
def test_json_that_is_no_object(shared: Live, body: str) -> None:
    assert "JSON object" in refused(shared, CHAT, body)["message"]


def test_a_body_of_another_type(shared: Live) -> None:
    # What a page in a browser can send anywhere without being asked is not taken.
    with shared.client() as client:
        found = client.post(
            COMPLETIONS, content='{"prompt": "a"}', headers={"Content-Type": "text/plain"}
        )
    assert found.status_code == 400
    assert "application/json" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content"),
        ({"messages": [{**USER, "tool_calls": [{"id": "x"}]}]}, "messages.0.tool_calls"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),  # the model cannot
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"299": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"temprature": 0}, "temprature"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(shared: Live, fields: dict[str, Any], param: str) -> None:
    error = refused(shared, CHAT, {"messages": [USER], **fields})
    assert error["param"] == param
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize(
    "prompt",
    [None, [], 5, {"a": 1}, [["a"], ["b"]], [1, "a"], [True], [1.5], [[[1]]], [[]], ["a", []],
     [-1], [299], [[1], [299]], [1 << 70], ["a"] * 129],
)  # fmt: skip
def test_a_prompt_that_is_none(shared: Live, prompt: Any) -> None:
    assert refused(shared, COMPLETIONS, {"prompt": prompt})["param"] == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 2, "n": 65}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"suffix": "a"}, "suffix"),
    ],
)
def test_a_field_of_a_completion_that_is_wrong_is_named(
    shared: Live, fields: dict[str, Any], param: str
) -> None:
    assert refused(shared, COMPLETIONS, {"prompt": "a", **fields})["param"] == param


def test_more_log_probabilities_than_fit(shared: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebound.text.serve.prompts.MOST_LOGPROBS", 50)
    body = {"prompt": ["a", "b"], "max_tokens": 10, "logprobs": 2}
    assert "up to 60" in refused(shared, COMPLETIONS, body)["message"]
    with shared.client() as client:
        body["logprobs"] = 1
        assert client.post(COMPLETIONS, json=body).status_code == 200


def test_what_asks_for_nothing_is_accepted(shared: Live) -> None:
    neutral: dict[str, Any] = {
        "n": 1, "logprobs": False, "top_logprobs": None, "presence_penalty": 0.0, "tools": [],
        "frequency_penalty": 0, "response_format": {"type": "text"}, "user": "somebody",
        "logit_bias": {}, "stream": None, "stream_options": None, "seed": None, "stop": None,
        "temperature": 0.0, "store": False, "metadata": {"a": "b"}, "model": NAME,
    }  # fmt: skip
    with shared.client() as client:
        plain = client.post(CHAT, json=chat_body())
        found = client.post(CHAT, json=chat_body(**neutral))
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == plain.json()["choices"]


def test_parts_of_text_are_a_text(shared: Live) -> None:
    parts = [{"type": "text", "text": QUESTION}]
    with shared.client() as client:
        found = client.post(CHAT, json=chat_body(messages=[{"role": "user", "content": parts}]))
        assert found.json()["choices"] == client.post(CHAT, json=chat_body()).json()["choices"]


def test_a_prompt_longer_than_the_model(shared: Live) -> None:
    long = " ".join(["coins"] * 300)
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
        (COMPLETIONS, {"prompt": long}),
    ):
        error = refused(shared, path, body)
        assert error["code"] == "context_length_exceeded"
        assert "302 tokens" in error["message"]
        assert "256 positions" in error["message"]


def test_more_new_tokens_than_there_is_room_for(shared: Live) -> None:
    error = refused(shared, CHAT, chat_body(max_tokens=226))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    with shared.client() as client:
        assert client.post(CHAT, json=chat_body(max_tokens=225)).status_code == 200


def test_limits_of_the_server(engine: PlainEngine) -> None:
    with running(engine, max_prompt_tokens=31, max_new_tokens=4) as live:
        error = refused(live, CHAT, chat_body(max_completion_tokens=5))
        assert error["param"] == "max_completion_tokens"
        assert "up to 4" in error["message"]
        longer = [{"role": "user", "content": f"{QUESTION} please"}]
        error = refused(live, CHAT, chat_body(messages=longer))
        assert error["code"] == "context_length_exceeded"
        assert "up to 31" in error["message"]
        with live.client() as client:
            found = client.post(CHAT, json=chat_body()).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 4


def test_unknown_routes_and_methods(shared: Live) -> None:
    with shared.client() as client:
        for method, path, status in (
            ("GET", "/v2/models", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405),
        ):  # fmt: skip
            found = client.request(method, path)
            assert found.status_code == status
            assert path in found.json()["error"]["message"]


def test_a_tokenizer_without_a_chat_template(
    loaded: Loaded, engine: PlainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = loaded.tokenizer.chat_template
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    with running(engine) as live:
        error = refused(live, CHAT, chat_body())
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]
        with live.client() as client:
            assert client.post(COMPLETIONS, json={"prompt": QUESTION}).status_code == 200
    with running(engine, chat_template=own) as live, live.client() as client:
        assert client.post(CHAT, json=chat_body()).status_code == 200


def test_developer_is_system(engine: PlainEngine) -> None:
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    with running(engine, chat_template=template) as live, live.client() as client:
        found = [
            client.post(CHAT, json=chat_body(messages=[{"role": role, "content": "a"}])).json()
            for role in ("system", "developer")
        ]
    assert found[0]["choices"] == found[1]["choices"]
    assert found[0]["usage"] == found[1]["usage"]
