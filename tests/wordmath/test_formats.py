"""Judging what a model wrote, hostile texts included."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.wordmath.formats import FORMATS, judge

RIGHT = {
    "boxed": r"7 + 5 = 12. \boxed{12}",
    "hashes": "7 + 5 = 12. #### 12",
    "sentence": "7 + 5 = 12. The answer is 12.",
    "json": '7 + 5 = 12. {"answer": 12}',
}


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("given_", FORMATS)
def test_the_right_number_in_another_format_is_pia_alone(asked: str, given_: str) -> None:
    verdict = judge("12", asked, RIGHT[given_])
    assert verdict.ica == (asked == given_)
    assert verdict.pia
    assert verdict.extracted == "12"


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("given_", FORMATS)
def test_the_wrong_number_is_neither(asked: str, given_: str) -> None:
    verdict = judge("13", asked, RIGHT[given_])
    assert (verdict.ica, verdict.pia, verdict.valid) == (False, False, True)


@pytest.mark.parametrize("asked", FORMATS)
@pytest.mark.parametrize("text", ["", " ", "I do not know.", "####", r"\boxed{}", "{}", "."])
def test_a_text_without_a_number_is_not_valid(asked: str, text: str) -> None:
    assert judge("12", asked, text) == (False, False, False, None)


@pytest.mark.parametrize(
    ("asked", "text", "ica", "pia"),
    [
        # Numbers are compared as numbers.
        ("hashes", "#### 1,234", True, True),
        ("boxed", r"\boxed{1234.0}", True, True),
        ("boxed", r"\boxed{ 1234 }", True, True),
        ("json", '{"answer": 1234.0}', True, True),
        ("json", '{"answer":1234}', True, True),
        ("sentence", "The answer is 1234", True, True),
        ("sentence", "So the final answer is 1,234.", True, True),
        ("hashes", "#### -1234", False, False),
        ("hashes", "#### 12345", False, False),
        ("hashes", "#### 1234.5", False, False),
        # Space at the end does not matter, words do.
        ("boxed", "\\boxed{1234} \n", True, True),
        ("boxed", r"\boxed{1234} dollars", False, True),
        ("hashes", "#### 1234 dollars", False, True),
        ("sentence", "The answer is 1234 and that is that.", False, True),
        ("json", '{"answer": 1234} is the answer', False, True),
        # Nearly the format.
        ("json", '{"answer": "1234"}', False, True),
        ("json", '{"answer": 1234, "unit": "dollars"}', False, True),
        ("json", '{"result": 1234}', False, True),
        ("json", '{"answer": 1234', False, True),
        ("json", "{'answer': 1234}", False, True),
        ("hashes", "### 1234", False, True),
        ("boxed", r"boxed{1234}", False, True),
        ("boxed", r"\boxed{1234", False, True),
        ("sentence", "Theanswer is 1234.", False, True),
        # A format inside a word is none.
        ("hashes", "x#### 1234", False, True),
        ("json", 'x{"answer": 1234}', False, True),
        # The last number counts, and a marked one before one that is not.
        ("boxed", "1000 + 234 = 1234", False, True),
        ("boxed", "1234 apples, and 5 pears", False, False),
        ("boxed", r"The answer is 1234. 99 problems", False, True),
        ("boxed", r"\boxed{5} #### 1234", False, True),
        ("boxed", r"\boxed{1234} #### 5", False, False),
        ("boxed", r"\boxed{5} \boxed{1234}", True, True),
        # The number inside prose or another number.
        ("sentence", "There are 1234 of them, that is all.", False, True),
        ("sentence", "abc1234def", False, True),
        ("sentence", "12 34", False, False),
    ],
)
def test_hostile_texts(asked: str, text: str, ica: bool, pia: bool) -> None:
    verdict = judge("1234", asked, text)
    assert (verdict.ica, verdict.pia, verdict.valid) == (ica, pia, True)


@given(st.text(max_size=60), st.sampled_from(sorted(FORMATS)), st.integers(0, 9999))
def test_any_text_gets_a_verdict_that_agrees_with_itself(text: str, asked: str, n: int) -> None:
    verdict = judge(str(n), asked, text)
    assert verdict.pia or not verdict.ica
    assert verdict.valid == (verdict.extracted is not None)


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 99999), st.text("ab 1+=.", max_size=20))
def test_what_a_format_writes_it_reads(name: str, n: int, before: str) -> None:
    assert judge(str(n), name, f"{before} {FORMATS[name].write(n)}").ica


@pytest.mark.parametrize("text", ["1" * 5000, "#### " + "9," * 3000, "{" * 3000, r"\boxed{" * 2000])
@pytest.mark.parametrize("asked", FORMATS)
def test_long_texts_are_judged_too(asked: str, text: str) -> None:
    assert not judge("12", asked, text).pia


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(KeyError):
        judge("12", "roman", "XII")
