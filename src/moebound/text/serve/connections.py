"""One connection of the server: what a client may take of it before anybody knows who it is.

uvicorn has no limit on any of this: it holds a connection that sends nothing for ever, parses heads
of any size that come at once, and waits without end for a client that does not read.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from moebound.text.serve.config import ServeConfig
from moebound.text.serve.errors import INVALID_REQUEST, ApiError

CHECK_S = 0.25
"""How often connections are looked at."""
LINGER_S = 5.0
"""Beyond `receive_s`, for a body that has been answered already: who still sends it can read the
answer, which closing at once might take away."""
OTHER_FILES = 64
"""Open files that a process needs beside connections."""


def n_connections(asked: int) -> int:
    """`asked`, or what the limit on open files of this process allows: half of what is left, for
    as many again may come before the first of them are closed."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return asked
    return max(1, min(asked, (files - OTHER_FILES) // 2))


class Connection(H11Protocol):
    """HTTP of one client. `limits` and `max_connections` are set on a class made for one server."""

    limits: ServeConfig
    max_connections: int

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._phase: tuple[str, Any] = ("receive", None)
        self._since = self.loop.time()
        self._n_received = 0
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        # In slices, so that a head is refused by its size before it is parsed.
        step = self.limits.max_header_bytes
        for at in range(0, len(data), step):
            if self.transport.is_closing():
                return
            self._n_received += min(step, len(data) - at)
            before = self.cycle
            super().data_received(data[at : at + step])
            if self.cycle is not before:
                self._n_received = 0
        # Framing counts: a body in chunks of one byte is six times as long, and as dear.
        most = 2 * (self.limits.max_body_bytes or 0) + 4 * step
        if self._n_received > most and self._receives_body():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 has refused what came; 431 for a head that is too large."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer has begun, and cannot be another one
            return
        status = getattr(sys.exception(), "error_status_hint", 400)
        if status == 431:
            msg = f"the head is larger than the {self.limits.max_header_bytes} bytes that are taken"
        self._answer(ApiError(status, msg, kind=INVALID_REQUEST))

    def review(self, now: float) -> None:
        """Ends a connection that takes longer than it may for what it does."""
        phase, limit = self._doing()
        if phase != self._phase:
            self._phase, self._since = phase, now
        elif limit is not None and now - self._since > limit:
            self.transport.abort()

    def _doing(self) -> tuple[tuple[str, Any], float | None]:
        """What the connection does, for which request, and how long it may."""
        if self.transport.is_closing() or self.flow.write_paused:
            # Whoever reads, however slowly, makes what is left to send less.
            return ("send", self.transport.get_write_buffer_size()), self.limits.send_s
        if self._receives_body():
            return ("body", self.cycle), self.limits.receive_s + LINGER_S
        if self.cycle is None or self.cycle.response_complete:
            return ("receive", self.cycle), self.limits.receive_s
        return ("answer", self.cycle), None

    def _receives_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _make_room(self) -> None:
        """For this one, by ending the connection that has been without an open request for longest,
        or else that whose client has not read for longest; without any, this one is refused."""
        idle, stuck = list[Connection](), list[Connection]()
        for other in self.connections:
            if not isinstance(other, Connection) or other is self:
                continue
            if other.cycle is None or other.cycle.response_complete:
                idle.append(other)
            elif other.flow.write_paused:
                stuck.append(other)
        if victims := idle or stuck:
            victim = min(victims, key=lambda other: other._since)
            # Out of the set at once: it is closed by the loop, after others may have come.
            self.connections.discard(victim)
            victim.transport.abort()
            return
        message = f"this server has {self.max_connections} connections, all of them at work"
        error = ApiError(503, message, kind="server_error", code="too_many_connections")
        self._answer(error)

    def _answer(self, error: ApiError) -> None:
        """An answer to no request, and the end."""
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=error.status_code, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
