"""One text at a time: who waits, who is refused, and who leaves."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from moebound.errors import CorruptionError
from moebound.text.serve.engine import PlainEngine

from .live import NAME, PATIENCE_S, Gate, InThread, Live, chat_body, events, running, texts, until

CHAT = "/v1/chat/completions"


@pytest.fixture
def live(engine: PlainEngine, gate: Gate) -> Iterator[Live]:
    """Two may wait. The gate is opened before the server ends."""
    with running(engine, queue=2) as live:
        yield live
        gate.open()


def ask(live: Live, **fields: Any) -> InThread:
    def call() -> httpx.Response:
        with live.client() as client:
            return client.post(CHAT, json=chat_body(**fields))

    return InThread(call)


def fill(live: Live, gate: Gate) -> list[InThread]:
    """One request that runs, before its first token, and two that wait, in this order."""
    gate.close()
    asked = [ask(live)]
    until(lambda: gate.arrived == 1)
    for waiting in (1, 2):
        asked.append(ask(live, max_tokens=waiting))
        until(lambda: live.stats()["waiting"] == waiting)  # noqa: B023
    return asked


def test_a_full_queue_refuses_and_says_when_to_come_again(live: Live, gate: Gate) -> None:
    asked = fill(live, gate)
    assert live.stats()["running"] == 1
    refused = ask(live).result()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    options: dict[str, Any] = {"base_url": live.url, "api_key": "x", "max_retries": 0}
    with openai.OpenAI(**options) as client, pytest.raises(openai.RateLimitError):
        client.completions.create(model=NAME, prompt="a")
    gate.open()
    answers = [one.result() for one in asked]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [14, 1, 2]
    assert [record.n_new for record in live.records] == [14, 1, 2]  # first come, first served
    stats = live.stats()
    assert stats["requests"] == {"completed": 3, "cancelled": 0, "failed": 0, "refused": 2}
    assert stats["new_tokens"] == 17
    assert ask(live).result().status_code == 200


def test_everything_else_answers_meanwhile(live: Live, gate: Gate) -> None:
    asked = fill(live, gate)
    with live.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").status_code == 200
        server = client.get("/stats").json()["server"]
    assert (server["running"], server["waiting"], server["queue"]) == (1, 2, 2)
    gate.open()
    for one in asked:
        one.result()


def test_no_queue_at_all(engine: PlainEngine, gate: Gate) -> None:
    with running(engine, queue=0) as live:
        gate.close()
        first = ask(live)
        until(lambda: gate.arrived == 1)
        assert ask(live).result().status_code == 429
        gate.open()
        assert first.result().status_code == 200
        assert ask(live).result().status_code == 200


def leave(live: Live, **fields: Any) -> socket.socket:
    """A request on a connection that the test can cut."""
    request = httpx.Request("POST", live.root + CHAT, json=chat_body(**fields))
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    raw = socket.create_connection((request.url.host, request.url.port), timeout=PATIENCE_S)
    raw.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return raw


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_hangs_up_stops_the_model(live: Live, gate: Gate, stream: bool) -> None:
    gate.close()
    connection = leave(live, stream=stream)
    gate.allow(3)
    until(lambda: gate.arrived == 4)
    connection.close()
    until(lambda: live.worker.cancels == 1)
    after = ask(live)
    gate.open()
    assert after.result().status_code == 200
    assert [(record.outcome, record.n_new) for record in live.records] == [
        ("cancelled", 4), ("completed", 14),
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_hangs_up_while_waiting_leaves_the_queue(
    live: Live, gate: Gate, stream: bool
) -> None:
    gate.close()
    first = ask(live)
    until(lambda: gate.arrived == 1)
    connection = leave(live, stream=stream)
    until(lambda: live.stats()["waiting"] == 1)
    connection.close()
    until(lambda: live.stats()["waiting"] == 0)
    gate.open()
    assert first.result().status_code == 200
    assert [record.outcome for record in live.records] == ["cancelled", "completed"]
    assert live.records[0].n_new == 0


def test_a_token_is_sent_before_the_next_is_computed(live: Live, gate: Gate) -> None:
    gate.close()
    gate.allow(2)
    with live.client() as client, client.stream("POST", CHAT, json=chat_body(stream=True)) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in got.iter_lines() if line)
        found = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
        assert [chunk["choices"][0]["delta"] for chunk in found] == [
            {"role": "assistant", "content": ""}, {"content": "4"}, {"content": "2"},
        ]  # fmt: skip
        until(lambda: gate.arrived == 3)  # and waits
    gate.open()


def test_a_silent_stream_says_that_it_lives(
    live: Live, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebound.text.serve.answers.KEEP_ALIVE_S", 0.05)
    gate.close()
    asked = ask(live, stream=True)
    with live.client() as client, client.stream("POST", CHAT, json=chat_body(stream=True)) as got:
        lines = got.iter_lines()
        assert next(lines) == ": waiting"
        gate.open()
        assert any(line.startswith("data: {") for line in lines)
    assert "42 - 17 = 25." in texts(events(asked.result()))


@pytest.mark.parametrize("error", [RuntimeError, CorruptionError])
def test_a_model_that_fails_is_an_error_and_the_next_is_served(
    live: Live, engine: PlainEngine, error: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise error("/secret/details")

    hook = engine.model.register_forward_pre_hook(fail)
    answers = [ask(live, stream=stream).result() for stream in (False, True)]
    hook.remove()
    for answer in answers:
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert error.__name__ in answer.text
        assert "secret" not in answer.text
    hook = engine.model.lm_head.register_forward_hook(lambda *a: a[2] * float("nan"))
    broken = ask(live).result()
    hook.remove()
    assert "no number" in broken.json()["error"]["message"]
    assert ask(live).result().status_code == 200
    assert live.stats()["requests"]["failed"] == 3


def test_a_model_that_fails_halfway_ends_the_stream(live: Live, engine: PlainEngine) -> None:
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise RuntimeError

    hook = engine.model.register_forward_pre_hook(fail)
    answer = ask(live, stream=True).result()
    hook.remove()
    assert answer.status_code == 200
    *chunks, error = events(answer)
    assert texts(chunks) == "42 -"
    assert error["error"]["code"] == "generation_failed"
