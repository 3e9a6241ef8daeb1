"""Text comes back as it went in, and nothing of a problem is unknown."""

from __future__ import annotations

import random

import pytest

from moebound.wordmath import problems
from moebound.wordmath.formats import FORMATS, judge
from moebound.wordmath.problems import LEVELS, Level, train_problem
from moebound.wordmath.tokenizer import ANS, BOS, UNK, build_tokenizer, split_words, vocabulary

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("level", LEVELS)
def test_problems_come_back_and_have_no_unknown_word(level: Level) -> None:
    rng = random.Random(3)
    for problem in [
        *problems.test_problems(level),
        *(train_problem(rng, level) for _ in range(500)),
    ]:
        for text in (problem.prompt, problem.reference):
            ids = TOKENIZER.encode(text, add_special_tokens=False).ids
            assert UNK not in ids, text
            assert TOKENIZER.decode(ids) == text
            assert [TOKENIZER.id_to_token(i) for i in ids] == split_words(text)


def test_a_prompt_is_marked_at_both_ends() -> None:
    ids = TOKENIZER.encode("How many books does Ava have?").ids
    assert (ids[0], ids[-1]) == (BOS, ANS)


def test_numbers_are_spelled_in_digits() -> None:
    assert split_words("470 + 5 = 475.") == [
        "▁4", "7", "0", "▁+", "▁5", "▁=", "▁4", "7", "5", ".",
    ]  # fmt: skip


def test_every_format_can_be_written() -> None:
    for name, format_ in FORMATS.items():
        text = TOKENIZER.decode(TOKENIZER.encode(format_.write(9075)).ids)
        assert judge("9075", name, text).ica


def test_an_unknown_word_is_not_an_error() -> None:
    assert UNK in TOKENIZER.encode("Zebra").ids


def test_the_vocabulary_is_the_same_every_time() -> None:
    first, second = vocabulary(), vocabulary()
    assert list(first.items()) == list(second.items())
    assert sorted(first.values()) == list(range(len(first)))
