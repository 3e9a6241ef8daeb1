"""Before any route, and for all of them: API key, host, and size of the body."""

from __future__ import annotations

import hashlib
import hmac
import sys
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moebound.text.serve.errors import ApiError, bad_request
from moebound.text.serve.page import Page

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """ASGI middleware. api_key: that every request must bear; None for no key. hosts: that requests
    may be addressed to; None for any. max_body_bytes: of one request. page: what a browser that has
    no key gets with its 401, to enter one.

    hosts are for a server on loopback without a key: the browser of the machine it runs on carries
    requests of any page there, if the page's own name is made to point to loopback (DNS rebinding);
    such requests have that name as their host.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Collection[str] | None,
        max_body_bytes: int | None,
        max_header_bytes: int = 16 << 10,
        page: Page | None = None,
    ) -> None:
        self._app, self._page = app, page
        self._digest = None if api_key is None else _digest(api_key)
        self._hosts = hosts
        self._max_body_bytes = sys.maxsize if max_body_bytes is None else max_body_bytes
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks anything else
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            headers = Headers(scope=scope)
            self._check_head(scope)
            self._check_host(headers)
            self._check_key(headers)
            self._check_length(headers)
        except ApiError as error:
            response: Response = error.response()
            if error.status_code == 401 and self._page is not None and self._page.wanted(scope):
                # A browser cannot bear a key before it has a page that asks for one.
                response = self._page.response(401, error.headers)
            await response(scope, receive, _closing(headers, send))
            return
        reading = _Counted(receive, self)
        await self._app(scope, reading, _closing(headers, send, reading))

    def _check_head(self, scope: Scope) -> None:
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes:
            raise ApiError(
                431,
                f"the head is larger than the {self._max_header_bytes} bytes that are taken",
                code="headers_too_large",
            )

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None or "host" not in headers:
            return
        name = _host_name(headers["host"])
        if name not in self._hosts:
            raise ApiError(
                403,
                f"host {name!r}: without an API key this server answers to "
                f"{', '.join(sorted(self._hosts))} only",
                code="host_not_allowed",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._digest is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests are of one length, and comparing them takes as long whatever the key is.
        right = hmac.compare_digest(_digest(key.strip()), self._digest)
        if not (right and scheme.lower() == "bearer"):
            raise ApiError(
                401,
                "expected the server's API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            raise bad_request(f"Content-Length {length!r}: expected a number")
        if len(length) > 18 or int(length) > self._max_body_bytes:
            raise self._too_large()

    def check_size(self, received: int) -> None:
        """Raises ApiError for a body that has grown beyond the limit."""
        if received > self._max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than the {self._max_body_bytes} bytes that this server takes",
            code="request_too_large",
        )


class _Counted:
    """receive, for bodies that do not say how long they are. whole: all of it has come."""

    def __init__(self, receive: Receive, guard: Guard) -> None:
        self._receive, self._guard = receive, guard
        self._n, self.whole = 0, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._n += len(message.get("body", b""))
        self._guard.check_size(self._n)
        if not message.get("more_body", False):
            self.whole = True
        return message


def _closing(headers: Headers, send: Send, reading: _Counted | None = None) -> Send:
    """send, which closes the connection behind an answer to a chunked body that has not been read:
    nothing says how much of it is still to come. What a Content-Length announces is passed over,
    and the connection goes on."""
    if "transfer-encoding" not in headers:
        return send

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and not (reading and reading.whole):
            message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
        await send(message)

    return closing


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """Without the port, and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
