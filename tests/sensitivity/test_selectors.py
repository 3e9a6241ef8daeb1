"""Selectors: each form means the experts that it says, and nonsense is refused by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.sensitivity.selectors import parse_selector
from moebound.types import ExpertKey

# Layer 0 is dense, 3 too: experts in 1, 2, 4 and 5, four each.
EXPERTS = [ExpertKey(layer, expert) for layer in (1, 2, 4, 5) for expert in range(4)]
RANKING = {1: (2, 0, 3, 1), 2: (3, 2, 1, 0), 4: (0, 1, 2, 3), 5: (1, 3, 0, 2)}


class Usage:
    def ranking(self, layer: int) -> Sequence[int]:
        return RANKING[layer]


def meant(text: str) -> list[tuple[int, int]]:
    return [(k.layer, k.expert) for k in parse_selector(text).resolve(EXPERTS, Usage())]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("expert:1:3", [(1, 3)]),
        ("5.0", [(5, 0)]),
        ("most-used:2", [(2, 3)]),
        ("least-used:2", [(2, 0)]),
        ("top:1:4", [(4, 0)]),
        ("top:3:1", [(1, 0), (1, 2), (1, 3)]),
        ("top:4:5", [(5, 0), (5, 1), (5, 2), (5, 3)]),
        ("layer:4", [(4, 0), (4, 1), (4, 2), (4, 3)]),
        ("group:1-2", [(1, 2), (2, 3)]),
        ("group:2-5", [(2, 3), (4, 0), (5, 1)]),  # over the dense layer 3
        ("group:4-4", [(4, 0)]),
        ("5.1, 1.0,expert:1:0", [(1, 0), (5, 1)]),  # each once, in the order of the model
        ("most-used:1,layer:2", [(1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]),
    ],
)
def test_forms(text: str, keys: list[tuple[int, int]]) -> None:
    assert meant(text) == keys


def test_all_is_all() -> None:
    assert list(parse_selector("all").resolve(reversed(EXPERTS))) == EXPERTS


def test_groups_may_overlap() -> None:
    assert set(meant("group:1-4")) & set(meant("group:2-5")) == {(2, 3), (4, 0)}


@given(st.lists(st.sampled_from(["expert:1:3", "5.0", "most-used:2", "least-used:2", "top:3:1",
                                 "layer:4", "group:1-5", "all"]), min_size=1))  # fmt: skip
def test_the_text_of_a_selector_means_the_same(parts: list[str]) -> None:
    selector = parse_selector(",".join(parts))
    again = parse_selector(str(selector))
    assert again == selector
    assert again.resolve(EXPERTS, Usage()) == selector.resolve(EXPERTS, Usage())


@pytest.mark.parametrize("text", ["", " ", "layer", "layer:", "layer:x", "layer:-1", "expert:1",
                                  "1.2.3", "top:2", "group:1", "group:1-2-3", "all,", "most-used:٣",
                                  "layer:1;2", "ALL"])  # fmt: skip
def test_what_is_no_selector(text: str) -> None:
    with pytest.raises(MoeboundError, match="expected one of expert:L:E"):
        parse_selector(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top:0:1", "top 0 of a layer are no experts"),
        ("group:5-1", "ends before it begins"),
        ("layer:3", r"layer 3 has no experts; layers with experts: 1-2, 4-5"),
        ("expert:1:4", r"layer 1 has no expert 4; it has 0-3"),
        ("expert:99999999999999999999:0", "has no experts"),
        ("most-used:0", "layer 0 has no experts"),
        ("top:5:1", r"'top:5:1': layer 1 has 4 experts only"),
        ("group:1-3", "layer 3 has no experts"),
        ("1.0,layer:9", "layer 9 has no experts"),
    ],
)
def test_what_does_not_exist(text: str, message: str) -> None:
    with pytest.raises(MoeboundError, match=message):
        parse_selector(text).resolve(EXPERTS, Usage())


@pytest.mark.parametrize(
    "text", ["most-used:1", "least-used:1", "top:2:1", "group:1-2", "1.0,top:1:1"]
)
def test_use_needs_a_profile(text: str) -> None:
    selector = parse_selector(text)
    assert selector.needs_profile
    with pytest.raises(MoeboundError, match="moebound profile"):
        selector.resolve(EXPERTS)


@pytest.mark.parametrize("text", ["expert:1:0", "layer:1", "all", "1.0,layer:2"])
def test_others_do_not(text: str) -> None:
    selector = parse_selector(text)
    assert not selector.needs_profile
    assert selector.resolve(EXPERTS)
