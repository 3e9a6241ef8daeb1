"""Several texts from one model at a time: continuous batching.

    for index, piece in generate_together(model, tokenizer, prompts, settings):
        ...

Each text is made by `generate`, in a strand of its own (`model/strands.py`), with its own keys and
values, sampler and grammar. All texts make a forward pass together: a layer's weights are read, and
its experts fetched and decoded, once for all of them, be it a prompt or one token of an answer. A
text that ends makes room for the next between two passes.

**A text does not depend on its company, to the bit**: it is the same alone, beside others, and
whenever it came. So is what a seed draws. It is that of `generate` up to float rounding, because
products of single rows are computed as those of several (`model/joined.py`); with `most` 1 it is
exactly that. Two kinds of model are excepted, in which sequences share state by themselves: rotary
frequencies of the type `dynamic`, which follow the longest text so far, and any graded fallback.

A prompt is read whole, in one pass, and others wait for that pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from torch import nn

from moebound.errors import MoeboundError
from moebound.model.joined import JoinedLinears
from moebound.model.strands import Strand, Strands, current
from moebound.text.generation import GenerationSettings, Piece, generate
from moebound.text.kv_memory import AHEAD, KvMemory, held_bytes
from moebound.text.one_pass import OnePass

MOST = 8
"""Texts at a time unless something else is said: as many rows as a product has."""

MEASURE_EVERY = 16
"""Passes of a text between two looks at what its keys and values take."""


@dataclass(frozen=True, eq=False)
class Text:
    """One text to generate: what `generate` is called with."""

    prompt_ids: list[int]
    settings: GenerationSettings
    continues: bool = False
    prompt: str | None = None


Tell = Callable[[Piece | Exception], None]
"""Called with each piece of a text, of which the last one has a finish; or with one error."""


@dataclass(eq=False)
class _Running:
    text: Text
    tell: Tell
    should_stop: Callable[[], bool]
    strand: Strand | None = None
    cache: Any = None
    n_tokens: int = 0
    n_bytes: int = 0
    n_passes: int = 0
    last: Piece | None = None

    def told(self) -> bool:
        """Between two passes: everybody is waited for."""
        assert self.strand is not None
        self.strand.rest()
        return self.should_stop()


class Together:
    """Texts of one model, `most` at a time: a context, in which the model's linear layers meet.
    Everything is called from one thread.

    model, tokenizer: as of `generate`. kv_budget: bytes for keys and values of all texts; None for
    no limit. One text always runs; others are taken while the budget has room for what they begin
    with, in order. Where texts outgrow it, the oldest goes on alone until it ends, so memory is
    about the budget and one text at most. begin_sequence: called before each text.
    Raises MoeboundError for `most` or a budget below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        most: int = MOST,
        kv_budget: int | None = None,
        begin_sequence: Callable[[], None] = lambda: None,
    ) -> None:
        if most < 1:
            raise MoeboundError(f"max_sequences {most}: expected 1 or more")
        if kv_budget is not None and kv_budget < 1:
            raise MoeboundError(f"kv_budget {kv_budget}: expected 1 byte or more")
        self.most = 1 if shares_state(model) else most
        self._model, self._tokenizer, self._begin = model, tokenizer, begin_sequence
        self._memory = KvMemory(kv_budget)
        self._running = list[_Running]()
        self._by_strand = dict[Strand, _Running]()
        self._strands = Strands(joins=self.most > 1)
        self._linears: JoinedLinears | None = None
        self._pass: OnePass | None = None
        self._hook: Any = None
        self.paused = 0

    @property
    def running(self) -> int:
        """Texts that have begun and not ended."""
        return len(self._running)

    @property
    def kv_bytes(self) -> int:
        """What their keys, values and states take."""
        return sum(one.n_bytes for one in list(self._running))

    def has_room(self, text: Text) -> bool:
        """Whether this text can begin now; always if there is none."""
        return self.running < self.most and self._memory.fits(
            self.kv_bytes, self.running, len(text.prompt_ids)
        )

    def start(
        self, text: Text, tell: Tell, *, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Begin one, up to its first pass. tell is called from here and from `step`."""
        one = _Running(text, tell, should_stop)
        one.n_bytes = self._memory.expected(len(text.prompt_ids) + AHEAD)
        one.strand = self._strands.start(lambda: self._generate(one))
        self._running.append(one)
        self._by_strand[one.strand] = one
        self._advance([one])

    def step(self) -> None:
        """One forward pass of all texts that are running; without any, nothing."""
        going = list(self._running)
        if self._memory.over(self.kv_bytes):
            # Whoever has been given up may leave, too.
            going = [one for i, one in enumerate(going) if i == 0 or one.should_stop()]
        self.paused = len(self._running) - len(going)
        self._advance(going)

    def __enter__(self) -> Self:
        if isinstance(self._model, nn.Module):
            self._hook = self._model.register_forward_pre_hook(self._passing, with_kwargs=True)
            if self.most > 1:
                self._linears = JoinedLinears(self._model)
                self._pass = OnePass(self._model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for strand in list(self._by_strand):
            strand.end()
        self._running.clear()
        self._by_strand.clear()
        if self._pass is not None:
            self._pass.remove()
        if self._linears is not None:
            self._linears.remove()
        if self._hook is not None:
            self._hook.remove()

    def _advance(self, going: Sequence[_Running]) -> None:
        self._strands.advance([one.strand for one in going if one.strand is not None])
        for one in going:
            assert one.strand is not None
            if not one.strand.dead:
                continue
            self._running.remove(one)
            del self._by_strand[one.strand]
            if one.strand.error is not None:
                one.tell(one.strand.error)
            elif one.last is not None:  # who hears it finds the place free
                one.tell(one.last)
        for one in self._running:
            if one.n_passes % MEASURE_EVERY == 1:
                one.n_bytes = 0 if one.cache is None else held_bytes(one.cache)
                self._memory.saw(one.n_tokens, one.n_bytes)

    def _generate(self, one: _Running) -> None:
        self._begin()
        text = one.text
        for piece in generate(
            self._model,
            self._tokenizer,
            text.prompt_ids,
            text.settings,
            continues=text.continues,
            prompt=text.prompt,
            should_stop=one.told,
        ):
            if piece.finish is None:
                one.tell(piece)
            else:
                one.last = piece

    def _passing(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pass of some text begins."""
        strand = current()
        one = None if strand is None else self._by_strand.get(strand)
        if one is None:
            return
        one.cache = kwargs.get("past_key_values")
        one.n_passes += 1
        ids = kwargs["input_ids"]
        one.n_tokens = one.n_tokens + ids.shape[1] if one.cache is not None else ids.shape[1]


def shares_state(model: Any) -> bool:
    """Whether sequences of this model change each other through the model itself."""
    config = model.config.get_text_config(decoder=True)
    found = list[Any]()
    for name in ("rope_parameters", "rope_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, dict):
            found += [value, *(part for part in value.values() if isinstance(part, dict))]
    return any(part.get("rope_type") == "dynamic" for part in found)


@dataclass(eq=False)
class _Told:
    pieces: deque[tuple[int, Piece]] = field(default_factory=deque)
    errors: list[Exception] = field(default_factory=list)


def generate_together(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    *,
    continues: bool = False,
    most: int = MOST,
    kv_budget: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, Piece], None, None]:
    """Yields pieces of all texts as they come, each with the number of its prompt; of every text
    the last one has a finish. Take them in one thread.

    settings: of all texts, or one for each prompt. Others as of `generate` and `Together`; so are
    the errors. The first error ends everything.
    """
    each = [settings] * len(prompts) if isinstance(settings, GenerationSettings) else list(settings)
    if len(each) != len(prompts):
        raise MoeboundError(
            f"settings: expected one for each of {len(prompts)} prompts, found {len(each)}"
        )
    waiting = deque(
        (index, Text(list(ids), its, continues))
        for index, (ids, its) in enumerate(zip(prompts, each, strict=True))
    )
    told = _Told()

    def teller(index: int) -> Tell:
        def tell(found: Piece | Exception) -> None:
            if isinstance(found, Exception):
                told.errors.append(found)
            else:
                told.pieces.append((index, found))

        return tell

    with Together(model, tokenizer, most=most, kv_budget=kv_budget) as together:
        while waiting or together.running:
            while waiting and together.has_room(waiting[0][1]):
                index, text = waiting.popleft()
                together.start(text, teller(index), should_stop=should_stop)
            together.step()
            while told.pieces:
                yield told.pieces.popleft()
            if told.errors:
                raise told.errors[0]
