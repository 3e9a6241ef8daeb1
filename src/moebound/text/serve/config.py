"""Settings of a server, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moebound.errors import MoeboundError
from moebound.text.together import MOST


@dataclass(frozen=True)
class ServeConfig:
    """name: of the model, in requests and answers. api_key: what every request must bear; None for
    no key. max_sequences: texts that are generated at a time. kv_budget: bytes for their keys and
    values; None for no limit. queue: requests that may wait beside as many. max_prompt_tokens,
    max_new_tokens: of a request; None for what the model's positions allow. max_body_bytes,
    max_header_bytes: of a request; None for a body that can fill the model's positions
    (`bodies.py`). max_connections: open at a time. receive_s: that the head and then the body of a
    request may take to arrive, and an idle connection may stay. send_s: that a client may take
    nothing of what is sent. grace_s: seconds that running requests are given when the server shuts
    down. chat_template: Jinja, in place of the tokenizer's.

    Raises MoeboundError for what cannot be.
    """

    name: str
    api_key: str | None = None
    queue: int = 16
    max_sequences: int = MOST
    kv_budget: int | None = None
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_body_bytes: int | None = None
    max_header_bytes: int = 16 << 10
    max_connections: int = 256
    receive_s: float = 20.0
    send_s: float = 20.0
    grace_s: float = 10.0
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise MoeboundError("name: expected a name for the model, found an empty one")
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            # The key itself is not shown: messages end up in logs.
            raise MoeboundError(
                "API key: expected one or more printable ASCII characters without spaces"
            )
        if self.queue < 0:
            raise MoeboundError(f"queue {self.queue}: expected 0 or more")
        for option in ("max_sequences", "kv_budget", "max_prompt_tokens", "max_new_tokens",
                       "max_body_bytes", "max_header_bytes", "max_connections"):  # fmt: skip
            value = getattr(self, option)
            if value is not None and value < 1:
                raise MoeboundError(f"{option} {value}: expected 1 or more")
        for option in ("receive_s", "send_s"):
            value = getattr(self, option)
            if not (math.isfinite(value) and value > 0):
                raise MoeboundError(f"{option} {value}: expected more than 0 seconds")
        if not (math.isfinite(self.grace_s) and self.grace_s >= 0):
            raise MoeboundError(f"grace {self.grace_s}: expected 0 seconds or more")
