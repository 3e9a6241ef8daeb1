"""What a request may say: the fields of the OpenAI API that are carried out here.

Fields that the API has and this server has not are refused unless they ask for nothing, so that
nobody takes an answer for what it is not. Fields that change no answer are accepted. Whatever else
comes is a typing error, and is refused too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moebound.text.generation import SEEDS
from moebound.text.serve.errors import ApiError, bad_request

MAX_STOPS = 16

# Field -> values that ask for nothing. None does so in all of them.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
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
_WHY = {"n": "one text a request", "logprobs": "no log probabilities"}


def _stops(value: Any) -> Any:
    found = [value] if isinstance(value, str) else value
    if found is None:
        return []
    if not (isinstance(found, list) and all(isinstance(stop, str) and stop for stop in found)):
        raise ValueError("expected a text or a list of texts, none of them empty")
    if len(found) > MAX_STOPS:
        raise ValueError(f"expected at most {MAX_STOPS} texts, found {len(found)}")
    return found


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if value and all(type(token) is int for token in value):
            return value
        if len(value) > 1 and all(isinstance(one, (str, list)) for one in value):
            raise ValueError(f"expected one prompt a request, found {len(value)}")
    raise ValueError("expected a text or a list of token ids")


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

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """(the field that says so, new tokens at most)"""
        return "max_tokens", self.max_tokens

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

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    def check_rest(self) -> None:
        super().check_rest()
        if None not in (found := {self.max_tokens, self.max_completion_tokens}) and len(found) > 1:
            raise bad_request(
                "max_tokens and max_completion_tokens say different things", param="max_tokens"
            )
        for index, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if name != "name" and value:  # what a client echoes of an answer is null or empty
                    raise _unsupported(f"messages.{index}.{name}")


class CompletionRequest(_Request):
    """Of /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """0 == False, but of a completion's logprobs 0 asks for those of the tokens themselves."""
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral)


def _unsupported(name: str) -> ApiError:
    why = _WHY.get(name, "this server does not have it")
    return bad_request(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
