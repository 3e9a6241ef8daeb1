"""The problems stay what they are, and those to test on are not those to train on."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.wordmath import problems
from moebound.wordmath.draw import NAMES, PLACES, THINGS, Draw, Rejected, reserved
from moebound.wordmath.easy import TEMPLATES
from moebound.wordmath.formats import FORMATS
from moebound.wordmath.problems import LEVELS, Level, WordProblem, train_problem

N = 500
# Results name problems by id. If these change, results of before and after cannot be compared.
FROZEN = {
    "wordmath": "7d320110ecba53b86d1d39e4f10cba94a36c6fd764090c14a94ed46179894237",
    "wordmath-hard": "ccbdfbe79e4674a4ead600096a8a3afa314f366d5761c663ba2c0ca3a0c3756e",
}


def digest(found: list[WordProblem]) -> str:
    text = "".join(p.id + p.prompt + p.reference for p in found)
    return hashlib.sha256(text.encode()).hexdigest()


def trained_on(level: Level, n: int) -> list[WordProblem]:
    rng = random.Random(17)
    return [train_problem(rng, level) for _ in range(n)]


@pytest.mark.parametrize("level", LEVELS)
def test_test_problems_are_frozen(level: Level) -> None:
    assert digest(problems.test_problems(level, N)) == FROZEN[level]


def test_problems_do_not_depend_on_the_process() -> None:
    script = (
        "from moebound.wordmath import problems\n"
        "for p in problems.test_problems('wordmath', 5): print(p.prompt)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "123"},
    )
    assert ran.stdout.splitlines() == [p.prompt for p in problems.test_problems("wordmath", 5)]


@pytest.mark.parametrize("level", LEVELS)
def test_a_shorter_list_begins_a_longer_one_and_all_differ(level: Level) -> None:
    whole = problems.test_problems(level)
    assert len(whole) == 1000
    assert problems.test_problems(level, 30) == whole[:30]
    assert len({p.prompt for p in whole}) == len({p.id for p in whole}) == 1000


@pytest.mark.parametrize("level", LEVELS)
def test_references_are_right_in_the_format_asked(level: Level) -> None:
    for problem in [*problems.test_problems(level), *trained_on(level, 1000)]:
        verdict = problem.judge(problem.reference)
        assert verdict.ica, problem
        assert verdict.extracted == problem.answer


@pytest.mark.parametrize("level", LEVELS)
def test_every_template_format_and_new_wording_is_tested(level: Level) -> None:
    found = problems.test_problems(level)
    assert len({p.template for p in found}) == len({p.template for p in trained_on(level, 2000)})
    assert {p.format for p in found} == set(FORMATS)
    assert 0.2 < sum(p.request_is_new for p in found) / len(found) < 0.3
    steps = {p.n_steps for p in found}
    assert steps == ({1, 2, 3} if level == "wordmath" else {3, 4, 5})


@pytest.mark.parametrize("level", LEVELS)
def test_training_never_shows_a_test_prompt_or_a_new_wording(level: Level) -> None:
    tested = {p.prompt for p in problems.test_problems(level)}
    for problem in trained_on(level, 5000):
        assert problem.prompt not in tested
        assert not problem.request_is_new


@given(st.integers(0, 2**32), st.sampled_from(TEMPLATES))
@settings(max_examples=200)
def test_splits_are_apart_by_pair_and_by_numbers(seed: int, template: object) -> None:
    """Whatever the seed: what one split draws, the other cannot."""
    for split in ("train", "test"):
        rng = random.Random(f"{split}{seed}")
        while True:
            draw = Draw(rng, split, 999)
            try:
                assert callable(template)
                template(draw)
                draw.finish()
                break
            except Rejected:
                continue
        held_out = split == "test"
        assert reserved("numbers", *draw.numbers) == held_out
        pairs = [reserved("pair", a, t) for a in draw.actors for t in draw.things]
        assert pairs[0] if held_out else not any(pairs)


def test_about_a_fifth_is_reserved() -> None:
    pairs = [reserved("pair", a, t) for a in (*NAMES, *PLACES) for t in THINGS]
    assert 0.15 < sum(pairs) / len(pairs) < 0.25


def test_unknown_level_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(MoeboundError, match="wordmath-hard"):
        problems.test_problems("wordmath-harder", 1)  # type: ignore[arg-type]
