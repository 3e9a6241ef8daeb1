"""Greedy answers to the problems of a task, in batches of prompts of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moebound.errors import TaskError
from moebound.evaluate.decoding import Decoded, decode
from moebound.evaluate.drafts import decode_drafted
from moebound.evaluate.loading import Loaded
from moebound.evaluate.prompting import encode_prompts
from moebound.tasks.base import Problem, Task
from moebound.text.encoding import encode_all
from moebound.text.generation import end_tokens, n_positions

BATCH_BYTES = 2 << 30
"""What keys and values of a batch may take, by a rough estimate from above."""
LARGEST_BATCH = 256
STOP_WINDOW = 24
"""Tokens looked back for a stop text; each has at least one character, and stop texts are short."""

Progress = Callable[[int, int], None]
"""Called with problems answered so far, and problems in all."""


@dataclass(frozen=True)
class Output:
    """One answer. text: without special tokens and surrounding space, cut before a stop text.
    n_tokens: new ones, the end mark not counted. finished: it ended by itself, not at the limit."""

    text: str
    n_tokens: int
    finished: bool


def answer(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    *,
    batch: int | None = None,
    drafts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Output]:
    """One answer a problem, in the order of the problems. Deterministic; see decoding.py.

    batch: prompts at a time; None for as many as BATCH_BYTES allow, at most LARGEST_BATCH. drafts:
    what the answers may be, one a problem, "" where nothing is known; they save time and change
    nothing (see drafts.py). An answer that would not fit the model's positions is cut off there.
    Raises TaskError for a prompt that leaves no room.
    """
    found: dict[int, Output] = {}
    for indices, outputs in answer_in_batches(loaded, task, problems, batch=batch, drafts=drafts):
        found.update(zip(indices, outputs, strict=True))
        if progress is not None:
            progress(len(found), len(problems))
    return [found[index] for index in range(len(problems))]


def answer_in_batches(
    loaded: Loaded,
    task: Task,
    problems: Sequence[Problem],
    *,
    batch: int | None = None,
    drafts: Sequence[str] | None = None,
    ended: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[int], list[Output]]]:
    """Yields indices of problems with their answers, batch by batch, shortest prompts first.

    ended: called, where there are no drafts, with how many answers of the current batch have ended.
    """
    if batch is not None and batch < 1:
        raise TaskError(f"batch {batch}: expected 1 or more")
    prompts = encode_prompts(loaded.tokenizer, task, problems, model=loaded.model)
    positions = n_positions(loaded.model)
    _check_fits(task, problems, prompts, positions)
    ends, pad = end_marks(loaded), _padding(loaded)
    if batch is None:
        batch = _batch(loaded, max(map(len, prompts), default=0) + task.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    stopped = _stop_check(loaded.tokenizer, task.stop)
    # A stop text may begin anywhere: with one, every token is written and looked at.
    guesses = None if drafts is None or stopped is not None else _encoded(loaded.tokenizer, drafts)
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        asked = [prompts[index] for index in indices]
        if guesses is None:
            decoded = decode(
                loaded.model, asked, max_new_tokens=task.max_new_tokens, ends=ends, pad=pad,
                positions=positions, stopped=stopped, ended=ended,
            )  # fmt: skip
        else:
            decoded = decode_drafted(
                loaded.model, asked, [guesses[index] for index in indices],
                max_new_tokens=task.max_new_tokens, ends=ends, pad_token=pad, positions=positions,
            )  # fmt: skip
        yield indices, [_output(loaded.tokenizer, task, one) for one in decoded]


def _encoded(tokenizer: Any, drafts: Sequence[str]) -> list[list[int]]:
    return encode_all(tokenizer, drafts, special=False)


def end_marks(loaded: Loaded) -> frozenset[int]:
    """The tokens that end an answer: those of the generation config and the tokenizer's."""
    return end_tokens(loaded.model, loaded.tokenizer)


def _batch(loaded: Loaded, n_tokens: int) -> int:
    """Answers of n_tokens, prompt included, that are decoded together."""
    config = loaded.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * loaded.model.dtype.itemsize
    return max(1, min(LARGEST_BATCH, int(BATCH_BYTES // (a_token * max(1, n_tokens)))))


def _padding(loaded: Loaded) -> int:
    pad = loaded.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _output(tokenizer: Any, task: Task, decoded: Decoded) -> Output:
    text = str(tokenizer.decode(list(decoded.tokens), skip_special_tokens=True))
    cut = min((at for stop in task.stop if (at := text.find(stop)) >= 0), default=len(text))
    finished = decoded.finished or cut < len(text)
    return Output(text[:cut].strip(), len(decoded.tokens), finished)


def _stop_check(tokenizer: Any, stop: tuple[str, ...]) -> Callable[[list[int]], bool] | None:
    if not stop:
        return None

    def stopped(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-STOP_WINDOW:], skip_special_tokens=True)
        return any(mark in text for mark in stop)

    return stopped


def _check_fits(
    task: Task,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    positions: int | None,
) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        if positions is not None and len(prompt) >= positions:
            raise TaskError(
                f"task {task.name!r}, problem {problem.id!r}: its prompt of {len(prompt)} tokens "
                f"leaves no room for an answer in the {positions} positions of the model"
            )
