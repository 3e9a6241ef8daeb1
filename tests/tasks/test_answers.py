"""Answers are found where they are, and not where they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.tasks import answers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{18}", "18"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox {x}", "x"),
        (r"\boxed{3} and then \boxed{4", "3"),  # cut off: no answer
        (r"\boxed{} after \boxed{5}", "5"),
        (r"\boxed{}", None),
        (r"boxed{7}", None),
        ("", None),
    ],
)
def test_boxes(text: str, found: str | None) -> None:
    assert answers.last_boxed(text) == found


@given(st.text(alphabet="\\boxed{}12 ", max_size=80))
def test_any_text_of_boxes_is_read_without_a_fuss(text: str) -> None:
    for content in answers.boxed(text):
        assert content in text


@pytest.mark.parametrize(
    ("text", "found"),
    [("It takes 12 + 3 = 15 days.", "15"), ("1,234.50 dollars", "1,234.50"), ("-3", "-3"),
     ("none", None), ("5-3", "3"), ("x2", None), ("a price of $1,000,000", "1,000,000"),
     ("7, 8", "8"), (".5", ".5")],
)  # fmt: skip
def test_last_number(text: str, found: str | None) -> None:
    assert answers.last_number(text) == found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("18", "18.0", True), ("$1,000", "1000", True), ("50%", "50", True), ("18.", "18", True),
     (r"\$18", "18", True), ("18", "18.001", False),
     ("eighteen", "18", False), ("1/2", "0.5", False),
     ("", "0", False), ("1" * 400, "1" * 400, True)],
)  # fmt: skip
def test_same_number(one: str, other: str, same: bool) -> None:
    if len(one) > 300:  # beyond what a float holds: no crash, and no claim
        answers.same_number(one, other)
        return
    assert answers.same_number(one, other) is same


def test_other_formats() -> None:
    assert answers.after_hashes("a\n#### 5 \nmore") == "5"
    assert answers.in_sentence("The answer is 5.\nThe final answer is: 3.5.") == "3.5"
    assert answers.in_json('x {"answer": 4} {"other": 1}') == "4"
    assert answers.in_json('{"answer": "Monday"}') == "Monday"
    assert answers.in_json("{" * 5000) is None
