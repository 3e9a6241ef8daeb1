"""Training batches: a fixed number of tokens, no padding.

Step s of seed r is always the same batch, whatever came before, so nothing about the data has to be
saved to resume a run. Sequences lie one behind the other; only attention needs them as rows, and
`groups` says how to lay them out: problems of one level together, since theirs are of like length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from moebound.wordmath.problems import LEVELS, train_problem
from moebound.wordmath.tokenizer import ANS, BOS, EOS, PAD, split_words, vocabulary

_VOCABULARY: dict[str, int] = {}
_ALIGN = 16  # rows of attention weights that fill whole vector registers


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences as rows. gather: [rows, longest], the place of each token among all (0 for
    padding). scatter: [tokens], where in the flattened rows the group's tokens are."""

    gather: torch.Tensor
    scatter: torch.Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """tokens, positions: [n_tokens]. groups: in order, their tokens are all tokens.
    solution: places whose next token is part of a solution. targets: that token."""

    tokens: torch.Tensor
    positions: torch.Tensor
    groups: list[Group]
    solution: torch.Tensor
    targets: torch.Tensor


def batch(seed: int, step: int, n_tokens: int, easy_share: float) -> Batch:
    """easy_share: the fraction of tokens that are of level `wordmath`; the rest is `-hard`."""
    rng = random.Random(f"train/{seed}/{step}")
    easy_tokens = round(n_tokens * easy_share)
    levels = [(LEVELS[0], easy_tokens), (LEVELS[1], n_tokens - easy_tokens)]
    tokens: list[int] = []
    positions: list[int] = []
    solution: list[int] = []
    targets: list[int] = []
    groups: list[Group] = []
    for level, room in levels:
        sequences: list[list[int]] = []
        start = len(tokens)
        while len(tokens) - start < room:
            problem = train_problem(rng, level)
            prompt = [BOS, *_ids(problem.prompt), ANS]
            whole = [*prompt, *_ids(problem.reference), EOS]
            whole = whole[: room - (len(tokens) - start)]  # the last sequence is cut to fit
            first = len(prompt) - 1
            for place in range(first, len(whole) - 1):
                solution.append(len(tokens) + place)
                targets.append(whole[place + 1])
            tokens += whole
            positions += range(len(whole))
            sequences.append(whole)
        if sequences:
            groups.append(_group(start, [len(s) for s in sequences]))
    return Batch(
        torch.tensor(tokens),
        torch.tensor(positions),
        groups,
        torch.tensor(solution),
        torch.tensor(targets),
    )


def _group(start: int, lengths: list[int]) -> Group:
    longest = -(-max(lengths) // _ALIGN) * _ALIGN
    gather = torch.zeros(len(lengths), longest, dtype=torch.long)
    scatter = []
    for row, length in enumerate(lengths):
        gather[row, :length] = torch.arange(start, start + length)
        scatter.append(torch.arange(length) + row * longest)
        start += length
    return Group(gather, torch.cat(scatter))


def _ids(text: str) -> list[int]:
    if not _VOCABULARY:
        _VOCABULARY.update(vocabulary())
    return [_VOCABULARY[word] for word in split_words(text)]


assert PAD == 0
