"""A server of several texts at a time: no client waits for another, nor changes its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.metrics import exposition

from .live import QUESTION, Gate, InThread, Live, chat_body, events, running, until
from .test_queue import ask, leave

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OTHERS = [
    "Ava has 3 books. Eli gives 4 to Ava. How many books does Ava have? Answer in a sentence.",
    "Zoe has 30 cards. Zoe gives 12 cards to Eli. How many cards does Zoe have left?",
]


@pytest.fixture
def live(engine: PlainEngine, gate: Gate) -> Iterator[Live]:
    """Three at a time, and two may wait. The gate is opened before the server ends."""
    with running(engine, queue=2, max_sequences=3) as live:
        yield live
        gate.open()


@pytest.fixture(scope="module")
def offloaded() -> Iterator[Offloaded]:
    with load("builtin:wordmath", ram_budget="30%") as offloaded:
        yield offloaded


def body(i: int) -> dict[str, Any]:
    """Drawn, with a seed and a length of its own; some with log probabilities, some with JSON's
    opposite: a bias."""
    fields: dict[str, Any] = {"temperature": 0.9, "seed": i, "max_tokens": 6 + 3 * (i % 4)}
    if i % 2:
        fields |= {"logprobs": True, "top_logprobs": 3}
    if i % 3 == 0:
        fields |= {"frequency_penalty": 0.5, "top_k": 20}
    question = [QUESTION, *OTHERS][i % 3]
    return chat_body(messages=[{"role": "user", "content": question}], **fields)


def ask_all(live: Live, gate: Gate, *fields: dict[str, Any]) -> list[InThread]:
    """Requests in this order: the first has made one pass when all others have come, and then they
    stop before the next."""
    gate.close()
    asked = [ask(live, **fields[0])]
    until(lambda: gate.arrived > 0)
    for count, some in enumerate(fields[1:], start=1):
        asked.append(ask(live, **some))
        until(lambda: live.stats()["waiting"] == count)  # noqa: B023
    gate.allow(1)
    return asked


def choices(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"], answer.json()["usage"]


def test_every_client_gets_what_it_gets_alone(offloaded: Offloaded) -> None:
    with running(offloaded, queue=16, max_sequences=4) as live:

        def post(i: int) -> httpx.Response:
            with live.client() as client:
                return client.post(CHAT, json=body(i))

        alone = [choices(post(i)) for i in range(8)]
        asked = [InThread(lambda i=i: post(i)) for i in range(8)]  # type: ignore[misc]
        together = [choices(one.result()) for one in asked]
    assert together == alone


def test_nobody_waits_while_there_is_room(live: Live, gate: Gate) -> None:
    asked = ask_all(live, gate, {}, {"max_tokens": 2}, {"max_tokens": 3}, {"max_tokens": 1})
    until(lambda: live.stats()["running"] == 3)
    assert live.stats()["sequences"] == 3
    assert live.stats()["waiting"] == 1
    gate.open()
    answers = [one.result() for one in asked]
    assert [one.json()["usage"]["completion_tokens"] for one in answers] == [14, 2, 3, 1]
    # The short ones, and the one behind them, are done before the long one that came first.
    assert [record.n_new for record in live.records][-1] == 14
    assert live.stats()["sequences"] == 0


def test_a_full_queue_counts_those_that_run(live: Live, gate: Gate) -> None:
    asked = ask_all(live, gate, *[{}] * 5)
    until(lambda: (live.stats()["running"], live.stats()["waiting"]) == (3, 2))
    assert ask(live).result().status_code == 429
    gate.open()
    assert [one.result().status_code for one in asked] == [200] * 5


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_halfway_leaves_the_others_alone(live: Live, gate: Gate, stream: bool) -> None:
    expected = ask(live).result().json()["choices"]
    gate.close()
    stays = ask(live)
    until(lambda: live.stats()["running"] == 1)
    connection = leave(live, stream=stream)
    until(lambda: live.stats()["running"] == 2 or live.stats()["waiting"] == 1)
    gate.allow(8)
    connection.close()
    until(lambda: live.worker.cancels >= 2)
    gate.open()
    assert stays.result().json()["choices"] == expected
    until(lambda: live.stats()["running"] == 0)
    outcomes = sorted(record.outcome for record in live.records)
    assert outcomes == ["cancelled", "completed", "completed"]


def test_several_texts_of_one_request_are_made_together(live: Live) -> None:
    fields = {"n": 4, "temperature": 0.9, "seed": 7, "max_tokens": 12}
    with live.client() as client:
        whole, usage = choices(client.post(CHAT, json=chat_body(**fields)))
        streamed = events(client.post(CHAT, json=chat_body(stream=True, **fields)))
        one, _ = choices(client.post(CHAT, json=chat_body(**{**fields, "n": 1, "seed": 9})))
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    assert usage["completion_tokens"] == live.records[0].n_new
    assert whole[2]["message"] == one[0]["message"]  # the seed's, whoever is beside it
    texts, roles = [""] * 4, [0] * 4
    order = list[int]()
    for chunk in streamed[:-1]:
        (choice,) = chunk["choices"]
        order.append(choice["index"])
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
    assert texts == [choice["message"]["content"] for choice in whole]
    assert roles == [1] * 4
    assert order != sorted(order)  # as they come


def test_prompts_of_one_request_with_echo_and_scores(live: Live) -> None:
    prompts = [QUESTION, OTHERS[0], OTHERS[1], "a"]
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    with live.client() as client:
        together, _ = choices(client.post(COMPLETIONS, json={"prompt": prompts, **asked}))
        for index, prompt in enumerate(prompts):
            (alone,), _ = choices(client.post(COMPLETIONS, json={"prompt": prompt, **asked}))
            assert together[index] | {"index": 0} == alone


def test_a_request_that_fails_ends_no_other(live: Live, engine: PlainEngine, gate: Gate) -> None:
    expected = ask(live).result().json()["choices"]

    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] in (5, 6, 7):  # a prompt as no other here is
            raise RuntimeError("broken")

    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        gate.close()
        well = ask(live)
        until(lambda: live.stats()["running"] == 1)

        def post() -> httpx.Response:
            with live.client() as client:
                return client.post(COMPLETIONS, json={"prompt": [[5] * 6, [3] * 12], "n": 1})

        broken = InThread(post)
        gate.open()
        assert broken.result().status_code == 500
        assert well.result().json()["choices"] == expected
    finally:
        hook.remove()
    until(lambda: live.stats()["running"] == live.stats()["sequences"] == 0)
    assert live.stats()["requests"]["failed"] == 1
    assert ask(live).result().status_code == 200


def test_memory_admits_in_order(engine: PlainEngine) -> None:
    """With room for nothing beside it, a text runs alone; the next one begins when it has ended."""
    with running(engine, queue=8, max_sequences=4, kv_budget=1) as live:
        asked = [ask(live, max_tokens=n) for n in (3, 4, 5)]
        assert [one.result().status_code for one in asked] == [200] * 3
        assert live.stats()["max_sequences"] == 4
        assert live.stats()["kv_budget_bytes"] == 1


def test_gauges(engine: PlainEngine, gate: Gate) -> None:
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    with running(engine, queue=2, max_sequences=2, kv_budget=10**9) as live:
        asked = ask_all(live, gate, {}, {})
        until(lambda: live.stats()["running"] == 2)
        text, _ = exposition(live.worker.stats, live.worker.state(), {})
        gate.open()
        for one in asked:
            one.result()
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#")
    assert float(lines["moebound_requests_running"]) == 2
    assert float(lines["moebound_sequences_running"]) == 2
    assert float(lines["moebound_sequences_limit"]) == 2
    assert float(lines["moebound_sequences_paused"]) == 0
    assert float(lines["moebound_kv_cache_budget_bytes"]) == 10**9
