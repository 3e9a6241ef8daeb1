"""The text of a single token, for those who ask for log probabilities."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from moebound.text.detokenize import UNFINISHED

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Of one tokenizer. Each is looked up once.

    The text of a token is what it adds to another one's, so a word has its space before it, also
    where it begins a text. A special token has its name. A token that is a part of a character has
    its bytes, written as the OpenAI API writes them, and where its vocabulary does not tell them,
    U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._found: dict[int, tuple[str, bytes | None]] = {}

    def text(self, token: int) -> str:
        return self._of(token)[0]

    def data(self, token: int) -> bytes | None:
        """What the token adds to the text, in UTF-8; None where that is not known."""
        return self._of(token)[1]

    def _of(self, token: int) -> tuple[str, bytes | None]:
        if token not in self._found:
            self._found[token] = self._look_up(token)
        return self._found[token]

    def _look_up(self, token: int) -> tuple[str, bytes | None]:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._special or name is None:
            return name or "", b""
        before, base = self._anchor
        text = self._decode([*before, token])
        text = text[len(base) :] if text.startswith(base) else self._decode([token])
        if UNFINISHED not in text:
            return text, text.encode("utf-8", "replace")
        data = _bytes_of(name)
        if data is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that another may follow, and its text: a whole word or sign."""
        for token in range(len(self._tokenizer)):
            name = self._tokenizer.convert_ids_to_tokens(token)
            if token in self._special or name is None or _BYTE.fullmatch(name):
                continue
            text = self._decode([token])
            if text.strip() and UNFINISHED not in text:
                return [token], text
        return [], ""

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _bytes_of(name: str) -> bytes | None:
    """Of a byte-level token, or of one that stands for a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    values = {sign: byte for byte, sign in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    found = [values.get(sign) for sign in name]
    return bytes(byte for byte in found if byte is not None) if None not in found else None
