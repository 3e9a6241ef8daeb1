"""Greedy decoding of one batch, with nothing in the loop that the model does not need.

Prompts are padded on the left and masked, so a row's tokens see the row and nothing else: in exact
arithmetic an answer does not depend on the rest of the batch. In floating point the sums of a
matrix product may be taken in another order in another batch, and an exact tie of two tokens
may then fall the other way; for the same prompts in the same order the answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from moebound.errors import UnsupportedArchitectureError
from moebound.text.growing_cache import GrowingCache, arguments, supports_cache

KEEP_SHARE = 0.75
"""Finished rows are dropped once less than this share of the batch is at work."""

Stopped = Callable[[list[int]], bool]
"""Whether an answer, so far these tokens, has reached a stop text."""


@dataclass(frozen=True)
class Decoded:
    """tokens: the new ones, without the end mark. finished: it ended before the limit by itself;
    False too where the model's output was no number any more (NaN)."""

    tokens: tuple[int, ...]
    finished: bool


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    ends: frozenset[int],
    pad: int,
    positions: int | None = None,
    stopped: Stopped | None = None,
    ended: Callable[[int], None] | None = None,
) -> list[Decoded]:
    """The most likely token, again and again, until an end mark, a stop text, or the limit.

    prompts: token ids. max_new_tokens: of every answer, or of each. ends: the end marks. pad: any
    token id, for padding (never seen). positions: of prompt and answer together, at most; None for
    no such limit. An answer without room is empty, and not finished. ended: called with how many
    answers have ended, after each token.
    """
    room = rooms(prompts, max_new_tokens, positions)
    if not supports_cache(model):
        return _generate(model, prompts, room, ends=ends, pad=pad)
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    columns = torch.arange(longest, device=device)
    mask = (columns >= longest - lengths.unsqueeze(1)).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = bool((lengths != longest).any())

    growing, taken = GrowingCache(model.config), arguments(model)
    rows = list(range(len(prompts)))  # the row of the batch -> the prompt
    new: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    at_work = [limit > 0 for limit in room]
    if not any(at_work):
        return [Decoded((), False) for _ in prompts]
    while True:
        logits = last_logits(model, ids, mask if padded else None, places, growing, taken)
        best, chosen = logits.max(dim=-1)
        tokens, sound = chosen.tolist(), torch.isfinite(best).tolist()
        for row, (token, is_sound) in enumerate(zip(tokens, sound, strict=True)):
            prompt = rows[row]
            if not at_work[prompt]:
                continue
            if token in ends or not is_sound:
                finished[prompt], at_work[prompt] = is_sound, False
                continue
            new[prompt].append(token)
            if stopped is not None and stopped(new[prompt]):
                finished[prompt], at_work[prompt] = True, False
            elif len(new[prompt]) >= room[prompt]:
                at_work[prompt] = False
        busy = [row for row, prompt in enumerate(rows) if at_work[prompt]]
        if not busy:
            break
        if ended is not None:
            ended(len(prompts) - len(busy))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        places = places[:, -1:] + 1
        ids = chosen.unsqueeze(1)
        if len(busy) < KEEP_SHARE * len(rows) and growing.can_drop():
            kept = torch.tensor(busy, device=device)
            growing.keep(kept)
            ids, mask, places = ids[kept], mask[kept], places[kept]
            rows = [rows[row] for row in busy]
    return [Decoded(tuple(t), done) for t, done in zip(new, finished, strict=True)]


def rooms(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], positions: int | None
) -> list[int]:
    """How many tokens each answer may have."""
    limits = (
        [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    )
    if positions is not None:
        free = [positions - len(prompt) for prompt in prompts]
        limits = [min(limit, left) for limit, left in zip(limits, free, strict=True)]
    return [max(0, limit) for limit in limits]


def last_logits(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    places: torch.Tensor,
    growing: GrowingCache | None,
    taken: frozenset[str],
) -> torch.Tensor:
    """[rows, vocabulary]: what follows the last column. growing: what was read before; None for
    nothing, and nothing is kept. taken: what the model can be given. Raises
    UnsupportedArchitectureError for a model without a head."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    inputs["use_cache"] = growing is not None
    if growing is not None:
        inputs["past_key_values"] = growing.cache
    if "position_ids" in taken:
        inputs["position_ids"] = places
    if "logits_to_keep" in taken:
        inputs["logits_to_keep"] = 1
    logits: torch.Tensor | None = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: gives no scores of the tokens that may follow, so it makes "
            "no text; expected a causal language model"
        )
    return logits[:, -1]


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    *,
    ends: frozenset[int],
    pad: int,
) -> list[Decoded]:
    """The same by transformers' own loop, one prompt at a time: slow, right for every family.

    The model's own generation config is set aside: it may ask for penalties, and for anything but
    the most likely token.
    """
    found, own = list[Decoded](), model.generation_config
    try:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        for prompt, limit in zip(prompts, room, strict=True):
            found.append(_generate_one(model, prompt, limit, ends=ends, pad=pad))
    finally:
        model.generation_config = own
    return found


def _generate_one(
    model: Any, prompt: Sequence[int], limit: int, *, ends: frozenset[int], pad: int
) -> Decoded:
    if limit < 1:  # which `generate` refuses
        return Decoded((), False)
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    tokens = out[0, len(prompt) :].tolist()
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Decoded(tuple(tokens[:end]), end is not None)
