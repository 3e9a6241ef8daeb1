"""What one client may take: connections, heads, bodies and time, before anybody knows who it is."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from moebound.text.serve import bodies, connections
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import PlainEngine

from .live import PATIENCE_S, Gate, InThread, Live, chat_body, events, running, until
from .scripted import ScriptedEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "s3cret-key"
SHORT_S = 0.4


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebound.text.serve.server.CHECK_S", 0.02)
    monkeypatch.setattr(connections, "LINGER_S", 0.1)


@pytest.fixture
def tight(engine: PlainEngine) -> Iterator[Live]:
    """Few connections, a short time for everything, and a key that is never sent."""
    with running(engine, api_key=KEY, max_connections=8, receive_s=SHORT_S, send_s=SHORT_S) as live:
        yield live


def opened(live: Live, first: bytes = b"") -> socket.socket:
    url = httpx.URL(live.root)
    raw = socket.create_connection((url.host, url.port or 0), timeout=PATIENCE_S)
    if first:
        raw.sendall(first)
    return raw


def head(path: str = CHAT, *fields: str, key: str = KEY) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
             f"Authorization: Bearer {key}", *fields]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


def send_until_cut_off(raw: socket.socket, data: bytes, *, pause: float = 0) -> None:
    """Again and again, until the server has closed."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline:
            raw.sendall(data)
            time.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        return
    raise AssertionError("the server takes it for ever")


def to_the_end(raw: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while part := raw.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


def healthy(live: Live, key: str | None = KEY) -> None:
    with live.client(key) as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "first",
    [b"", b"\r\n", b"POST ", b"GET /health HTTP/1.1\r\nA: b\r\n",
     head(CHAT, "Content-Length: 100"), head(CHAT, "Content-Length: 100") + b"{",
     head(CHAT, "Transfer-Encoding: chunked") + b"5\r\n{",
     head(CHAT, "Content-Length: 100", key="wrong")],
)  # fmt: skip
def test_a_request_that_does_not_go_on_is_ended(tight: Live, first: bytes) -> None:
    with closing(opened(tight, first)) as raw:
        to_the_end(raw)
    until(lambda: not tight.server.server_state.connections)
    until(lambda: tight.worker.state()["reading"] == 0)
    healthy(tight)


def test_a_head_that_comes_byte_by_byte_has_the_same_time(tight: Live) -> None:
    begun = time.monotonic()
    with closing(opened(tight)) as raw:
        send_until_cut_off(raw, b"A", pause=0.02)
    assert time.monotonic() - begun < PATIENCE_S


def test_a_body_that_comes_byte_by_byte_gets_408(engine: PlainEngine) -> None:
    with running(engine, receive_s=SHORT_S) as live:
        with closing(opened(live, head(CHAT, "Content-Length: 1000"))) as raw:
            ended = threading.Event()

            def drip() -> None:
                try:
                    while not ended.wait(0.02):
                        raw.sendall(b" ")
                except OSError:
                    pass

            dripping = InThread(drip)
            answer = to_the_end(raw)
            ended.set()
            dripping.result()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer
        assert live.worker.state()["reading"] == 0


def test_more_connections_than_there_may_be_do_not_silence_it(tight: Live) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(closing(opened(tight, b"GET /health HTTP/1.1\r\n")))
        healthy(tight)
        assert len(tight.server.server_state.connections) <= 8


def test_connections_at_work_are_not_ended_for_others(engine: PlainEngine, gate: Gate) -> None:
    gate.close()
    with running(engine, queue=4, max_connections=3) as live, ExitStack() as stack:

        def ask() -> httpx.Response:
            with live.client() as client:
                return client.post(CHAT, json=chat_body())

        asked = [InThread(ask) for _ in range(3)]
        until(lambda: live.worker.state()["waiting"] == 2)
        raw = stack.enter_context(closing(opened(live)))
        assert to_the_end(raw).startswith(b"HTTP/1.1 503")
        gate.open()
        assert [one.result().status_code for one in asked] == [200] * 3


def test_connections_are_less_where_few_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, expected in ((256, 96), (1024, 256), (10, 1), (resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert connections.n_connections(256) == expected


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"x" * 40_000,
    ],
)
def test_a_head_that_is_too_large(tight: Live, sent: bytes) -> None:
    with closing(opened(tight, sent)) as raw:
        answer = to_the_end(raw)
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_chunks_without_end_are_cut_off(engine: PlainEngine, key: str) -> None:
    with running(engine, api_key=KEY, max_body_bytes=20_000) as live:
        chunks = b"1\r\nx\r\n" * 10_000
        with closing(opened(live, head(CHAT, "Transfer-Encoding: chunked", key=key))) as raw:
            send_until_cut_off(raw, chunks)
        until(lambda: not live.server.server_state.connections)
        until(lambda: live.worker.state()["reading"] == 0)


