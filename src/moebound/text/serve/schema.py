"""What a request may say: the fields of the OpenAI API that are carried out here.

Fields that the API has and this server has not are refused unless they ask for nothing, so that
nobody takes an answer for what it is not. Fields that change no answer are accepted. Whatever else
comes is a typing error, and is refused too.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moebound.text.generation import MAX_BIAS, MAX_PENALTY, MAX_TOP_LOGPROBS, SEEDS
from moebound.text.grammar import ANY_OBJECT
from moebound.text.serve.errors import ApiError, bad_request

MAX_STOPS = 16
MAX_CHOICES = 128
"""Texts of one request: its prompts times n."""
MAX_COMPLETION_LOGPROBS = 5

# Field -> values that ask for nothing. None does so in all of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
_WHY = {
    "echo": "a chat has no prompt to repeat",
    "best_of": "it is of /v1/completions",
    "top_logprobs": "of a completion, logprobs says how many",
}


def _stops(value: Any) -> Any:
    found = [value] if isinstance(value, str) else value
    if found is None:
        return []
    if not (isinstance(found, list) and all(isinstance(stop, str) and stop for stop in found)):
        raise ValueError("expected a text or a list of texts, none of them empty")
    if len(found) > MAX_STOPS:
        raise ValueError(f"expected at most {MAX_STOPS} texts, found {len(found)}")
    return found


def _prompts(value: Any) -> Any:
    """One prompt or several, as a list of them: texts and lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, a list of token ids, or a list of such prompts")
    if all(type(token) is int for token in value):
        return [value]
    if len(value) > MAX_CHOICES:
        raise ValueError(f"expected at most {MAX_CHOICES} prompts, found {len(value)}")
    for one in value:
        tokens = isinstance(one, list) and one and all(type(token) is int for token in one)
        if not (isinstance(one, str) or tokens):
            raise ValueError("expected texts or lists of token ids in the list of prompts")
    return value


def _biases(value: Any) -> Any:
    """Token ids are texts in JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("expected an object: a token id and a number each")
    found = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdecimal()):
            raise ValueError(f"expected token ids, found {token!r}")
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if len(token) > 18 or not number or not abs(bias) <= MAX_BIAS:
            raise ValueError(f"token {token}: expected a bias of -{MAX_BIAS:g} to {MAX_BIAS:g}")
        found[int(token)] = float(bias)
    return found


def _schema(value: Any) -> Any:
    """A response_format to a JSON Schema, as text; None for one that asks for plain text."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise ValueError(f"expected type text, json_object or json_schema, found {kind!r}")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ValueError("expected the schema as an object in json_schema.schema")
    return json.dumps(schema)


def _no_false(value: Any) -> Any:
    """logprobs of a completion is a number, but clients of both kinds say false for none."""
    return None if value is False else value


def _top_k(value: Any) -> Any:
    """-1 is vLLM's way to say all tokens."""
    return 0 if value == -1 else value


def _content(value: Any) -> Any:
    """The text of a message, whose parts are joined."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected parts of type 'text', found {kind!r}")
        texts.append(part["text"])
    return "\n".join(texts)


class _Strict(BaseModel):
    """Numbers are numbers, not texts that look like one."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    """include_usage: one more chunk at the end, with the token counts."""

    include_usage: bool | None = None


class Message(_Strict):
    """One message. developer is the new name of system, and reaches the template under the old."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)] = ""

    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class _Request(_Strict):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=SEEDS.start, lt=SEEDS.stop)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    top_k: Annotated[int | None, BeforeValidator(_top_k)] = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = {}
    response_format: Annotated[str | None, BeforeValidator(_schema)] = None

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """(the field that says so, new tokens at most)"""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def asked_logprobs(self) -> tuple[str, int | None]:
        """(the field that says so, rivals of each token whose log probabilities are told)"""

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_rest(self) -> None:
        """Raises ApiError for fields that are not carried out here, naming the first of them."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED:
                if value is not None and not _asks_nothing(value, UNSUPPORTED[name]):
                    raise _unsupported(name)
            elif name not in IGNORED:
                raise bad_request(f"unknown field {name!r}", param=name, code="unknown_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: only goes with stream: true", param="stream_options")


class ChatRequest(_Request):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def asked_logprobs(self) -> tuple[str, int | None]:
        return "top_logprobs", (self.top_logprobs or 0) if self.logprobs else None

    def check_rest(self) -> None:
        super().check_rest()
        if None not in (found := {self.max_tokens, self.max_completion_tokens}) and len(found) > 1:
            raise bad_request(
                "max_tokens and max_completion_tokens say different things", param="max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs: only goes with logprobs: true", param="top_logprobs")
        for index, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if name != "name" and value:  # what a client echoes of an answer is null or empty
                    raise _unsupported(f"messages.{index}.{name}")


class CompletionRequest(_Request):
    """Of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: Annotated[int | None, BeforeValidator(_no_false)] = Field(
        None, ge=0, le=MAX_COMPLETION_LOGPROBS
    )

    @property
    def asked_logprobs(self) -> tuple[str, int | None]:
        return "logprobs", self.logprobs

    def check_rest(self) -> None:
        super().check_rest()
        n = self.n or 1
        if self.best_of not in (None, n):
            raise _unsupported("best_of", f"as many texts are made as n says, {n}")
        if len(self.prompt) * n > MAX_CHOICES:
            raise bad_request(
                f"n: {len(self.prompt)} prompts with {n} texts each; expected at most "
                f"{MAX_CHOICES} texts a request",
                param="n",
            )
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: 0 only goes with echo: true", param="max_tokens")


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """0 == False, but nobody who writes one of them means the other."""
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral)


def _unsupported(name: str, why: str | None = None) -> ApiError:
    why = why or _WHY.get(name, "this server does not have it")
    return bad_request(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
