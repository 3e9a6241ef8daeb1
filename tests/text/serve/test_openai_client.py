"""The real openai client against the real server: it gets what transformers generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionUserMessageParam

from moebound.evaluate.loading import Loaded
from moebound.tasks.registry import get_task
from moebound.text.serve.engine import PlainEngine

from .live import NAME, PATIENCE_S, QUESTION, Gate, Live, running, until

PROMPTS = [problem.prompt for problem in get_task("wordmath-hard").problems(3)]


def connect(live: Live, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url, api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def client(shared: Live) -> Iterator[openai.OpenAI]:
    with connect(shared) as client:
        yield client


def user(content: str = QUESTION) -> list[ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": content}]


def reference(loaded: Loaded, prompt: str, max_new_tokens: int = 112) -> tuple[str, int, int]:
    """(text, prompt tokens, new tokens) of transformers' own greedy loop."""
    ids = loaded.tokenizer(prompt)["input_ids"]
    out = loaded.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens
    )[0][len(ids) :]
    return loaded.tokenizer.decode(out, skip_special_tokens=True), len(ids), len(out)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has 'wordmath'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_or_not_a_chat_is_what_transformers_says(
    client: openai.OpenAI, loaded: Loaded, prompt: str
) -> None:
    text, n_prompt, n_new = reference(loaded, prompt)
    whole = client.chat.completions.create(model=NAME, messages=user(prompt), temperature=0)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (n_prompt, n_new)
    assert whole.usage.total_tokens == n_prompt + n_new

    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=user(prompt), temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert len({chunk.id for chunk in chunks}) == 1
    *answer, usage = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == text
    reasons = [chunk.choices[0].finish_reason for chunk in answer]
    assert reasons == [*[None] * (len(answer) - 1), "stop"]
    assert len(answer) > n_new / 2  # token by token
    assert all(chunk.usage is None for chunk in answer)
    assert usage.usage == whole.usage
    assert usage.choices == []


def test_a_completion_continues_its_prompt(client: openai.OpenAI, loaded: Loaded) -> None:
    text, *_ = reference(loaded, QUESTION)
    options: dict[str, Any] = {"model": NAME, "prompt": QUESTION, "temperature": 0}
    whole = client.completions.create(**options, max_tokens=100)
    assert whole.choices[0].text == " " + text
    streamed = list(client.completions.create(**options, max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == " " + text
    assert streamed[-1].choices[0].finish_reason == "stop"
    ids = loaded.tokenizer(QUESTION)["input_ids"]
    same = client.completions.create(**{**options, "prompt": ids}, max_tokens=100)
    assert (same.choices, same.usage) == (whole.choices, whole.usage)


def test_a_completion_has_16_tokens_unless_it_says(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=NAME, prompt="Ava has 3 books.", temperature=2, seed=3, stop=["never"]
    )
    assert found.usage is not None
    assert found.usage.completion_tokens <= 16
    assert (found.choices[0].finish_reason == "length") == (found.usage.completion_tokens == 16)


def test_the_limit_cuts_where_transformers_does(client: openai.OpenAI, loaded: Loaded) -> None:
    text, *_ = reference(loaded, QUESTION, 5)
    for field in ("max_tokens", "max_completion_tokens"):
        options: dict[str, Any] = {field: 5}
        found = client.chat.completions.create(
            model=NAME, messages=user(), temperature=0, **options
        ).choices[0]
        assert (found.message.content, found.finish_reason) == (text, "length")


def test_stop_texts(client: openai.OpenAI, loaded: Loaded) -> None:
    text, *_ = reference(loaded, QUESTION)
    options: dict[str, Any] = {"model": NAME, "messages": user(), "temperature": 0}
    found = client.chat.completions.create(**options, stop=[" \\boxed", "nothing"]).choices[0]
    assert (found.message.content, found.finish_reason) == (text.partition(" \\boxed")[0], "stop")
    stream = client.chat.completions.create(**options, stop=" \\boxed", stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == found.message.content


def test_a_seed_repeats_a_drawn_text(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str | None:
        return client.chat.completions.create(
            model=NAME, messages=user(PROMPTS[0]), temperature=1.8, top_p=0.99, seed=seed,
            max_tokens=30,
        ).choices[0].message.content  # fmt: skip

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_errors_are_those_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=user(), n=2)
    assert caught.value.param == "n"
    assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-x", messages=user())
    with pytest.raises(openai.BadRequestError, match="expected one message") as caught:
        client.chat.completions.create(
            model=NAME, messages=[{"role": "system", "content": "x"}, *user()]
        )
    assert caught.value.param == "messages"


def test_a_key(engine: PlainEngine) -> None:
    with running(engine, api_key="secret") as live:
        with connect(live, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with connect(live, "secret") as client:
            assert client.completions.create(model=NAME, prompt="a", max_tokens=1).choices


def test_a_closed_stream_stops_the_model(engine: PlainEngine, gate: Gate) -> None:
    with running(engine) as live, connect(live) as client:
        gate.close()
        gate.allow(3)
        stream = client.chat.completions.create(
            model=NAME, messages=user(), temperature=0, stream=True
        )
        seen = [next(iter(stream)) for _ in range(3)]
        assert seen[-1].choices[0].delta.content
        until(lambda: gate.arrived == 4)
        stream.close()
        until(lambda: live.worker.cancels == 1)
        gate.open()
        until(lambda: live.stats()["requests"]["cancelled"] == 1)
        assert live.records[0].n_new == 4  # a pass that has begun is finished
