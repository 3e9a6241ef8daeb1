"""Drafts save time and change nothing, whatever they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moebound.evaluate import drafts as drafts_module
from moebound.evaluate.answering import answer
from moebound.evaluate.decoding import Decoded, decode
from moebound.evaluate.drafts import decode_drafted
from moebound.evaluate.loading import Loaded
from moebound.tasks import get_task
from tiny_models import tiny_model

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "lfm2_moe", "qwen3_next", "minimax"]
LIMIT = 8


def prompts_of(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (5, 9, 1, 9)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_writes_what_it_writes_without(name: str) -> None:
    model: Any = tiny_model(name, dtype=torch.float32, seed=3)
    prompts = prompts_of(5)
    plain = decode(model, prompts, max_new_tokens=LIMIT, ends=frozenset(), pad=0)
    ends = frozenset({plain[0].tokens[3]})  # so that one answer ends early
    plain = decode(model, prompts, max_new_tokens=LIMIT, ends=ends, pad=0)
    whole = [list(one.tokens) for one in plain]
    wrong = [[*tokens[:2], 91, *tokens[3:]] for tokens in whole]
    empty: list[list[int]] = [[] for _ in whole]
    for drafts in (whole, wrong, empty, [[*t, 7, 7] for t in whole]):
        found = decode_drafted(model, prompts, drafts, max_new_tokens=LIMIT, ends=ends, pad_token=0)
        assert found == plain


@pytest.mark.parametrize("name", ["qwen3_moe", "minimax"])
def test_a_generation_config_that_asks_for_more_changes_nothing(name: str) -> None:
    model: Any = tiny_model(name, dtype=torch.float32, seed=3)
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": frozenset()}
    plain = decode(model, prompts_of(5), pad=0, **options)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.eos_token_id = plain[0].tokens[2]
    own = model.generation_config
    assert decode(model, prompts_of(5), pad=0, **options) == plain
    drafts = [list(one.tokens[:3]) for one in plain]
    assert decode_drafted(model, prompts_of(5), drafts, pad_token=0, **options) == plain
    assert model.generation_config is own


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_model("qwen3_moe", dtype=torch.float32, seed=3)


@settings(max_examples=40, deadline=None)
@example(drafts=[[], [], [], []], kept=LIMIT, ends=frozenset({0, 90}), positions=None)
@example(drafts=[[96], [-1], [1 << 40], [95]], kept=3, ends=frozenset(), positions=None)
@given(
    drafts=st.lists(st.lists(st.integers(0, 95), max_size=12), min_size=4, max_size=4),
    kept=st.integers(0, LIMIT),
    ends=st.frozensets(st.integers(0, 95), max_size=4),
    positions=st.none() | st.integers(10, 20),
)
def test_any_draft_is_harmless(
    tiny: Any,
    drafts: list[list[int]],
    kept: int,
    ends: frozenset[int],
    positions: int | None,
) -> None:
    """Nonsense behind a true beginning, end marks inside, answers that do not fit."""
    limits: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": ends, "positions": positions}
    plain = decode(tiny, prompts_of(5), pad=0, **limits)
    begun = [[*one.tokens[:kept], *more] for one, more in zip(plain, drafts, strict=True)]
    assert decode_drafted(tiny, prompts_of(5), begun, pad_token=0, **limits) == plain


def test_an_answer_at_its_limit_is_cut_off_whatever_comes_next(tiny: Any) -> None:
    prompts = prompts_of(5)
    longer = decode(tiny, prompts, max_new_tokens=LIMIT + 1, ends=frozenset(), pad=0)
    ends = frozenset({longer[0].tokens[LIMIT]} - set(longer[0].tokens[:LIMIT]))
    assert ends
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": ends}
    plain = decode(tiny, prompts, pad=0, **options)
    assert not plain[0].finished
    drafts = [list(one.tokens) for one in plain]
    assert decode_drafted(tiny, prompts, drafts, pad_token=0, **options) == plain


def test_no_room_is_no_answer(tiny: Any) -> None:
    limits: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": frozenset(), "positions": 9}
    plain = decode(tiny, prompts_of(5), pad=0, **limits)
    assert [len(one.tokens) for one in plain] == [4, 0, 8, 0]
    drafts = [[7, 8, 9] for _ in plain]
    assert decode_drafted(tiny, prompts_of(5), drafts, pad_token=0, **limits) == plain


@pytest.mark.parametrize("nested", [False, True])
def test_positions_that_depend_on_the_length_take_no_draft(
    nested: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = decode(tiny, prompts_of(5), max_new_tokens=LIMIT, ends=frozenset(), pad=0)
    rope = {"rope_type": "longrope"}
    monkeypatch.setattr(tiny.config, "rope_parameters", {"full": rope} if nested else rope)
    monkeypatch.setattr(drafts_module, "_agreement", None)  # not called
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": frozenset(), "pad_token": 0}
    drafts = [list(one.tokens) for one in plain]
    assert decode_drafted(tiny, prompts_of(5), drafts, **options) == plain


def test_only_what_was_guessed_wrong_is_written(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(5)
    plain = decode(tiny, prompts, max_new_tokens=LIMIT, ends=frozenset(), pad=0)
    drafts = [list(one.tokens) for one in plain]
    drafts[2][4] = (drafts[2][4] + 1) % 96
    asked: list[list[list[int]]] = []

    def counted(model: Any, prompts: Any, **options: Any) -> list[Decoded]:
        asked.append(prompts)
        return decode(model, prompts, **options)

    monkeypatch.setattr(drafts_module, "decode", counted)
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "ends": frozenset(), "pad_token": 0}
    assert decode_drafted(tiny, prompts, drafts, **options) == plain
    assert asked == [[[*prompts[2], *plain[2].tokens[:4]]]]


def test_a_model_that_gives_no_numbers_ends_nothing_by_itself() -> None:
    model: Any = tiny_model("qwen3_moe", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = decode_drafted(
        model, [[5, 6], [8]], [[1, 2], []], max_new_tokens=4, ends=frozenset({0}), pad_token=0
    )
    assert found == [Decoded((), False)] * 2


@pytest.mark.slow
def test_texts_are_drafts(loaded: Loaded) -> None:
    task = get_task("wordmath")
    problems = task.problems(12)
    plain = answer(loaded, task, problems)
    texts = [output.text for output in plain]
    assert answer(loaded, task, problems, drafts=texts) == plain
    assert answer(loaded, task, problems, drafts=texts[::-1], batch=5) == plain
    assert answer(loaded, task, [], drafts=[]) == []
