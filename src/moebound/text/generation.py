"""One text from a model, token by token, with exact timings: what generate and serve run on.

    settings = GenerationSettings(max_new_tokens=64)
    for piece in generate(model, tokenizer, prompt_ids, settings):
        print(piece.text, end="", flush=True)
    piece.finish  # why it ended, how many tokens, how long

The loop calls the model itself, one forward pass a token, so that a token is out as soon as it is
chosen, and no pass is begun after the last one or after a stop. One text: keys and values of one
sequence are all the state there is, and nothing is kept from one text to the next. `together.py`
makes several of these at a time.

Of generation_config.json the end marks count, and nothing else: no repetition penalty and no
sampling by default. Greedy text is that of `model.generate(do_sample=False)` of a model whose
config asks for neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from moebound.errors import MoeboundError
from moebound.text.detokenize import Detokenizer
from moebound.text.encoding import check_tokens, n_embeddings
from moebound.text.grammar import Grammar
from moebound.text.growing_cache import GrowingCache, arguments, supports_cache
from moebound.text.logprobs import Logprobs, TokenLogprob
from moebound.text.penalties import Penalties
from moebound.text.sampling import Sampler
from moebound.text.stops import StopTexts
from moebound.text.token_texts import TokenTexts

SEEDS = range(-(1 << 63), 1 << 63)
MAX_PENALTY = 2.0
"""Of presence and frequency, either way, as in the OpenAI API."""
MAX_BIAS = 100.0
"""Of a token's score, either way, as in the OpenAI API. It bans a token, or makes it certain."""
MAX_TOP_LOGPROBS = 20
SCORES_AT_ONCE = 1 << 25
"""Of a prompt whose tokens are scored: it is read in parts with about so many scores."""

Reason = Literal["stop", "length", "cancelled"]
"""stop: an end mark or a stop text. length: max_new_tokens, or the model's positions are full.
cancelled: should_stop said so."""


@dataclass(frozen=True)
class GenerationSettings:
    """max_new_tokens: at most; 1 or more, or with echo 0. temperature: 0 takes the most likely
    token. top_p, top_k, min_p, seed: see `Sampler`. stop: texts; the first of them ends the text,
    which does not contain it. repetition_penalty, presence_penalty, frequency_penalty, logit_bias:
    see `Penalties`; they count at temperature 0 too. logprobs: tell them of every token, with so
    many of its rivals; None for none. echo: the text begins with the prompt. json_schema: JSON
    Schema, as text, that the text keeps to (`Grammar`).

    Raises MoeboundError for what is none of this.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    echo: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < (0 if self.echo else 1):
            raise MoeboundError(f"max_new_tokens {self.max_new_tokens}: expected 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise MoeboundError(f"temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise MoeboundError(f"top_p {self.top_p}: expected above 0, at most 1")
        if self.seed is not None and self.seed not in SEEDS:
            raise MoeboundError(f"seed {self.seed}: expected an integer of 64 bits")
        StopTexts(self.stop)
        if self.top_k < 0:
            raise MoeboundError(f"top_k {self.top_k}: expected 1 or more, or 0 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise MoeboundError(f"min_p {self.min_p}: expected 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise MoeboundError(f"repetition_penalty {self.repetition_penalty}: expected above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) <= MAX_PENALTY:
                raise MoeboundError(f"{name} {value}: expected {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not abs(bias) <= MAX_BIAS:
                raise MoeboundError(
                    f"logit_bias {bias} of token {token}: expected {-MAX_BIAS:g} to {MAX_BIAS:g} "
                    "of a token id"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise MoeboundError(f"logprobs {self.logprobs}: expected 0 to {MAX_TOP_LOGPROBS}")


@dataclass(frozen=True)
class Finish:
    """How a text ended.

    n_prompt, n_new: tokens; the end mark counts as new. first_token_s: from the start to the first
    token, which is mostly the prompt's forward pass; None where none came. total_s: to the end.
    """

    reason: Reason
    n_prompt: int
    n_new: int
    first_token_s: float | None
    total_s: float
    last_token_s: float | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Of the tokens behind the first (TPOT); None where there are none."""
        if self.n_new < 2 or self.first_token_s is None or self.last_token_s is None:
            return None
        return (self.last_token_s - self.first_token_s) / (self.n_new - 1)


