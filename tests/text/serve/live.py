"""A real server on a free port, in a thread of the test's process, and a gate before its model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import Engine
from moebound.text.serve.server import Server, bind, url
from moebound.text.serve.stats import Record
from moebound.text.serve.worker import Job, Worker

NAME = "wordmath"
PATIENCE_S = 60
"""Nothing here takes so long; a test fails instead of hanging."""

GREEDY = {"temperature": 0}
QUESTION = (
    "Eli has 42 coins. Eli gives 17 coins to Ava. How many coins does Eli have left? "
    "Put the answer in a box."
)


class CountingWorker(Worker):
    """cancels: how many answers have given up their job, or ended."""

    cancels = 0

    def cancel(self, job: Job) -> None:
        super().cancel(job)
        self.cancels += 1


@dataclass
class Live:
    """url: of the API, with /v1. records: of requests that have left."""

    server: Server
    worker: CountingWorker
    url: str
    records: list[Record] = field(default_factory=list)

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.root, headers=headers, timeout=PATIENCE_S)

    def stats(self) -> dict[str, Any]:
        """The server's part of its statistics."""
        return {**self.worker.state(), **self.worker.stats.to_json()}


@contextmanager
def running(engine: Engine, **settings: Any) -> Iterator[Live]:
    """Serves until the block ends, and then shuts down as after a signal. Unless settings say
    otherwise, one text at a time."""
    config = ServeConfig(**{"name": NAME, "max_sequences": 1, **settings})
    bound = bind("127.0.0.1", 0)
    ready, records = threading.Event(), list[Record]()
    worker = CountingWorker(
        engine,
        config.queue,
        most=config.max_sequences,
        kv_budget=config.kv_budget,
        on_record=records.append,
    )
    server = Server(engine, config, bound, worker, on_ready=ready.set)
    live = Live(server, worker, url(bound), records)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield live
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        bound.close()
    assert not thread.is_alive()


class Gate:
    """Before every forward pass of a model. Open unless `close` is called."""

    def __init__(self, model: Any) -> None:
        self._passes = threading.Semaphore(0)
        self._closed = False
        self.arrived = 0
        self._hook = model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.arrived += 1
        if self._closed and not self._passes.acquire(timeout=PATIENCE_S):
            raise TimeoutError("a test has left the gate closed")

    def close(self) -> None:
        self._closed = True

    def allow(self, passes: int) -> None:
        """So many more."""
        self._passes.release(passes)

    def open(self) -> None:
        self._closed = False
        self._passes.release(1000)

    def remove(self) -> None:
        self.open()
        self._hook.remove()


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events, [DONE] as it is."""
    found = []
    for part in response.content.decode("utf-8").split("\n\n"):
        if part.startswith("data: "):
            data = part.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert part == "" or part.startswith(":")
    return found


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": QUESTION}], **GREEDY, **fields}


def texts(chunks: list[Any]) -> str:
    """The text of a streamed answer of either kind."""
    choices = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    return "".join(
        choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        for choice in choices
    )


class InThread:
    """A call in a thread of its own; `result` waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._found.append(call())
            except BaseException as error:
                self._error.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error[0]
        return self._found[0]
