"""A text from a model: the text that transformers generates, and why and when it ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded
from moebound.tasks.registry import get_task
from moebound.text import generation
from moebound.text.generation import Finish, GenerationSettings, generate
from moebound.text.growing_cache import GrowingLayer
from tiny_models import MakeTiny

PROMPTS = [problem.prompt for problem in get_task("wordmath-hard").problems(4)]


def ids_of(loaded: Loaded, prompt: str) -> list[int]:
    return list(loaded.tokenizer(prompt)["input_ids"])


def run(
    loaded: Loaded, ids: list[int], settings: GenerationSettings, **options: Any
) -> tuple[str, Finish]:
    pieces = list(generate(loaded.model, loaded.tokenizer, ids, settings, **options))
    assert all(piece.text and piece.finish is None for piece in pieces[:-1])
    finish = pieces[-1].finish
    assert finish is not None
    return "".join(piece.text for piece in pieces), finish


def stock(loaded: Loaded, ids: list[int], max_new_tokens: int) -> tuple[str, int]:
    """What transformers' own loop says: (text, new tokens)."""
    out = loaded.model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens
    )[0]
    new = out[len(ids) :]
    return loaded.tokenizer.decode(new, skip_special_tokens=True), len(new)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("max_new_tokens", [1, 7, 112])
def test_greedy_text_is_that_of_transformers(
    loaded: Loaded, prompt: str, max_new_tokens: int
) -> None:
    ids = ids_of(loaded, prompt)
    text, finish = run(loaded, ids, GenerationSettings(max_new_tokens))
    expected, n_new = stock(loaded, ids, max_new_tokens)
    assert (text, finish.n_prompt, finish.n_new) == (expected, len(ids), n_new)
    assert finish.reason == ("length" if n_new == max_new_tokens else "stop")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("cached", [True, False])
def test_other_families(
    tiny: MakeTiny, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, name: str, cached: bool
) -> None:
    from transformers import AutoModelForCausalLM

    if not cached:  # as of a family that has a cache of its own kind
        monkeypatch.setattr(generation, "supports_cache", lambda model: False)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    end = model.generation_config.eos_token_id = loaded.tokenizer.eos_token_id
    ids = [5, 9, 7, 11]
    other = Loaded(model, loaded.tokenizer, loaded.source)
    text, finish = run(other, ids, GenerationSettings(12))
    out = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=end
    )
    new = out[0, len(ids) :].tolist()
    assert text == loaded.tokenizer.decode(new, skip_special_tokens=True)
    assert finish.n_new == len(new)


def test_a_continuation_begins_with_its_space(loaded: Loaded) -> None:
    ids = ids_of(loaded, PROMPTS[0])
    settings = GenerationSettings(20)
    answer, _ = run(loaded, ids, settings)
    assert run(loaded, ids, settings, continues=True)[0] == " " + answer


