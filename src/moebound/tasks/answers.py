"""Finding an answer in a text: in a box, behind #### , in a sentence, in JSON, or as a number."""

from __future__ import annotations

import json
import re

NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SENTENCE = re.compile(r"answer\s+is:?\s+([^\n]+?)(?=\.?\s*(?:\n|\Z)|\.\s)", re.IGNORECASE)
_ESCAPES = str.maketrans("", "", "$ \u00a0")


def boxed(text: str) -> list[str]:
    """The contents of all complete boxes, in order: `\\boxed{...}` with balanced braces.

    A box that is never closed gives nothing; of nested boxes the outer one counts.
    """
    found, start = [], 0
    while match := _BOX.search(text, start):
        end = _closing(text, match.end())
        if end is None:
            start = match.end()
            continue
        found.append(text[match.end() : end].strip())
        start = end + 1
    return found


def _closing(text: str, start: int) -> int | None:
    """Where the brace that is open before `start` is closed."""
    depth, position = 1, start
    while position < len(text):
        letter = text[position]
        if letter == "\\":  # \{ and \} are no braces
            position += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if not depth:
                return position
        position += 1
    return None


def last_boxed(text: str) -> str | None:
    """The content of the last complete box that has any."""
    return next((content for content in reversed(boxed(text)) if content), None)


def after_hashes(text: str) -> str | None:
    """The rest of the line behind the last ####."""
    found = _HASHES.findall(text)
    return found[-1].strip() if found else None


def in_sentence(text: str) -> str | None:
    """X of the last "the answer is X"."""
    found = _SENTENCE.findall(text)
    return found[-1].strip() if found else None


def in_json(text: str) -> str | None:
    """The value of "answer" in the last JSON object that has such a key."""
    decoder = json.JSONDecoder()
    for match in reversed(list(re.finditer(r"\{", text))):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("answer"), (str, int, float)):
            return str(found["answer"])
    return None


def last_number(text: str) -> str | None:
    """The last number in a text, as written."""
    found = NUMBER.findall(text)
    return found[-1] if found else None


def as_number(text: str) -> float | None:
    """The value of what is a number and nothing else, save a currency, a unit sign and commas:
    "$1,000.", "50%". None for anything else."""
    plain = text.strip().rstrip(".").replace("\\$", "").replace("\\%", "%").replace("\\,", "")
    plain = plain.translate(_ESCAPES).removesuffix("%")
    if not NUMBER.fullmatch(plain):
        return None
    return float(plain.replace(",", ""))


def same_number(found: str, answer: str) -> bool:
    """Whether both are numbers, and equal (to 1e-6 of the answer, as math-verify rounds)."""
    one, other = as_number(found), as_number(answer)
    return one is not None and other is not None and abs(one - other) <= 1e-6 * max(1, abs(other))
