"""Pieces are whole characters, and together the text that the tokenizer itself would write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.evaluate.loading import Loaded
from moebound.text.detokenize import UNFINISHED, Detokenizer

from .tokenizers_made import byte_fallback, byte_level

BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()

SENTENCES = st.text(st.sampled_from("ae thc.\n€é日本😀👍🏽"), max_size=40)


def pieces(tokenizer: Any, ids: Sequence[int], after: Sequence[int] = ()) -> list[str]:
    text = Detokenizer(tokenizer, after=after)
    return [*(text.push(token) for token in ids), text.finish()]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(SENTENCES)
def test_text_of_bytes_comes_in_whole_characters(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = encode(tokenizer, text)
        found = pieces(tokenizer, ids)
        assert "".join(found) == decode(tokenizer, ids) == text
        assert not any(UNFINISHED in piece for piece in found)


@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=30))
def test_any_tokens_give_what_decode_gives(ids: list[int]) -> None:
    # Bytes that are no text at all among them.
    assert "".join(pieces(BYTE_LEVEL, ids)) == decode(BYTE_LEVEL, ids)


@given(SENTENCES.filter(bool), SENTENCES)
def test_a_continuation_keeps_its_space(before: str, text: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        after, ids = encode(tokenizer, before), encode(tokenizer, text)
        known = decode(tokenizer, after)
        assert known + "".join(pieces(tokenizer, ids, after)) == decode(tokenizer, [*after, *ids])


def test_a_word_keeps_its_space_only_after_another() -> None:
    the, cat = encode(BYTE_FALLBACK, "the")[0], BYTE_FALLBACK.convert_tokens_to_ids("▁cat")
    assert pieces(BYTE_FALLBACK, [cat])[0] == "cat"
    assert pieces(BYTE_FALLBACK, [cat], after=[the])[0] == " cat"


def test_a_character_is_held_back_until_it_is_whole() -> None:
    ids = encode(BYTE_FALLBACK, "x😀")[-4:]
    assert pieces(BYTE_FALLBACK, ids) == ["", "", "", "😀", ""]


def test_a_character_that_never_ends_is_what_decode_says() -> None:
    ids = encode(BYTE_FALLBACK, "😀")[-4:-1]
    found = pieces(BYTE_FALLBACK, ids)
    assert found[:-1] == ["", "", ""]
    assert found[-1] == decode(BYTE_FALLBACK, ids)


def test_special_tokens_are_left_out() -> None:
    end = BYTE_LEVEL.eos_token_id
    ids = encode(BYTE_LEVEL, "the cat")
    assert "".join(pieces(BYTE_LEVEL, [end, *ids, end])) == "the cat"


@pytest.mark.parametrize("text", ["Eli has 42 coins. \\boxed{25}", '{"answer": 25}', "#### 7"])
def test_words_without_bytes(loaded: Loaded, text: str) -> None:
    ids = encode(loaded.tokenizer, text)
    found = pieces(loaded.tokenizer, ids)
    assert "".join(found) == text
    assert all(found[:-1])  # every token is out at once
