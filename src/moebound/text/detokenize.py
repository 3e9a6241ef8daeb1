"""Token ids to text while they come: every piece is whole characters, and the pieces are the text.

A token need not be a character: byte-level vocabularies split one over several tokens, and others
decide by the neighbour whether a word has a space before it. So a token is never decoded alone.
A window of the last tokens is decoded without and with what is new; the difference is the next
piece, and it is held back as long as it ends in the replacement character, which is what an
unfinished character looks like. (The method of Hugging Face's text-generation-inference.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 8
"""Tokens of the prompt that the first piece is read after."""


class Detokenizer:
    """One text. tokenizer: of transformers. Special tokens are left out.

    after: token ids that the text goes on from. Without them it begins a text, so tokenizers that
    write the space of a word before it leave that of the first word out, as
    `tokenizer.decode(new)` does. With them the space is kept:
    text == decode(after + new)[len(decode(after)):], for any tokenizer that decodes a longer text
    to a continuation of a shorter one.
    """

    def __init__(self, tokenizer: Any, *, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(after)[-CONTEXT_TOKENS:]
        # ids[start:read] is the window, ids[read:] is new. Both move on when a piece goes out.
        self._start, self._read = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come; often the token's, sometimes empty."""
        self._ids.append(token)
        return self._advance(last=False)

    def finish(self) -> str:
        """What was held back. An unfinished character comes as U+FFFD, as decode() writes it."""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED) and not last:
            return ""
        if len(now) <= len(before):  # special tokens, or nothing new
            return ""
        del self._ids[: self._read]
        self._start, self._read = 0, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        # Without clean-up, which would take back a space that is already out.
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
