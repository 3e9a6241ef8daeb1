"""One text from a model, token by token, with exact timings: what generate and serve run on.

    settings = GenerationSettings(max_new_tokens=64)
    for piece in generate(model, tokenizer, prompt_ids, settings):
        print(piece.text, end="", flush=True)
    piece.finish  # why it ended, how many tokens, how long

The loop calls the model itself, one forward pass a token, so that a token is out as soon as it is
chosen, and no pass is begun after the last one or after a stop. One text at a time: keys and values
of one sequence are all the state there is, and nothing is kept from one text to the next.

Of generation_config.json the end marks count, and nothing else: no repetition penalty and no
sampling by default. Greedy text is that of `model.generate(do_sample=False)` of a model whose
config asks for neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moebound.errors import MoeboundError
from moebound.text.detokenize import Detokenizer
from moebound.text.encoding import check_tokens
from moebound.text.growing_cache import GrowingCache, arguments, supports_cache
from moebound.text.sampling import Sampler
from moebound.text.stops import StopTexts

SEEDS = range(-(1 << 63), 1 << 63)

Reason = Literal["stop", "length", "cancelled"]
"""stop: an end mark or a stop text. length: max_new_tokens, or the model's positions are full.
cancelled: should_stop said so."""


@dataclass(frozen=True)
class GenerationSettings:
    """max_new_tokens: at most, 1 or more. temperature: 0 takes the most likely token. top_p, seed:
    see `Sampler`. stop: texts; the first of them ends the text, which does not contain it.

    Raises MoeboundError for what is none of this.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MoeboundError(f"max_new_tokens {self.max_new_tokens}: expected 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise MoeboundError(f"temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise MoeboundError(f"top_p {self.top_p}: expected above 0, at most 1")
        if self.seed is not None and self.seed not in SEEDS:
            raise MoeboundError(f"seed {self.seed}: expected an integer of 64 bits")
        StopTexts(self.stop)


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
    """Some whole characters. finish: of the last piece only, whose text may be empty."""

    text: str
    finish: Finish | None = None


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    continues: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Yields the text in pieces as it comes; the last one has `finish`. The text is the pieces.

    model: a causal language model of transformers, in evaluation mode. prompt_ids: as the tokenizer
    makes them, special tokens included. continues: the text goes on from the prompt's instead of
    answering it, so a space between them is part of it (see `Detokenizer`). should_stop: asked
    before every forward pass. Dropping the iterator stops too.

    Raises MoeboundError for a prompt that is empty, leaves no position free or has tokens that the
    model has not, and where the model's output is no number any more.
    """
    room = _room(model, len(prompt_ids), settings.max_new_tokens)
    check_tokens(prompt_ids, model, "the prompt")
    return _pieces(model, tokenizer, prompt_ids, settings, room, continues, should_stop)


def _pieces(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    room: int,
    continues: bool,
    should_stop: Callable[[], bool],
) -> Iterator[Piece]:
    begun = time.perf_counter()
    ends = end_tokens(model, tokenizer)
    text = Detokenizer(tokenizer, after=prompt_ids if continues else ())
    stops = StopTexts(settings.stop)
    sampler = Sampler(settings.temperature, settings.top_p, settings.seed)
    reader = _Reader(model)
    unread = list(prompt_ids)
    n_new, first, last = 0, None, None

    def finish(reason: Reason) -> Finish:
        spent = time.perf_counter() - begun
        return Finish(reason, len(prompt_ids), n_new, first, spent, last)

    reason: Reason | None = None
    while reason is None:
        piece = ""
        if should_stop():
            reason = "cancelled"
            break
        token = sampler.choose(reader.read(unread))
        last = time.perf_counter() - begun
        first, n_new, unread = last if first is None else first, n_new + 1, [token]
        if token in ends:
            reason = "stop"
            break
        piece, stopped = stops.push(text.push(token))
        if stopped:
            yield Piece(piece, finish("stop"))
            return
        if n_new == room:
            reason = "length"
        elif piece:
            yield Piece(piece)
    tail, stopped = stops.push(text.finish())
    if stopped:
        yield Piece(piece + tail, finish("stop"))
    else:
        yield Piece(piece + tail + stops.finish(), finish(reason))


class _Reader:
    """One sequence, read by the model piece after piece."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._taken = arguments(model)
        # A family without the ordinary cache reads everything again for every token: slow, right.
        self._cache = GrowingCache(model.config).cache if supports_cache(model) else None
        self._ids: list[int] = []

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """[vocabulary]: the scores of what follows the sequence once `ids` have joined it."""
        self._ids += ids
        inputs: dict[str, Any] = {"use_cache": self._cache is not None}
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        else:
            ids = self._ids
        if "logits_to_keep" in self._taken:
            inputs["logits_to_keep"] = 1
        batch = torch.tensor([list(ids)], device=self._model.device)
        scores: torch.Tensor = self._model(input_ids=batch, **inputs).logits
        return scores[0, -1]


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
    if n_prompt >= positions:
        raise MoeboundError(
            f"the prompt has {n_prompt} tokens, which leaves no room for an answer in the "
            f"{positions} positions of the model"
        )
    return min(asked, positions - n_prompt)
