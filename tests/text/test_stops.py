"""Stop texts: where a text is cut, whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.text.stops import StopTexts

SHORT = st.text("ab", min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    texts = StopTexts(stops)
    out = ""
    for piece in pieces:
        text, stopped = texts.push(piece)
        out += text
        if stopped:
            return out, True
    return out + texts.finish(), False


def cut(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: read character by character, and end where a stop text is complete."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@given(st.lists(SHORT, max_size=3), st.lists(st.text("abc", max_size=4), max_size=8))
@example(["abb", "b"], ["abb"])
@example(["aab"], ["aa", "aab"])
def test_any_pieces_are_cut_alike(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == cut(stops, "".join(pieces))


@given(st.lists(SHORT, min_size=1, max_size=3), st.lists(st.text("abc", max_size=4), max_size=8))
def test_no_more_is_held_than_may_be_a_stop(stops: list[str], pieces: list[str]) -> None:
    texts, out, given_ = StopTexts(stops), "", ""
    for piece in pieces:
        text, stopped = texts.push(piece)
        if stopped:
            return
        out, given_ = out + text, given_ + piece
        held = given_[len(out) :]
        assert given_.startswith(out)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(MoeboundError, match="stop"):
        StopTexts(["a", ""])
