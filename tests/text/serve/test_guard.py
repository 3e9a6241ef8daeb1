"""API key, host and size of the body, on every route that there is and on those there are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from moebound.errors import MoeboundError
from moebound.text.serve.app import create_app
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.guard import Guard
from moebound.text.serve.worker import Worker

from .live import NAME, Live, chat_body, running

KEY = "s3cret-key"
WRONG: list[dict[str, Any]] = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": "Bearer"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": b"Bearer \xff\xfe"},
    {"X-Api-Key": KEY},
]


@pytest.fixture(scope="module")
def guarded(engine: PlainEngine) -> Iterator[Live]:
    with running(engine, api_key=KEY, max_body_bytes=2000) as live:
        yield live


def routes(engine: PlainEngine) -> list[tuple[str, str]]:
    config = ServeConfig(NAME)
    app = create_app(engine, config, Worker(engine, 0))
    found = [
        (method, str(getattr(route, "path", "")))
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ["GET"])
    ]
    assert {path for _, path in found} >= {
        "/health", "/stats", "/v1/models", "/v1/chat/completions", "/v1/completions",
    }  # fmt: skip
    return [
        *found, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/nowhere"),
        ("OPTIONS", "/v1/models"), ("HEAD", "/health"), ("GET", "/v1//models"),
    ]  # fmt: skip


@pytest.mark.parametrize("headers", WRONG)
def test_no_route_without_the_key(
    guarded: Live, engine: PlainEngine, headers: dict[str, Any]
) -> None:
    with guarded.client() as client:
        for method, path in routes(engine):
            found = client.request(method, path.replace("{name:path}", NAME), headers=headers)
            assert found.status_code == 401, (method, path)
            assert found.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert found.json()["error"]["code"] == "invalid_api_key"


def test_every_route_with_the_key(guarded: Live) -> None:
    with guarded.client(KEY) as client:
        for path in ("/health", "/stats", "/v1/models", f"/v1/models/{NAME}"):
            assert client.get(path).status_code == 200
        assert client.post("/v1/chat/completions", json=chat_body()).status_code == 200
        assert client.get("/nowhere").status_code == 404


def test_the_key_is_in_no_answer(guarded: Live) -> None:
    with guarded.client() as client:
        assert KEY not in client.get("/health", headers={"Authorization": f"Basic {KEY}"}).text


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "ключ", "line\n"])
def test_a_key_that_no_client_could_send(key: str) -> None:
    with pytest.raises(MoeboundError, match="API key") as caught:
        ServeConfig(NAME, api_key=key)
    assert not key or key not in str(caught.value)


def test_a_body_that_says_it_is_too_large(guarded: Live) -> None:
    with guarded.client(KEY) as client:
        found = client.post("/v1/completions", json={"prompt": "x" * 3000})
    assert found.status_code == 413
    assert found.json()["error"]["code"] == "request_too_large"
    assert "2000 bytes" in found.json()["error"]["message"]


def test_a_body_that_does_not_say_so(guarded: Live) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    with guarded.client(KEY) as client:
        found = client.post("/v1/completions", content=parts(), headers=headers)
    assert found.status_code == 413
    assert found.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200), ("localhost", 200), ("LOCALHOST:8000", 200), ("[::1]:8000", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("[::2]", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_without_a_key_loopback_answers_to_its_own_names(
    shared: Live, host: str, status: int
) -> None:
    with shared.client() as client:
        found = client.get("/health", headers={"Host": host})
    assert found.status_code == status
    if status != 200:
        assert found.json()["error"]["code"] == "host_not_allowed"


def test_with_a_key_any_name_will_do(guarded: Live) -> None:
    with guarded.client(KEY) as client:
        assert client.get("/health", headers={"Host": "gpu.example"}).status_code == 200


async def _never(*_: Any) -> Any:
    raise AssertionError("the application was reached")


def test_nothing_but_http_reaches_the_application() -> None:
    import asyncio

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(_never, api_key=None, hosts=None, max_body_bytes=10)
    asyncio.run(guard({"type": "websocket", "headers": []}, _never, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_length_that_is_none(guarded: Live) -> None:
    # Below httpx, which would not send it. The HTTP parser or the guard refuses it.
    import socket

    host, port = httpx.URL(guarded.root).host, httpx.URL(guarded.root).port
    with socket.create_connection((host, port), timeout=10) as raw:
        raw.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Length: 1e9\r\n\r\n".encode()
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