def test_a_stop_text_is_no_part_of_the_text(loaded: Loaded) -> None:
    ids = ids_of(loaded, PROMPTS[0])
    whole, all_of_it = run(loaded, ids, GenerationSettings(112))
    stop = whole[len(whole) // 2 :][:4]
    text, finish = run(loaded, ids, GenerationSettings(112, stop=("never", stop)))
    assert text == whole[: whole.index(stop)]
    assert finish.reason == "stop"
    assert finish.n_new < all_of_it.n_new


def test_what_a_stop_text_held_back_comes_at_the_end(loaded: Loaded) -> None:
    ids = ids_of(loaded, PROMPTS[0])
    whole, _ = run(loaded, ids, GenerationSettings(9))
    assert run(loaded, ids, GenerationSettings(9, stop=(whole[-3:] + "!",)))[0] == whole


def test_the_positions_of_the_model_are_a_limit(loaded: Loaded) -> None:
    ids = [7] * 250
    _, finish = run(loaded, ids, GenerationSettings(1000, temperature=2.0, seed=0))
    assert finish.n_new <= 6
    for n_prompt in (256, 300):
        with pytest.raises(MoeboundError, match="no room"):
            generate(loaded.model, loaded.tokenizer, [7] * n_prompt, GenerationSettings(1))
    with pytest.raises(MoeboundError, match="no tokens"):
        generate(loaded.model, loaded.tokenizer, [], GenerationSettings(1))


def test_a_seed_repeats_the_text(loaded: Loaded) -> None:
    ids = ids_of(loaded, PROMPTS[1])
    texts = [
        run(loaded, ids, GenerationSettings(30, temperature=1.5, seed=seed))[0]
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("after", [0, 1, 5])
def test_stopping_takes_effect_before_the_next_pass(loaded: Loaded, after: int) -> None:
    asked = itertools.count()
    ids = ids_of(loaded, PROMPTS[0])
    _, finish = run(
        loaded, ids, GenerationSettings(112), should_stop=lambda: next(asked) >= after
    )  # fmt: skip
    assert (finish.reason, finish.n_new) == ("cancelled", after)


def test_a_dropped_iterator_runs_no_further(loaded: Loaded) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = loaded.model.register_forward_pre_hook(count)
    pieces = generate(
        loaded.model, loaded.tokenizer, ids_of(loaded, PROMPTS[0]), GenerationSettings(112)
    )
    assert passes == 0  # nothing is computed before somebody asks
    assert next(pieces).finish is None
    del pieces
    hook.remove()
    assert passes == 1


def test_times_are_in_order(loaded: Loaded) -> None:
    _, finish = run(loaded, ids_of(loaded, PROMPTS[0]), GenerationSettings(8))
    assert finish.first_token_s is not None
    assert finish.seconds_per_token is not None
    assert 0 < finish.first_token_s <= finish.total_s
    spent = finish.first_token_s + 7 * finish.seconds_per_token
    assert spent == pytest.approx(finish.last_token_s)
    _, short = run(loaded, ids_of(loaded, PROMPTS[0]), GenerationSettings(1))
    assert short.seconds_per_token is None


def test_a_broken_model_is_named(loaded: Loaded) -> None:
    hook = loaded.model.lm_head.register_forward_hook(lambda *a: a[2] * float("nan"))
    try:
        with pytest.raises(MoeboundError, match="no number"):
            run(loaded, ids_of(loaded, PROMPTS[0]), GenerationSettings(8))
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 1, "top_p": float("nan")}, "top_p"),
        ({"max_new_tokens": 1, "seed": 1 << 63}, "seed"),
        ({"max_new_tokens": 1, "stop": ("",)}, "stop"),
        ({"max_new_tokens": -1, "echo": True}, "max_new_tokens"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k"),
        ({"max_new_tokens": 1, "min_p": float("nan")}, "min_p"),
        ({"max_new_tokens": 1, "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 1, "presence_penalty": 2.1}, "presence_penalty"),
        ({"max_new_tokens": 1, "frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"max_new_tokens": 1, "logit_bias": {3: 101.0}}, "logit_bias"),
        ({"max_new_tokens": 1, "logit_bias": {-3: 1.0}}, "logit_bias"),
        ({"max_new_tokens": 1, "logprobs": 21}, "logprobs"),
    ],
)
def test_settings_that_are_none(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(MoeboundError, match=named):
        GenerationSettings(**wrong)


def test_tokens_behind_a_stop_text_are_not_told(loaded: Loaded) -> None:
    ids = ids_of(loaded, PROMPTS[0])
    whole = list(generate(loaded.model, loaded.tokenizer, ids, GenerationSettings(30, logprobs=0)))
    tokens = [token for piece in whole for token in piece.tokens]
    assert len(tokens) == whole[-1].finish.n_new if whole[-1].finish else False
    text = "".join(piece.text for piece in whole)
    stop = text[tokens[4].offset : tokens[6].offset]  # two tokens
    settings = GenerationSettings(30, logprobs=0, stop=(stop,))
    cut = list(generate(loaded.model, loaded.tokenizer, ids, settings))
    found = [token for piece in cut for token in piece.tokens]
    assert found == [token for token in tokens if token.offset < text.index(stop)]
    for piece, before in zip(cut, range(len(cut)), strict=True):
        out = len("".join(one.text for one in cut[: before + 1]))
        assert all(token.offset < out for token in piece.tokens)


def test_a_prompt_is_scored_in_parts_as_it_is_at_once(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(loaded, PROMPTS[0])
    settings = GenerationSettings(2, logprobs=2, echo=True)

    def told() -> list[Any]:
        pieces = generate(loaded.model, loaded.tokenizer, ids, settings)
        return [token for piece in pieces for token in piece.tokens]

    once = told()
    assert len(once) == len(ids) + 2
    monkeypatch.setattr(generation, "SCORES_AT_ONCE", 5 * 299)
    parts = told()
    assert [token.token for token in parts] == [token.token for token in once]
    assert [token.logprob for token in parts[1:]] == pytest.approx(
        [token.logprob for token in once[1:]], abs=1e-4
    )
    monkeypatch.setattr(generation, "supports_cache", lambda model: False)
    assert [token.logprob for token in told()[1:]] == pytest.approx(
        [token.logprob for token in once[1:]], abs=1e-4
    )


def test_a_full_model_can_still_score_a_prompt(loaded: Loaded) -> None:
    settings = GenerationSettings(0, logprobs=0, echo=True)
    (piece,) = generate(loaded.model, loaded.tokenizer, [7] * 256, settings)
    assert piece.finish is not None
    assert (piece.finish.reason, piece.finish.n_new, len(piece.tokens)) == ("length", 0, 256)


def test_what_a_cache_of_one_head_hands_out_tells_of_no_room() -> None:
    """torch chooses its way by strides, even of axes of length 1."""
    layer = GrowingLayer()
    for n in (3, 1):
        keys, values = layer.update(torch.ones(1, 1, n, 4), torch.ones(1, 1, n, 2))
    assert keys.stride() == torch.empty(1, 1, 4, 4).stride()
    assert values.stride() == torch.empty(1, 1, 4, 2).stride()
