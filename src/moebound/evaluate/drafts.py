"""Greedy answers from drafts: what is guessed right is read at once, and only the rest written.

A model with a small error in it mostly answers what the model without it did. That answer is its
draft: one pass over prompt and draft says, at every place, which token the model would write after
the tokens before. Up to the first place where that is another token the draft is the model's own
greedy answer; from there on it is written as usual (`decoding.py`). So the answers are the same
with any draft, up to ties of two tokens that rounding decides; a good one saves most of the time.
A model whose positions depend on how much is read at once gets no draft: to it, what comes before
would be another text.

Speculative decoding (Leviathan et al., 2211.17192) with a draft that is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from moebound.evaluate.decoding import Decoded, decode, rooms
from moebound.evaluate.text import batches, pad

READ_TOKENS = 4096
"""Tokens read at once, padding counted."""


def decode_drafted(
    model: Any,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    pad_token: int,
    positions: int | None = None,
) -> list[Decoded]:
    """What `decode` gives for these prompts, without a stop text.

    drafts: token ids, without the end mark, one for each prompt; an empty one is no help. The
    other arguments are those of `decode`.
    """
    room = rooms(prompts, max_new_tokens, positions)
    if _positions_depend_on_length(model):
        return decode(model, prompts, max_new_tokens=room, ends=ends, pad=pad_token)
    n_known = model.get_input_embeddings().num_embeddings
    rows = [
        (list(prompt), _readable(draft, n_known)[: max(0, limit)])
        for prompt, draft, limit in zip(prompts, drafts, room, strict=True)
    ]
    agreed, ended = _agreement(model, rows, ends=ends, pad_token=pad_token)
    # An answer at its limit is cut off, whatever would have come next: nobody asks for that token.
    found: list[Decoded | None] = [
        Decoded(tuple(draft[:n]), end and n < limit) if end or n >= limit else None
        for (_, draft), n, end, limit in zip(rows, agreed, ended, room, strict=True)
    ]
    left = [index for index, one in enumerate(found) if one is None]
    if left:
        written = [rows[index][1][: agreed[index]] for index in left]
        rest = decode(
            model,
            [rows[index][0] + tokens for index, tokens in zip(left, written, strict=True)],
            max_new_tokens=[room[index] - agreed[index] for index in left],
            ends=ends,
            pad=pad_token,
        )
        for index, tokens, more in zip(left, written, rest, strict=True):
            found[index] = Decoded((*tokens, *more.tokens), more.finished)
    return [one for one in found if one is not None]


def _readable(draft: Sequence[int], n_known: int) -> list[int]:
    """Up to the first token that the model has no embedding for."""
    return list(takewhile(lambda token: 0 <= token < n_known, draft))


def _positions_depend_on_length(model: Any) -> bool:
    """Whether rotary angles change with the longest position of a pass."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


@torch.inference_mode()
def _agreement(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    *,
    ends: frozenset[int],
    pad_token: int,
) -> tuple[list[int], list[bool]]:
    """Of each (prompt, draft): how many tokens of the draft the model writes too, and whether it
    ends there."""
    agreed, ended = [0] * len(rows), [False] * len(rows)
    for indices in batches(rows, READ_TOKENS):
        batch = pad([rows[index] for index in indices], pad_token)
        logits = model(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device),
            use_cache=False,
        ).logits
        best, chosen = (part.cpu() for part in logits.max(dim=-1))
        sound = torch.isfinite(best)
        for place, index in enumerate(indices):
            prompt, draft = rows[index]
            after = slice(len(prompt) - 1, len(prompt) + len(draft))
            tokens, numbers = chosen[place, after].tolist(), sound[place, after].tolist()
            n = 0
            while n < len(draft) and numbers[n] and tokens[n] == draft[n] and tokens[n] not in ends:
                n += 1
            agreed[index] = n
            ended[index] = bool(numbers[n]) and tokens[n] in ends
    return agreed, ended
