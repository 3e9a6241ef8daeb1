"""A text, as it comes from the worker, to the bodies of the OpenAI API.

Whoever asked may leave at any time. Every answer watches for that while it is made, and cancels its
job: nobody waits behind a text that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from moebound.text.generation import Finish, Piece
from moebound.text.logprobs import Likely, TokenLogprob
from moebound.text.serve.errors import ApiError, failed
from moebound.text.serve.worker import Event, Job, Worker

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""A stream that has nothing to say says so this often, or proxies hang up."""

CLIENT_GONE = 499
"""The status, which nobody sees, of an answer to somebody who has left."""

Kind = Literal["chat", "completion"]


class Events:
    """A job's events, handed from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Event]()

    def put(self, event: Event) -> None:
        """From any thread. An event for a loop that is closed is for nobody."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> tuple[int, Piece]:
        """The next piece, and of which text. Raises ApiError for a text that failed."""
        event = await self._queue.get()
        if isinstance(event, Exception):
            raise failed(event)
        return event


@dataclass(frozen=True)
class Format:
    """How the API writes a text: of which kind, by which model, in which answer."""

    kind: Kind
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        object_ = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(object_), "choices": choices, "usage": usage}

    def choice(
        self, index: int, text: str, tokens: list[TokenLogprob] | None, finish: Finish
    ) -> dict[str, Any]:
        """tokens: None where their log probabilities were not asked for."""
        content = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.kind == "chat"
            else {"text": text}
        )
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish.reason,
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, str],
        tokens: Sequence[TokenLogprob] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """delta: what is new of a message; of a completion, its content."""
        content = {"delta": delta} if self.kind == "chat" else {"text": delta.get("content", "")}
        choice = {
            "index": index,
            **content,
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }
        return {**self._head(self._chunk_object), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head(self._chunk_object), "choices": [], "usage": usage}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        if self.kind == "chat":
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [_rivals(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, object_: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": object_,
            "created": self.created,
            "model": self.model,
        }


LEAST_LOGPROB = -9999.0
"""What the API says for a token that cannot be: JSON has no infinity."""


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": None if token.data is None else list(token.data),
        "top_logprobs": [_rival(one) for one in token.top],
    }


def _rival(one: Likely) -> dict[str, Any]:
    data = None if one.data is None else list(one.data)
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": data}


def _rivals(token: TokenLogprob) -> dict[str, float | None] | None:
    """By their text, the token itself among them. Of two with one text, the likelier."""
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for one in token.top:
        found.setdefault(one.text, _finite(one.logprob))
    found.setdefault(token.text, _finite(token.logprob))
    return found


def _usage(job: Job, finishes: Iterable[Finish]) -> dict[str, int]:
    n_new = sum(finish.n_new for finish in finishes)
    return {
        "prompt_tokens": job.n_prompt,
        "completion_tokens": n_new,
        "total_tokens": job.n_prompt + n_new,
    }


class Whole(Response):
    """The texts in one body, when they are done."""

    def __init__(self, worker: Worker, job: Job, events: Events, format_: Format) -> None:
        super().__init__()
        self._worker, self._job, self._events, self._format = worker, job, events, format_

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await unless_gone(receive, self._collect())
        finally:
            self._worker.cancel(self._job)
        await (response or Response(status_code=CLIENT_GONE))(scope, receive, send)

    async def _collect(self) -> Response:
        n = len(self._job.texts)
        texts, tokens = [""] * n, [list[TokenLogprob]() for _ in range(n)]
        finishes = dict[int, Finish]()
        try:
            while len(finishes) < n:
                index, piece = await self._events.get()
                texts[index] += piece.text
                tokens[index] += piece.tokens
                if piece.finish is not None:
                    finishes[index] = piece.finish
        except ApiError as error:
            return error.response()
        choices = [
            self._format.choice(
                index,
                texts[index],
                None if text.settings.logprobs is None else tokens[index],
                finishes[index],
            )
            for index, text in enumerate(self._job.texts)
        ]
        usage = _usage(self._job, finishes.values())
        return JSONResponse(self._format.whole(choices, usage))


class Stream(Response):
    """The texts as server-sent events, a piece an event, of several texts as they come, closed by
    [DONE].

    An error before the first event is an ordinary error body with its status; a later one is an
    event with that body, and ends the stream without [DONE].
    """

    def __init__(
        self, worker: Worker, job: Job, events: Events, format_: Format, *, usage: bool
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._worker, self._job, self._events, self._format = worker, job, events, format_
        self._usage = usage
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(scope, receive, send))
        finally:
            self._worker.cancel(self._job)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send_pieces(send)
        except ApiError as error:
            if not self._begun:
                await error.response()(scope, receive, send)
                return
            await self._send(send, error.body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(self, send: Send) -> None:
        opened, finishes = set[int](), list[Finish]()
        while len(finishes) < len(self._job.texts):
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    index, piece = await self._events.get()
            except TimeoutError:
                await self._send(send, None)
                continue
            if self._format.kind == "chat" and index not in opened:
                begin = {"role": "assistant", "content": ""}
                await self._send_chunk(send, self._format.chunk(index, begin))
                opened.add(index)
            told = None if self._job.texts[index].settings.logprobs is None else piece.tokens
            if piece.text or piece.tokens:
                delta = {"content": piece.text}
                await self._send_chunk(send, self._format.chunk(index, delta, told))
            if piece.finish is not None:
                end = self._format.chunk(index, {}, reason=piece.finish.reason)
                await self._send_chunk(send, end)
                finishes.append(piece.finish)
        if self._usage:
            await self._send(send, self._format.usage_chunk(_usage(self._job, finishes)))
        await self._send(send, "[DONE]")

    async def _send_chunk(self, send: Send, chunk: dict[str, Any]) -> None:
        await self._send(send, {**chunk, "usage": None} if self._usage else chunk)

    async def _send(self, send: Send, data: dict[str, Any] | str | None) -> None:
        """data: an event's; None for a comment, which clients pass over."""
        if not self._begun:
            self._begun = True
            start: Message = {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
            await send(start)
        if isinstance(data, dict):
            # In ASCII: some clients take other line ends than those of events for such.
            data = json.dumps(data, separators=(",", ":"))
        line = ": waiting" if data is None else f"data: {data}"
        body = f"{line}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None as soon as the client has gone; `work` is then cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
