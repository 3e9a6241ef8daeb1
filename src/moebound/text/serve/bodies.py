"""The body of a request: read beside the event loop's other work, within size and time.

Bodies are parsed and made token ids one at a time, in one thread: what that needs beside the body
itself (trees of JSON, tokens and their places) is needed once, however many ask.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from moebound.text.generation import n_positions
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.errors import ApiError, bad_request, invalid

R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")

BYTES_PER_POSITION = 64
"""Of a body, for each token that the model can read: a token is about 4 characters, and JSON writes
one in up to 12 bytes."""
LEAST_BODY_BYTES = 64 << 10
MOST_BODY_BYTES = 4 << 20
MOST_CONTAINERS = 50_000
"""Lists and objects in a body; a message is one, or one and two for each of its parts."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def with_body_limit(config: ServeConfig, model: Any) -> ServeConfig:
    """The settings, with a limit on bodies where nobody has set one: what can fill the model."""
    if config.max_body_bytes is not None:
        return config
    positions = n_positions(model)
    limit = MOST_BODY_BYTES
    if positions is not None:
        limit = min(LEAST_BODY_BYTES + BYTES_PER_POSITION * positions, MOST_BODY_BYTES)
    return replace(config, max_body_bytes=limit)


class Bodies:
    """receive_s: that a body may take to arrive. Its size is counted by `Guard`."""

    def __init__(self, receive_s: float) -> None:
        self._receive_s = receive_s
        self._thread = ThreadPoolExecutor(1, "moebound-requests")

    async def read(self, request: Request) -> bytes:
        """Raises ApiError (408, 413) and ClientDisconnect."""
        if not _is_json(request.headers.get("content-type", "")):
            raise bad_request("expected a JSON object, sent with Content-Type: application/json")
        try:
            async with asyncio.timeout(self._receive_s):
                # Not request.body(), which would keep it for as long as the answer takes.
                return b"".join([part async for part in request.stream()])
        except TimeoutError:
            message = f"the body did not arrive within {self._receive_s:g} s"
            raise ApiError(408, message, code="request_timeout") from None

    async def beside(self, work: Callable[[], T]) -> T:
        """The result of `work`, in the one thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def parse(kind: type[R], body: bytes) -> R:
    """Raises ApiError for a body that is no such request."""
    try:
        text = body.decode("utf-8-sig")
        _check_containers(text)
        found = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("the body has half of a surrogate pair: no text") from None
    except RecursionError:
        raise bad_request("the body is no JSON: nested too deep", code="invalid_json") from None
    except ValueError as error:  # of JSON, of its encoding, or of an integer without end
        reason = getattr(error, "msg", None) or str(error)
        raise bad_request(f"the body is no JSON: {reason}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise bad_request("the body is no JSON object")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise invalid(error) from None


def _check_containers(text: str) -> None:
    """A list of three bytes costs 64 in memory, and building many holds up the event loop."""
    if text.count("[") + text.count("{") <= MOST_CONTAINERS:
        return
    bare = _STRING.sub("", text)
    if bare.count("[") + bare.count("{") > MOST_CONTAINERS:
        raise bad_request(f"the body has more than {MOST_CONTAINERS} lists and objects")


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
