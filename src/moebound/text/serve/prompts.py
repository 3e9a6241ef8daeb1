"""A request to token ids and settings, within the limits of model and server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moebound.errors import CheckpointError
from moebound.text.encoding import check_tokens, encode, encode_chat, n_embeddings
from moebound.text.generation import GenerationSettings, n_positions
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import Engine
from moebound.text.serve.errors import ApiError, bad_request
from moebound.text.serve.schema import ChatRequest, CompletionRequest

Request = ChatRequest | CompletionRequest

COMPLETION_TOKENS = 16
"""New tokens of a completion that says nothing of them, as in the OpenAI API."""
TEMPERATURE = 1.0
"""Of a request that says nothing of it, as in the OpenAI API."""
NEW_TOKENS = 4096
"""Of a chat that says nothing of them, on a model whose config does not say how far it can read."""
TOO_LONG = "context_length_exceeded"


class Prompts:
    """Thread-safe, so that long prompts are tokenized beside the event loop."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self._tokenizer = engine.tokenizer
        self._template = config.chat_template
        self._model, self._vocabulary = engine.model, n_embeddings(engine.model)
        self._positions = n_positions(engine.model)
        self._max_prompt, self._max_new = config.max_prompt_tokens, config.max_new_tokens
        # A tokenizer has settings of truncation and padding that two threads would both touch.
        self._lock = threading.Lock()

    def chat(self, request: ChatRequest) -> tuple[list[int], GenerationSettings]:
        """Through the chat template. Raises ApiError without one, and what _settings raises."""
        if self._template is None and not getattr(self._tokenizer, "chat_template", None):
            raise bad_request(
                "this model's tokenizer has no chat template; use /v1/completions, or start the "
                "server with --chat-template FILE",
                code="no_chat_template",
            )
        messages = [message.for_template() for message in request.messages]
        with self._lock, _refusing("messages"):
            ids = encode_chat(self._tokenizer, messages, template=self._template)
            check_tokens(ids, self._model, "its text")
        return ids, self._settings(request, "messages", ids, default=None)

    def completion(self, request: CompletionRequest) -> tuple[list[int], GenerationSettings]:
        """The prompt as it is, with what the tokenizer adds to any text. Raises ApiError for token
        ids that the model does not have, and what _settings raises."""
        if isinstance(request.prompt, list):
            ids = request.prompt
            for token in ids:
                if not 0 <= token < self._vocabulary:
                    raise bad_request(
                        f"prompt: token {token}: expected 0 to {self._vocabulary - 1}",
                        param="prompt",
                    )
        else:
            with self._lock, _refusing("prompt"):
                ids = encode(self._tokenizer, request.prompt)
                check_tokens(ids, self._model, "its text")
        return ids, self._settings(request, "prompt", ids, default=COMPLETION_TOKENS)

    def _settings(
        self,
        request: Request,
        param: str,
        ids: Sequence[int],
        *,
        default: int | None,
    ) -> GenerationSettings:
        """Raises ApiError where prompt or answer are longer than the limits."""
        return GenerationSettings(
            max_new_tokens=self._new_tokens(request, param, len(ids), default),
            temperature=TEMPERATURE if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=tuple(request.stop),
        )

    def _new_tokens(
        self,
        request: Request,
        param: str,
        n_prompt: int,
        default: int | None,
    ) -> int:
        if n_prompt == 0:
            raise bad_request(f"{param}: has no tokens", param=param)
        if self._max_prompt is not None and n_prompt > self._max_prompt:
            raise _too_long(
                f"{param}: {n_prompt} tokens; this server takes up to {self._max_prompt}", param
            )
        room = None if self._positions is None else self._positions - n_prompt
        if room is not None and room < 1:
            raise _too_long(
                f"{param}: {n_prompt} tokens, which leaves no room for an answer in the "
                f"{self._positions} positions of the model",
                param,
            )
        limits = [limit for limit in (self._max_new, room) if limit is not None]
        field, asked = request.asked_tokens
        if asked is None:
            return min([*limits, default] if default is not None else limits, default=NEW_TOKENS)
        if self._max_new is not None and asked > self._max_new:
            raise bad_request(
                f"{field}: {asked}; this server generates up to {self._max_new}", param=field
            )
        if room is not None and asked > room:
            raise _too_long(
                f"{field}: {n_prompt} tokens of {param} and {asked} new ones are more than the "
                f"{self._positions} positions of the model",
                field,
            )
        return asked


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """What tokenizer or template cannot take is a request that this model cannot answer."""
    try:
        yield
    except CheckpointError as error:
        raise bad_request(f"{param}: {error}", param=param) from error


def _too_long(message: str, param: str) -> ApiError:
    return bad_request(message, param=param, code=TOO_LONG)