def test_a_refused_body_is_passed_over_and_the_connection_goes_on(tight: Live) -> None:
    body = b"x" * 1000
    wrong = head(CHAT, f"Content-Length: {len(body)}", key="wrong") + body
    with closing(opened(tight, wrong + wrong)) as raw:
        found = b""
        while found.count(b"invalid_api_key") < 2:
            part = raw.recv(1 << 16)
            assert part
            found += part


def test_a_body_is_not_asked_for_where_it_is_refused(tight: Live) -> None:
    # curl asks before it sends a large body. Without the key it is not told to go on.
    asks = head(CHAT, "Content-Length: 1000", "Expect: 100-continue", key="wrong")
    with closing(opened(tight, asks)) as raw:
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 401")


def test_a_full_queue_is_seen_before_the_body(engine: PlainEngine, gate: Gate) -> None:
    gate.close()
    with running(engine, queue=0) as live:
        asks = head(CHAT, "Content-Length: 1000", "Expect: 100-continue")
        with live.client() as client, closing(opened(live, asks)) as raw:
            assert raw.recv(1 << 16).startswith(b"HTTP/1.1 100")
            assert live.worker.state()["reading"] == 1
            assert client.post(CHAT, json=chat_body()).json()["error"]["code"] == "queue_full"
        until(lambda: live.worker.state()["reading"] == 0)
        gate.open()
        with live.client() as client:
            assert client.post(CHAT, json=chat_body()).status_code == 200


def test_a_client_that_never_reads_is_cut_off(engine: PlainEngine) -> None:
    with running(engine, max_connections=4, send_s=SHORT_S) as live:
        [listening] = live.server.servers[0].sockets
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with closing(opened(live)) as raw:
            asks = b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100
            send_until_cut_off(raw, asks)
        until(lambda: not live.server.server_state.connections)
        healthy(live, None)


def test_requests_one_behind_the_other_are_answered_in_order(shared: Live) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    one = head(CHAT, f"Content-Length: {len(body)}") + body
    with closing(opened(shared, one * 3)) as raw:
        found = b""
        while found.count(b"HTTP/1.1 200") < 3:
            part = raw.recv(1 << 16)
            assert part
            found += part


@pytest.mark.slow
def test_health_answers_while_large_bodies_come(engine: PlainEngine, gate: Gate) -> None:
    gate.close()
    body = json.dumps({"prompt": "coins " * 100_000, "max_tokens": 1})
    with running(engine, queue=2, max_body_bytes=2 << 20) as live:

        def ask() -> int:
            with live.client() as client:
                headers = {"Content-Type": "application/json"}
                return client.post(COMPLETIONS, content=body, headers=headers).status_code

        asked = [InThread(ask) for _ in range(6)]
        for _ in range(20):
            healthy(live, None)
        assert {one.result() for one in asked} <= {400, 429}


def test_a_body_is_as_long_as_the_model_can_read(engine: PlainEngine) -> None:
    found = bodies.with_body_limit(ServeConfig("x"), engine.model)
    assert found.max_body_bytes == (64 << 10) + 64 * 256
    assert bodies.with_body_limit(ServeConfig("x", max_body_bytes=5), None).max_body_bytes == 5


def test_a_model_that_does_not_say_how_far_it_reads(loaded: Any) -> None:
    scripted = ScriptedEngine.saying("a", loaded.tokenizer)
    assert bodies.with_body_limit(ServeConfig("x"), scripted.model).max_body_bytes == 4 << 20


@pytest.mark.parametrize("body", [b"1" * 10_000, b'{"prompt": ' + b"9" * 10_000 + b"}",
                                  b'{"a":' * 12_000, b"[" * 60_000])  # fmt: skip
def test_json_that_costs_more_than_its_bytes(shared: Live, body: bytes) -> None:
    with shared.client() as client:
        headers = {"Content-Type": "application/json"}
        found = client.post(COMPLETIONS, content=body, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_lists_without_end_are_not_built(engine: PlainEngine) -> None:
    with running(engine, max_body_bytes=1 << 20) as live:
        answers = []
        for inner in ("[]," * 60_000 + "[]", '"' + "[{" * 60_000 + '\\""'):
            body = f'{{"prompt": "a", "max_tokens": 1, "metadata": [{inner}]}}'.encode()
            with live.client() as client:
                headers = {"Content-Type": "application/json"}
                answers.append(client.post(COMPLETIONS, content=body, headers=headers))
    assert "50000 lists" in answers[0].json()["error"]["message"]
    assert answers[1].status_code == 200, answers[1].text


def test_what_was_streamed_is_whole_for_a_slow_reader(shared: Live) -> None:
    with (
        shared.client() as client,
        client.stream("POST", CHAT, json=chat_body(stream=True)) as answer,
    ):
        time.sleep(0.05)
        answer.read()
    assert events(answer)[-1] == "[DONE]"
