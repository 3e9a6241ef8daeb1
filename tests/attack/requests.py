"""Mutated requests, given to the server's application itself: no socket, no port, no process.

Whatever comes, there is one whole answer: 200, or an error in OpenAI's form with a status below
500. A status of 500 and an exception that leaves the application are wrong; so is an answer to a
request that does not bear the server's key.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moebound.text.serve.app import create_app
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.schema import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest
from moebound.text.serve.worker import Worker

from .cases import Attack, Case, Wrong

KEY, NAME = "secret-key", "tiny"
BODY_BYTES, POSITIONS = 1 << 16, 512
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = [CHAT, COMPLETIONS, "/v1/models", f"/v1/models/{NAME}", "/v1/models/../x", "/health",
         "/stats", "/", "/v1", "/docs", "/openapi.json", "/v1/chat/completions/"]  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FIELDS = sorted({
    *ChatRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED, *IGNORED, "x",
})  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 100, 10**6, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, "",
    "a", "\x00", "é€😀", "a" * 3000, NAME, [], ["a"], [1, 2], [-1], [10**9], [None], [[]], [["a"]],
    {}, {"type": "text"}, {"type": "json_object"}, {"5": 1}, {"include_usage": True},
    {"a": {"b": [1]}},
    [{"role": "user", "content": "a"}], [{"role": "wizard"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
]  # fmt: skip
# As text, because no JSON library writes them.
RAW = [
    "NaN",
    "Infinity",
    "-0",
    "1e999",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 3000,
    "1" * 5000,
    "{}{}",
    "'a'",
]

HEADERS = [b"", b"0", b"-1", b"1e3", b"9" * 40, b"\xff\xfe", b"a" * 5000, b"[", b"[::1",
           b"text/plain", b"application/json; charset=utf-16", b"Basic a", b"Bearer",
           b"Bearer \xc3\xa9", b"bearer  secret-key ", b"\xb2"]  # fmt: skip


class _Model:
    """Three tokens and an end, whatever it is asked."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=POSITIONS)
    )
    generation_config = None

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self.passes = vocabulary, 0

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(self._vocabulary, 1))

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        self.passes += 1
        scores = torch.zeros(1, input_ids.shape[1], self._vocabulary)
        scores[0, -1, 0 if self.passes % 4 == 0 else 10 + self.passes % 200] = 1e4
        return SimpleNamespace(logits=scores)

    forward = __call__


def _tokenizer() -> Any:
    """Bytes are tokens."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)


class Requests(Attack):
    name: ClassVar[str] = "requests"
    limit_s: ClassVar[float] = 60

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tokenizer = _tokenizer()
        engine = SimpleNamespace(
            model=_Model(len(tokenizer)), tokenizer=tokenizer, begin_sequence=lambda: None,
            stats=dict, close=lambda: None,
        )  # fmt: skip
        config = ServeConfig(NAME, api_key=KEY, queue=4, max_body_bytes=BODY_BYTES)
        worker = Worker(engine, config.queue)
        worker.start()
        self._app = create_app(engine, config, worker)
        self._loop = asyncio.new_event_loop()

    def draw(self, rng: random.Random) -> Case:
        path = rng.choice((CHAT, CHAT, COMPLETIONS, COMPLETIONS, rng.choice(PATHS)))
        method = "POST" if rng.random() < 0.9 else rng.choice(("GET", "PUT", "HEAD", "DELETE", "x"))
        fields: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 8)), "temperature": 0}
        usual = {"prompt": "a"} if path == COMPLETIONS else {
            "messages": [{"role": "user", "content": "a"}]}  # fmt: skip
        fields |= usual
        how = [method, path]
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            name, value = rng.choice(FIELDS), rng.choice(VALUES)
            fields[name] = value
            how.append(f"{name}={str(value)[:40]}")
        if rng.random() < 0.3:
            fields["stream"] = True
        body = json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode()
        if rng.random() < 0.3:
            body, what = self._broken(rng, body)
            how.append(what)
        headers = self._headers(rng, body, how)
        pieces = rng.choice((1, 1, 1, 2, 7))
        facts = {"method": method, "path": path, "pieces": pieces, "headers": [
            [base64.b64encode(part).decode() for part in pair] for pair in headers]}  # fmt: skip
        return Case("; ".join(how), {"body": body}, facts)

    def _broken(self, rng: random.Random, body: bytes) -> tuple[bytes, str]:
        way, changed = rng.randrange(6), bytearray(body)
        at = rng.randrange(len(body))
        if way == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del changed[at:]
        elif way == 2:
            changed[at:at] = rng.randbytes(4)
        elif way == 3:
            name, raw = rng.choice(FIELDS), rng.choice(RAW)
            return body[:-1] + f', "{name}": {raw}}}'.encode(), f"{name}={raw[:20]} as text"
        elif way == 4:
            return rng.choice(RAW).encode(), "text that is no object"
        else:
            changed += b" " * rng.choice((BODY_BYTES, BODY_BYTES - len(body), 10))
        return bytes(changed), f"body broken in way {way}"

    def _headers(
        self, rng: random.Random, body: bytes, how: list[str]
    ) -> list[tuple[bytes, bytes]]:
        headers = {b"host": b"localhost", b"content-type": b"application/json",
                   b"authorization": f"Bearer {KEY}".encode(),
                   b"content-length": str(len(body)).encode()}  # fmt: skip
        found = list(headers.items())
        if rng.random() < 0.25:
            name = rng.choice([*headers, b"accept", b"expect", b"transfer-encoding", b"x"])
            value = rng.choice(HEADERS)
            if rng.random() < 0.7:
                found = [pair for pair in found if pair[0] != name]
            found.append((name, value))
            how.append(f"{name.decode()}: {value[:30]!r}")
        elif rng.random() < 0.05:
            gone = rng.choice(list(headers))
            found = [pair for pair in found if pair[0] != gone]
            how.append(f"no {gone.decode()}")
        return found

    def judge(self, case: Case) -> str:
        f = case.facts
        headers = [(base64.b64decode(n), base64.b64decode(v)) for n, v in f["headers"]]
        status, body, n_answers = self._loop.run_until_complete(
            self._ask(f["method"], f["path"], headers, case.files["body"], f["pieces"])
        )
        if n_answers != 1:
            raise Wrong("answers", f"{n_answers} answers: {case.how}")
        if status >= 500:
            raise Wrong(f"status {status}", f"{status} {body[:200]!r}: {case.how}")
        keys = [v.decode("latin-1") for n, v in headers if n == b"authorization"]
        if status == 200 and not any(k.partition(" ")[2].strip() == KEY for k in keys):
            raise Wrong("key", f"answered without the key: {case.how}")
        if status >= 400 and f["method"] != "HEAD":
            error = json.loads(body)["error"]
            if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
                raise Wrong("form", f"an error in another form: {body[:200]!r}: {case.how}")
            body.decode("utf-8")
        return "answered" if status == 200 else "refused"

    async def _ask(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, pieces: int
    ) -> tuple[int, bytes, int]:
        """Status, body, and how many answers began."""
        step = max(1, -(-len(body) // pieces))
        parts = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
        sent: list[Any] = []
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
            "server": ("localhost", 80), "state": {},
        }  # fmt: skip
        await self._app(scope, receive, send)
        done.set()
        begun = [m for m in sent if m["type"] == "http.response.start"]
        text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
        ended = bool(sent) and not sent[-1].get("more_body", False)
        return (begun[0]["status"] if begun else 0), text, len(begun) if ended else -len(begun)