@dataclass(frozen=True)
class Piece:
    """Some whole characters. finish: of the last piece only, whose text may be empty. tokens: with
    logprobs, those that begin in this text and have not been told before; of the last piece also
    those without text. Behind a stop text there are none."""

    text: str
    finish: Finish | None = None
    tokens: tuple[TokenLogprob, ...] = ()


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    continues: bool = False,
    prompt: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Yields the text in pieces as it comes; the last one has `finish`. The text is the pieces.

    model: a causal language model of transformers, in evaluation mode. prompt_ids: as the tokenizer
    makes them, special tokens included. continues: the text goes on from the prompt's instead of
    answering it, so a space between them is part of it (see `Detokenizer`). prompt: its text, for
    echo; None for what its tokens are decoded to. should_stop: asked before every forward pass.
    Dropping the iterator stops too.

    Raises MoeboundError for a prompt that is empty, leaves no position free or has tokens that the
    model has not, for a bias on such a token, for a schema that cannot be carried out, and where
    the model's output is no number any more.
    """
    room = _room(model, len(prompt_ids), settings.max_new_tokens)
    check_tokens(prompt_ids, model, "the prompt")
    check_tokens(settings.logit_bias, model, "logit_bias")
    return _Text(model, tokenizer, list(prompt_ids), settings, room, continues, should_stop).pieces(
        prompt
    )


class _Text:
    """One text while it is made."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt_ids: list[int],
        settings: GenerationSettings,
        room: int,
        continues: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        self._model, self._tokenizer, self._prompt_ids = model, tokenizer, prompt_ids
        self._settings, self._room, self._continues = settings, room, continues
        self._should_stop = should_stop
        self._begun = 0.0
        self._n_new = 0
        self._first: float | None = None
        self._last: float | None = None
        # Characters that have gone out, and characters that are certain: stop texts hold back.
        self._out, self._certain = 0, 0
        self._untold: list[TokenLogprob] = []

    def pieces(self, prompt: str | None) -> Iterator[Piece]:
        self._begun = time.perf_counter()
        settings, tokenizer = self._settings, self._tokenizer
        ends = end_tokens(self._model, tokenizer)
        text = Detokenizer(tokenizer, after=self._prompt_ids if self._continues else ())
        stops = StopTexts(settings.stop)
        sampler = Sampler(
            settings.temperature, settings.top_p, settings.seed,
            top_k=settings.top_k, min_p=settings.min_p,
        )  # fmt: skip
        penalties = Penalties(
            self._prompt_ids,
            repetition=settings.repetition_penalty,
            presence=settings.presence_penalty,
            frequency=settings.frequency_penalty,
            bias=settings.logit_bias,
        )
        grammar = None
        if settings.json_schema is not None:
            vocabulary = n_embeddings(self._model)
            grammar = Grammar(tokenizer, settings.json_schema, vocabulary=vocabulary, ends=ends)
        logprobs = None
        if settings.logprobs is not None:
            logprobs = Logprobs(TokenTexts(tokenizer), settings.logprobs)
        reader = _Reader(self._model)
        unread = self._prompt_ids
        reason: Reason | None = None
        piece = ""
        if settings.echo:
            if logprobs is not None:
                # All but the last token: what comes after that one is chosen below.
                for tokens in self._scored_prompt(reader, logprobs):
                    self._untold += tokens
                    if self._should_stop():
                        reason = "cancelled"
                        break
                unread = self._prompt_ids[-1:]
            shown = self._decoded_prompt() if prompt is None else prompt
            self._certain = len(shown)
            if reason is None and self._room:
                yield self._piece(shown, all_tokens=True)
            elif reason is None:
                yield self._piece(shown, "length")
                return
        while reason is None:
            piece = ""
            if self._should_stop():
                reason = "cancelled"
                break
            scores = reader.read(unread)
            allowed = penalties.apply(scores)
            if grammar is not None:
                allowed = grammar.allowed(allowed)
            token = sampler.choose(allowed)
            penalties.add(token)
            self._last = time.perf_counter() - self._begun
            self._first = self._last if self._first is None else self._first
            self._n_new, unread = self._n_new + 1, [token]
            if logprobs is not None:
                self._untold.append(logprobs.of(token, scores, self._certain))
            if token in ends:
                reason = "stop"
                break
            said = text.push(token)
            self._certain += len(said)
            piece, stopped = stops.push(said)
            if stopped:
                yield self._piece(piece, "stop", stopped=True)
                return
            if grammar is not None and grammar.add(token):
                reason = "stop"
            elif self._n_new == self._room:
                reason = "length"
            elif piece:
                yield self._piece(piece)
        tail, stopped = stops.push(text.finish())
        if stopped:
            yield self._piece(piece + tail, "stop", stopped=True)
        else:
            yield self._piece(piece + tail + stops.finish(), reason)

    def _piece(
        self,
        text: str,
        reason: Reason | None = None,
        *,
        stopped: bool = False,
        all_tokens: bool = False,
    ) -> Piece:
        """stopped: by a stop text, so what lies behind the text is not told."""
        self._out += len(text)
        if all_tokens or (reason is not None and not stopped):
            told, self._untold = self._untold, []
        else:
            count = next(
                (at for at, token in enumerate(self._untold) if token.offset >= self._out),
                len(self._untold),
            )
            told, self._untold = self._untold[:count], self._untold[count:]
        finish = None
        if reason is not None:
            spent = time.perf_counter() - self._begun
            finish = Finish(
                reason, len(self._prompt_ids), self._n_new, self._first, spent, self._last
            )
        return Piece(text, finish, tuple(told))

    def _scored_prompt(self, reader: _Reader, logprobs: Logprobs) -> Iterator[list[TokenLogprob]]:
        """All tokens of the prompt, in parts; all but the last one have been read then."""
        ids, offsets = self._prompt_ids, self._prompt_offsets()
        yield [logprobs.of(ids[0], None, 0)]
        step = max(1, SCORES_AT_ONCE // n_embeddings(self._model))
        for start in range(0, len(ids) - 1, step):
            end = min(start + step, len(ids) - 1)
            scores = reader.read_all(ids[start:end])
            yield logprobs.of_all(ids[start + 1 : end + 1], scores, offsets[start + 1 : end + 1])

    def _prompt_offsets(self) -> list[int]:
        text, at, offsets = Detokenizer(self._tokenizer), 0, []
        for token in self._prompt_ids:
            offsets.append(at)
            at += len(text.push(token))
        return offsets

    def _decoded_prompt(self) -> str:
        text = Detokenizer(self._tokenizer)
        return "".join(text.push(token) for token in self._prompt_ids) + text.finish()


class _Reader:
    """One sequence, read by the model piece after piece."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._taken = arguments(model)
        # A family without the ordinary cache reads everything again for every token: slow, right.
        self._cache = GrowingCache(model.config).cache if supports_cache(model) else None
        self._ids: list[int] = []

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """[vocabulary]: the scores of what follows the sequence once `ids` have joined it."""
        return self._read(ids, 1)[-1]

    def read_all(self, ids: Sequence[int]) -> torch.Tensor:
        """[ids, vocabulary]: the same after each of them."""
        return self._read(ids, len(ids))[-len(ids) :]

    @torch.no_grad()
    def _read(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        self._ids += ids
        inputs: dict[str, Any] = {"use_cache": self._cache is not None}
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        else:
            ids = self._ids
        if "logits_to_keep" in self._taken:
            inputs["logits_to_keep"] = keep
        batch = torch.tensor([list(ids)], device=self._model.device)
        scores: torch.Tensor = self._model(input_ids=batch, **inputs).logits
        return scores[0]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the generation config and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = set(found) if isinstance(found, (list, tuple)) else {found}
    ends.add(tokenizer.eos_token_id)
    return frozenset(int(end) for end in ends if end is not None)


def n_positions(model: Any) -> int | None:
    """How many tokens the model can read; None where its config does not say."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _room(model: Any, n_prompt: int, asked: int) -> int:
    """New tokens at most."""
    if n_prompt == 0:
        raise MoeboundError("the prompt has no tokens: expected 1 or more")
    positions = n_positions(model)
    if positions is None:
        return asked
    if n_prompt + min(asked, 1) > positions:
        raise MoeboundError(
            f"the prompt has {n_prompt} tokens, which leaves no room for an answer in the "
            f"{positions} positions of the model"
        )
    return min(asked, positions - n_prompt)
