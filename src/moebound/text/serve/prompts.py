"""A request to token ids and settings, within the limits of model and server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moebound.errors import BackendUnavailable, CheckpointError, MoeboundError
from moebound.text.encoding import check_tokens, encode, encode_chat, n_embeddings
from moebound.text.generation import SEEDS, GenerationSettings, end_tokens, n_positions
from moebound.text.grammar import Grammar
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import Engine
from moebound.text.serve.errors import ApiError, bad_request
from moebound.text.serve.schema import ChatRequest, CompletionRequest
from moebound.text.together import Text

Request = ChatRequest | CompletionRequest

COMPLETION_TOKENS = 16
"""New tokens of a completion that says nothing of them, as in the OpenAI API."""
TEMPERATURE = 1.0
"""Of a request that says nothing of it, as in the OpenAI API."""
NEW_TOKENS = 4096
"""Of a chat that says nothing of them, on a model whose config does not say how far it can read."""
TOO_LONG = "context_length_exceeded"
MOST_LOGPROBS = 4_000_000
"""Log probabilities of one request: each takes memory until it has been sent."""


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

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._template or getattr(self._tokenizer, "chat_template", None))

    def chat(self, request: ChatRequest) -> list[Text]:
        """Through the chat template. Raises ApiError without one, and what _texts raises."""
        if not self.has_chat:
            raise bad_request(
                "this model's tokenizer has no chat template; use /v1/completions, or start the "
                "server with --chat-template FILE",
                code="no_chat_template",
            )
        messages = [message.for_template() for message in request.messages]
        with self._lock, _refusing("messages"):
            ids = encode_chat(self._tokenizer, messages, template=self._template)
            check_tokens(ids, self._model, "its text")
        return self._texts(request, "messages", [(ids, None)], default=None)

    def completion(self, request: CompletionRequest) -> list[Text]:
        """The prompts as they are, with what the tokenizer adds to any text. Raises ApiError for
        token ids that the model does not have, and what _texts raises."""
        prompts = [self._prompt(prompt) for prompt in request.prompt]
        return self._texts(request, "prompt", prompts, default=COMPLETION_TOKENS)

    def _prompt(self, prompt: str | list[int]) -> tuple[list[int], str | None]:
        if isinstance(prompt, str):
            with self._lock, _refusing("prompt"):
                ids = encode(self._tokenizer, prompt)
                check_tokens(ids, self._model, "its text")
            return ids, prompt
        for token in prompt:
            if not 0 <= token < self._vocabulary:
                raise bad_request(
                    f"prompt: token {token}: expected 0 to {self._vocabulary - 1}", param="prompt"
                )
        return prompt, None

    def _texts(
        self,
        request: Request,
        param: str,
        prompts: list[tuple[list[int], str | None]],
        *,
        default: int | None,
    ) -> list[Text]:
        """n of each prompt, one after another. Raises ApiError where prompt or answer are longer
        than the limits, and for what cannot be carried out with this model."""
        for token in request.logit_bias:
            if token >= self._vocabulary:
                raise bad_request(
                    f"logit_bias: token {token}: expected 0 to {self._vocabulary - 1}",
                    param="logit_bias",
                )
        self._check_schema(request.response_format)
        completion = isinstance(request, CompletionRequest)
        found, told = list[Text](), 0
        field, top = request.asked_logprobs
        for ids, text in prompts:
            new = self._new_tokens(request, param, len(ids), default)
            for index in range(request.n or 1):
                settings = self._settings(request, new, index)
                told += 0 if top is None else (new + settings.echo * len(ids)) * (top + 1)
                found.append(Text(ids, settings, continues=completion, prompt=text))
        if told > MOST_LOGPROBS:
            raise bad_request(
                f"{field}: up to {told} log probabilities; one request may have {MOST_LOGPROBS}: "
                "ask for fewer of them, fewer texts or fewer new tokens",
                param=field,
            )
        return found

    def _settings(self, request: Request, new: int, index: int) -> GenerationSettings:
        """index: of n. Each text has a seed of its own, the first one that of the request."""
        seed = request.seed
        if seed is not None:
            seed = (seed + index - SEEDS.start) % (SEEDS.stop - SEEDS.start) + SEEDS.start
        _, logprobs = request.asked_logprobs
        return GenerationSettings(
            max_new_tokens=new,
            temperature=_or(request.temperature, TEMPERATURE),
            top_p=_or(request.top_p, 1.0),
            seed=seed,
            stop=tuple(request.stop),
            top_k=request.top_k or 0,
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            logit_bias=request.logit_bias,
            logprobs=logprobs,
            echo=isinstance(request, CompletionRequest) and bool(request.echo),
            json_schema=request.response_format,
        )

    def _check_schema(self, schema: str | None) -> None:
        """Before the model is asked. Raises ApiError."""
        if schema is None:
            return
        ends = end_tokens(self._model, self._tokenizer)
        try:
            with self._lock:
                grammar = Grammar(self._tokenizer, schema, vocabulary=self._vocabulary, ends=ends)
            grammar.allowed(torch.zeros(self._vocabulary))
        except BackendUnavailable as error:
            raise bad_request(
                f"response_format: {error}", param="response_format", code="unsupported_parameter"
            ) from error
        except MoeboundError as error:
            raise bad_request(f"response_format: {error}", param="response_format") from error

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
        field, asked = request.asked_tokens
        if room is not None and room < (0 if asked == 0 else 1):
            raise _too_long(
                f"{param}: {n_prompt} tokens, which leaves no room for an answer in the "
                f"{self._positions} positions of the model",
                param,
            )
        limits = [limit for limit in (self._max_new, room) if limit is not None]
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


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """What tokenizer or template cannot take is a request that this model cannot answer."""
    try:
        yield
    except CheckpointError as error:
        raise bad_request(f"{param}: {error}", param=param) from error


def _too_long(message: str, param: str) -> ApiError:
    return bad_request(message, param=param, code=TOO_LONG)
