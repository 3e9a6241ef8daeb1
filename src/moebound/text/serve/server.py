"""From an engine to a process that serves: socket, signals, shutdown."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from moebound.errors import MoeboundError
from moebound.text.serve.app import LAST_PASS_S, create_app
from moebound.text.serve.bodies import with_body_limit
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.connections import CHECK_S, Connection, n_connections
from moebound.text.serve.engine import Engine
from moebound.text.serve.guard import LOOPBACK
from moebound.text.serve.stats import Record
from moebound.text.serve.worker import Worker


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: nobody else gets the address while the
    model is loaded. port: 0 for any that is free. Raises MoeboundError if it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise MoeboundError(f"host {host!r}: {error.strerror or error}") from error
    for family, kind, protocol, _, address in found:
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            bound.close()
            refused = error
        else:
            return bound
    raise MoeboundError(
        f"{host}:{port}: the address cannot be had: {refused.strerror or refused}"
    ) from refused


def url(bound: socket.socket) -> str:
    """Where the API is, as clients want it: http://127.0.0.1:8000/v1"""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def is_loopback(bound: socket.socket) -> bool:
    host = str(bound.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def serve(
    engine: Engine,
    config: ServeConfig,
    bound: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM. Returns the server's statistics.

    bound: as `bind` makes it; closed at the end, as the engine is not. on_ready: called once, when
    requests are taken. on_record: called after each of them, from another thread.

    A signal: no new connections, those that wait get 503, running requests go on for
    config.grace_s and then get 503 too; at a second signal at once.
    """
    worker = Worker(
        engine,
        config.queue,
        most=config.max_sequences,
        kv_budget=config.kv_budget,
        on_record=on_record,
    )
    Server(engine, config, bound, worker, on_ready=on_ready).run(sockets=[bound])
    return worker.stats.to_json()


class Server(uvicorn.Server):
    """uvicorn's, which ends in good order after a signal instead of raising it again."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        bound: socket.socket,
        worker: Worker,
        *,
        on_ready: Callable[[], None],
    ) -> None:
        guarded = config.api_key is not None or not is_loopback(bound)
        hosts = None if guarded else LOOPBACK | {str(bound.getsockname()[0])}
        config = with_body_limit(config, engine.model)
        most = n_connections(config.max_connections)
        settings = uvicorn.Config(
            create_app(engine, config, worker, hosts=hosts),
            log_config=None,  # warnings reach stderr, and stdout stays ours
            access_log=False,
            log_level="error",  # anybody can cause warnings
            http=type("Limited", (Connection,), {"limits": config, "max_connections": most}),
            loop="asyncio",
            backlog=min(128, max(64, most)),  # a shorter one makes new clients wait
            h11_max_incomplete_event_size=config.max_header_bytes,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.grace_s + LAST_PASS_S),
        )
        super().__init__(settings)
        self._worker, self._grace_s, self._on_ready = worker, config.grace_s, on_ready
        self._hurry = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._reviewing = asyncio.create_task(self._review())
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Nothing but flags: a signal may come while this thread holds a lock of the worker.
        self._hurry = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.close()
        ending = asyncio.create_task(self._end_running())
        await super().shutdown(sockets)
        ending.cancel()
        self._reviewing.cancel()

    async def _review(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.review(loop.time())
            await asyncio.sleep(CHECK_S)

    async def _end_running(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_s
        while not self._hurry and loop.time() < deadline:
            await asyncio.sleep(0.05)
        self._worker.cancel_running()
