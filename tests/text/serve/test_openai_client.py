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
        client.chat.completions.create(model=NAME, messages=user(), reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"
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


def test_several_texts_of_one_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": NAME, "messages": user(PROMPTS[0]), "temperature": 1.8, "max_tokens": 12,
    }  # fmt: skip
    alone = [client.chat.completions.create(**options, seed=seed) for seed in (5, 6, 7)]
    found = client.chat.completions.create(**options, seed=5, n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in found.choices]
    assert texts == [one.choices[0].message.content for one in alone]
    assert found.usage is not None
    usages = [one.usage for one in alone if one.usage is not None]
    assert found.usage.prompt_tokens == usages[0].prompt_tokens
    assert found.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
    streamed = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**options, seed=5, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_a_list_of_prompts(client: openai.OpenAI, loaded: Loaded) -> None:
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 6}
    alone = [client.completions.create(prompt=prompt, **options) for prompt in PROMPTS[:2]]
    ids = loaded.tokenizer(PROMPTS[1])["input_ids"]
    for prompts in (PROMPTS[:2], [loaded.tokenizer(PROMPTS[0])["input_ids"], ids]):
        found = client.completions.create(prompt=prompts, **options)
        assert [choice.text for choice in found.choices] == [one.choices[0].text for one in alone]
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(
            one.usage.prompt_tokens for one in alone if one.usage is not None
        )
    mixed: Any = [PROMPTS[0], ids]
    found = client.completions.create(prompt=mixed, **options, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices[::2]] == [one.choices[0].text for one in alone]


def scores_of(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def test_log_probabilities_of_a_chat_are_those_of_the_model(
    client: openai.OpenAI, loaded: Loaded
) -> None:
    options: dict[str, Any] = {
        "model": NAME, "messages": user(), "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    # The temperature and the penalties choose other tokens, and change no log probability.
    for drawn in ({"temperature": 0}, {"temperature": 1.5, "seed": 1, "presence_penalty": 1}):
        whole = client.chat.completions.create(**options, **drawn, max_tokens=10)
        assert whole.choices[0].logprobs is not None
        told = whole.choices[0].logprobs.content
        assert told is not None
        assert whole.usage is not None
        assert len(told) == whole.usage.completion_tokens
        text = b"".join(bytes(token.bytes or []) for token in told).decode()
        assert text.lstrip() == whole.choices[0].message.content
        by_text = {
            loaded.tokenizer.decode([5, token])[len(loaded.tokenizer.decode([5])) :]: token
            for token in range(len(loaded.tokenizer))
        }
        ids = loaded.tokenizer(QUESTION)["input_ids"]
        new = [by_text[token.token] for token in told if token.bytes]
        expected = scores_of(loaded, [*ids, *new])[len(ids) - 1 :]
        for token, id_, row in zip(told, new, expected, strict=False):
            assert token.logprob == pytest.approx(float(row[id_]), abs=1e-4)
            values = row.topk(3)[0].tolist()
            assert [one.logprob for one in token.top_logprobs] == pytest.approx(values, abs=1e-4)
        stream = client.chat.completions.create(**options, **drawn, max_tokens=10, stream=True)
        pieces = [chunk.choices[0].logprobs for chunk in stream]
        assert [
            token for piece in pieces if piece and piece.content for token in piece.content
        ] == told


def test_an_echo_has_the_log_probabilities_of_the_prompt(
    client: openai.OpenAI, loaded: Loaded
) -> None:
    ids = loaded.tokenizer(QUESTION)["input_ids"]
    expected = scores_of(loaded, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    options: dict[str, Any] = {"model": NAME, "temperature": 0, "echo": True, "logprobs": 1}
    for prompt, max_tokens in ((QUESTION, 2), (ids, 2), (QUESTION, 0)):
        found = client.completions.create(prompt=prompt, max_tokens=max_tokens, **options)
        (choice,) = found.choices
        assert choice.logprobs is not None
        token_logprobs, offsets = choice.logprobs.token_logprobs, choice.logprobs.text_offset
        assert token_logprobs is not None
        assert offsets is not None
        assert token_logprobs[0] is None
        assert token_logprobs[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(token_logprobs) == len(ids) + max_tokens
        if prompt is QUESTION:
            assert choice.text.startswith(QUESTION)
        if max_tokens:
            plain = client.completions.create(model=NAME, prompt=prompt, temperature=0,
                                              max_tokens=2)  # fmt: skip
            assert choice.text.endswith(plain.choices[0].text)
            assert choice.text[offsets[len(ids)] :] == plain.choices[0].text
        assert found.usage is not None
        assert found.usage.completion_tokens == max_tokens
        pieces = list(
            client.completions.create(prompt=prompt, max_tokens=max_tokens, stream=True, **options)
        )
        assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_sampling_fields_are_carried_out(client: openai.OpenAI, loaded: Loaded) -> None:
    text, *_ = reference(loaded, QUESTION)
    hot: dict[str, Any] = {"model": NAME, "messages": user(), "temperature": 2, "seed": 4}

    def said(**extra: Any) -> str:
        options = {**hot, **{k: v for k, v in extra.items() if k == "logit_bias"}}
        rest = {k: v for k, v in extra.items() if k != "logit_bias"}
        answer = client.chat.completions.create(**options, extra_body=rest)
        return str(answer.choices[0].message.content)

    assert said(top_k=1) == said(min_p=1) == text
    assert said(top_k=-1) == said(top_k=0) == said()
    greedy: dict[str, Any] = {"model": NAME, "messages": user(), "temperature": 0}
    (first,) = loaded.tokenizer(text.split()[0], add_special_tokens=False)["input_ids"][:1]
    banned = client.chat.completions.create(**greedy, logit_bias={str(first): -100})
    assert not (banned.choices[0].message.content or "").startswith(text.split()[0])
    penalized = client.chat.completions.create(
        **greedy, max_tokens=20, extra_body={"repetition_penalty": 20.0}
    )
    ids = loaded.tokenizer(QUESTION)["input_ids"]
    out = loaded.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=20, repetition_penalty=20.0
    )[0][len(ids) :]
    assert penalized.choices[0].message.content == loaded.tokenizer.decode(
        out, skip_special_tokens=True
    )
    assert penalized.choices[0].message.content != text
