"""The four answer formats: how a problem asks for one, how a solution gives it, how it is judged.

ICA and PIA as in the paper: instruction compliance accuracy asks for the right number in exactly
the format that was asked for, pure inference accuracy for the right number in any format.

A request is worded in several ways. Some wordings are reserved for test problems, so that following
an instruction is more than recognising it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


class Judgement(NamedTuple):
    """ica: right number, exactly in the format asked. pia: ica, or right number in any format.

    valid: there is a number at all. extracted: the number that was judged, as written.
    """

    ica: bool
    pia: bool
    valid: bool
    extracted: str | None


@dataclass(frozen=True)
class Format:
    """One answer format.

    write: number -> the final words of a solution. read: text -> the number, as written, if the
    text ends in exactly this format, else None. find: text -> the last number in this format
    anywhere in the text. train, test: wordings of the request; test problems use both.
    """

    name: str
    write: Callable[[int], str]
    read: Callable[[str], str | None]
    find: Callable[[str], tuple[int, str] | None]
    train: tuple[str, ...]
    test: tuple[str, ...]


def _readers(
    pattern: str, closing: str = ""
) -> tuple[Callable[[str], str | None], Callable[[str], tuple[int, str] | None]]:
    """read and find for a pattern with the number as its only group."""
    # Nothing but space may follow, and the format must not be inside a longer word.
    at_end = re.compile(rf"(?<!\S){pattern}{closing}\s*\Z")
    anywhere = re.compile(pattern)

    def read(text: str) -> str | None:
        found = at_end.search(text)
        return found[1] if found else None

    def find(text: str) -> tuple[int, str] | None:
        matches = list(anywhere.finditer(text))
        return (matches[-1].start(1), matches[-1][1]) if matches else None

    return read, find


_BOXED = _readers(rf"\\boxed\{{\s*({_NUMBER})\s*\}}", r"\.?")
_HASHES = _readers(rf"####\s*({_NUMBER})(?![\d.]*\d)", r"\.?")
_SENTENCE = _readers(rf"(?:[Tt]he|[Ss]o the) (?:final )?answer is ({_NUMBER})(?![\d.]*\d)", r"\.?")
_, _find_json = _readers(rf'\{{\s*"answer"\s*:\s*"?({_NUMBER})"?\s*\}}')


def _read_json(text: str) -> str | None:
    """The text ends in a JSON object whose only key is "answer" and whose value is a number."""
    start = text.rfind("{")
    if start < 0 or text[:start][-1:].strip():
        return None
    try:
        found = json.loads(text[start:], parse_int=str, parse_float=str)
    except ValueError:
        return None
    # With these hooks a number arrives as str, and so would a quoted one: the source tells.
    value = found.get("answer") if isinstance(found, dict) and len(found) == 1 else None
    return value if isinstance(value, str) and f'"{value}"' not in text[start:] else None


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "boxed",
            lambda n: f"\\boxed{{{n}}}",
            *_BOXED,
            train=(
                "Put the answer in a box.",
                "Box the final answer.",
                "Use \\boxed{} for the answer.",
                "Give the final answer in \\boxed{}.",
                "Your answer must be boxed.",
                "Finish with a box around the answer.",
            ),
            test=("Write the final answer in a box.", "The final answer must be in \\boxed{}."),
        ),
        Format(
            "hashes",
            lambda n: f"#### {n}",
            *_HASHES,
            train=(
                "Write the answer after four hashes.",
                "Put #### before the answer.",
                "Finish with #### and the answer.",
                "Give the final answer after ####.",
                "Your answer must follow four hashes.",
                "Mark the final answer with four hashes.",
            ),
            test=("Write four hashes before the final answer.", "The answer must follow ####."),
        ),
        Format(
            "sentence",
            lambda n: f"The answer is {n}.",
            *_SENTENCE,
            train=(
                "Answer in a sentence.",
                "Give the answer as a sentence.",
                "Finish with a sentence that gives the answer.",
                "Write the final answer in words: The answer is.",
                "Your answer must be a full sentence.",
                "Use a short sentence for the final answer.",
            ),
            test=("Put the answer in a sentence.", "The final answer must be a sentence."),
        ),
        Format(
            "json",
            lambda n: f'{{"answer": {n}}}',
            _read_json,
            _find_json,
            train=(
                "Answer as JSON.",
                "Give the answer as a JSON object.",
                "Finish with JSON that has the answer.",
                'Write the final answer as {"answer": number}.',
                "Your answer must be JSON.",
                "Use JSON for the final answer.",
            ),
            test=("Put the answer in a JSON object.", "The final answer must be JSON."),
        ),
    )
}


def final_number(text: str) -> str | None:
    """The number a text ends with: the last one in any of the formats, else the last of all."""
    marked = [found for f in FORMATS.values() if (found := f.find(text))]
    if marked:
        return max(marked)[1]
    numbers = re.findall(_NUMBER, text)
    return numbers[-1] if numbers else None


def judge(answer: str, asked: str, text: str) -> Judgement:
    """Judge a completion. answer: the right number. asked: the name of the format asked for.

    Raises KeyError for a format that there is not.
    """
    compliant = FORMATS[asked].read(text)
    extracted = compliant if compliant is not None else final_number(text)
    right = extracted is not None and _same(extracted, answer)
    return Judgement(right and compliant is not None, right, extracted is not None, extracted)


def _same(found: str, answer: str) -> bool:
    return float(found.replace(",", "")) == float(answer.replace(",", ""))
