"""A signal ends the server in good order: the running request is finished, or told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moebound.cli.main import main
from moebound.errors import MoeboundError
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.server import bind, is_loopback, url

from .live import PATIENCE_S, Gate, Live, chat_body, events, running, texts, until
from .test_queue import ask, fill

SERVE = [sys.executable, "-m", "moebound.cli.main", "serve"]
KEY = "a-key"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the built-in model, compressed."""
    path = tmp_path_factory.mktemp("serve") / "small"
    args = ["compress", "builtin:wordmath", str(path), "--rate", "0.1", "--layers", "1", "-q"]
    assert main(args) == 0
    return path


@pytest.fixture
def command(store: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`moebound serve --json` in a process of its own, and the document it prints."""
    process = subprocess.Popen(
        [*SERVE, str(store), "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "MOEBOUND_API_KEY": KEY},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "it ended"
            text += line
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_no_failure(
    command: tuple[subprocess.Popen[str], dict[str, Any]], sig: signal.Signals
) -> None:
    process, document = command
    assert document["pid"] == process.pid
    assert document["model"] == "small"
    chat = document["url"] + "/chat/completions"
    assert httpx.post(chat, json=chat_body()).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    found = httpx.post(chat, json=chat_body(), headers=headers, timeout=PATIENCE_S)
    assert "\\boxed{25}" in found.json()["choices"][0]["message"]["content"]
    process.send_signal(sig)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert stdout == ""  # one document, and that was read
    assert "1 completed" in stderr
    assert "Traceback" not in stderr


def test_the_address_is_taken_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*SERVE, "builtin:wordmath", "--port", str(port), "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in json.loads(done.stdout)["error"]["message"]
    assert "loading" not in done.stderr


def test_addresses() -> None:
    with bind("localhost", 0) as bound:
        assert is_loopback(bound)
        assert url(bound).startswith("http://")
        assert url(bound).endswith(f":{bound.getsockname()[1]}/v1")
    with bind("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)
    with pytest.raises(MoeboundError, match=r"no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)


def end(live: Live) -> None:
    """What uvicorn does when a signal comes."""
    live.server.handle_exit(signal.SIGTERM, None)
    until(lambda: not live.stats()["alive"])


def test_the_running_request_is_finished_and_the_waiting_are_told(
    engine: PlainEngine, gate: Gate
) -> None:
    with running(engine, queue=2, grace_s=PATIENCE_S) as live:
        first, *waiting = fill(live, gate)
        end(live)
        for one in waiting:
            answer = one.result()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
        gate.open()
        assert first.result().json()["choices"][0]["finish_reason"] == "stop"
    assert [record.outcome for record in live.records] == ["cancelled", "cancelled", "completed"]


@pytest.mark.parametrize("hurry", [False, True])
def test_after_the_grace_time_or_a_second_signal_it_is_cut_off(
    engine: PlainEngine, gate: Gate, hurry: bool
) -> None:
    with running(engine, grace_s=PATIENCE_S if hurry else 0.2) as live:
        gate.close()
        gate.allow(3)
        asked = ask(live, stream=True)
        until(lambda: gate.arrived == 4)
        end(live)
        if hurry:
            live.server.handle_exit(signal.SIGINT, None)
        # Told at once, though the model is still in a forward pass.
        *chunks, error = events(asked.result())
        assert texts(chunks) == "42 -"
        assert error["error"]["code"] == "shutting_down"
        gate.open()
    assert [(record.outcome, record.n_new) for record in live.records] == [("cancelled", 4)]


def test_nobody_is_taken_any_more(engine: PlainEngine, gate: Gate) -> None:
    with running(engine, queue=2) as live, live.client() as client:
        gate.close()
        first = ask(live)
        until(lambda: gate.arrived == 1)
        end(live)
        with pytest.raises(httpx.TransportError):
            client.post("/v1/completions", json={"prompt": "a"})
        gate.open()
        assert first.result().status_code == 200
