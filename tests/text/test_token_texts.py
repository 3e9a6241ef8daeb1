"""The text of one token, in vocabularies of every kind."""

from __future__ import annotations

from typing import Any

import pytest

from moebound.text.token_texts import TokenTexts

from .tokenizers_made import END, byte_fallback, byte_level


@pytest.mark.parametrize("made", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["the cat sat", "a é € 😀 x"])
def test_the_bytes_of_all_tokens_are_the_text(made: Any, text: str) -> None:
    tokenizer = made()
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    data = b"".join(texts.data(token) or b"" for token in ids).decode()
    assert data.removeprefix(" ") == text


def test_a_part_of_a_character_shows_its_bytes() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        texts = TokenTexts(tokenizer)
        *_, last = tokenizer("😀", add_special_tokens=False)["input_ids"]
        assert texts.text(last) == "bytes:\\x80"
        assert texts.data(last) == b"\x80"


def test_a_special_token_has_its_name_and_no_text() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    assert (texts.text(tokenizer.eos_token_id), texts.data(tokenizer.eos_token_id)) == (END, b"")
    assert texts.text(len(tokenizer) + 3) == ""  # an embedding without a token
