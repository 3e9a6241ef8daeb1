"""The problems of `wordmath` and `wordmath-hard`: a stable list to test on, endless ones to train.

The same on every machine and in every process: a problem is a function of level, split and seed.
Held out by construction, see draw.py; test problems also use wordings of the format request that
training never shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, Literal, get_args

from moebound.errors import MoeboundError
from moebound.wordmath import easy, hard
from moebound.wordmath.draw import Draw, Rejected, Split
from moebound.wordmath.formats import FORMATS, Judgement, judge

Level = Literal["wordmath", "wordmath-hard"]
LEVELS: tuple[Level, ...] = get_args(Level)
_TEMPLATES = {
    "wordmath": (easy.TEMPLATES, easy.LARGEST),
    "wordmath-hard": (hard.TEMPLATES, hard.LARGEST),
}


@dataclass(frozen=True)
class WordProblem:
    """One problem. prompt: what the model reads. answer: the number, in digits.

    format: the name of the format asked for. reference: a right solution in that format, step by
    step. template: which story. n_steps: how many calculations it takes. request_is_new: whether
    the wording of the format request is one that training never shows.
    """

    id: str
    prompt: str
    answer: str
    format: str
    reference: str
    level: Level
    template: str
    n_steps: int
    request_is_new: bool

    def judge(self, text: str) -> Judgement:
        """What a completion of `prompt` is worth."""
        return judge(self.answer, self.format, text)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def test_problems(  # not a test, whatever it sounds like
    level: Level,
    limit: int | None = None,  # noqa: PT028
    *,
    seed: int = 0,  # noqa: PT028
) -> list[WordProblem]:
    """The first `limit` held-out problems of a level (1000 where it is None), all different.

    A shorter list is the beginning of a longer one. Raises MoeboundError for an unknown level.
    """
    return list(islice(_all_test_problems(level, seed), 1000 if limit is None else limit))


test_problems.__test__ = False  # type: ignore[attr-defined]


def _all_test_problems(level: Level, seed: int) -> Iterator[WordProblem]:
    seen: set[str] = set()
    for index in count():
        rng = random.Random(f"moebound/{level}/test/{seed}/{index}")
        problem = _problem(rng, level, "test", f"{level}-test-{seed}-{index:05d}")
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def train_problem(rng: random.Random, level: Level, id: str = "train") -> WordProblem:  # noqa: A002
    """A training problem; only `rng` decides which. Raises MoeboundError for an unknown level."""
    return _problem(rng, level, "train", id)


def _problem(rng: random.Random, level: Level, split: Split, name: str) -> WordProblem:
    if level not in _TEMPLATES:
        raise MoeboundError(f"level {level!r}: there is {' and '.join(LEVELS)}")
    templates, largest = _TEMPLATES[level]
    # The template is drawn once: rejections must not make the stricter templates rarer.
    template = templates[int(rng.random() * len(templates))]
    while True:
        draw = Draw(rng, split, largest)
        try:
            story = template(draw)
            answer = draw.finish()
            break
        except Rejected:
            continue
    format_ = draw.pick(tuple(FORMATS.values()))
    wordings = format_.train if split == "train" else format_.train + format_.test
    request = draw.pick(wordings)
    return WordProblem(
        id=name,
        prompt=f"{story} {request}",
        answer=str(answer),
        format=format_.name,
        reference=" ".join([*draw.steps, format_.write(answer)]),
        level=level,
        template=template.__name__,
        n_steps=len(draw.steps),
        request_is_new=request in format_.test,
    )
