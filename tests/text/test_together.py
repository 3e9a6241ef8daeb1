"""Several texts at a time: each is what it is alone, to the bit, whoever is beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

import tiny_models
from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError, MoeboundError
from moebound.model import few_rows, joined
from moebound.offload import joint
from moebound.offload.compute import FewRows, expert_output, gated_outputs
from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.store import compress
from moebound.text.generation import GenerationSettings, Piece, generate
from moebound.text.together import MOST, Text, Together, generate_together, shares_state
from moebound.types import ErrorBound, ExpertKey
from tiny_models import TINY, make_tiny

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10], list(range(11, 23)), [5], [9, 10, 11]]

# Latent attention shares no heads: what makes other configs small makes these none.
LATENT = {"axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32",
          "glm4_moe_lite", "glm_moe_dsa"}  # fmt: skip
# Not run by moebound.load, or in these sizes not by transformers either: no layer with attention.
NOT_RUN = {"glm4v_moe_text", "glm5_next_text", "jetmoe", "llama4", "llama4_text", "mistral4",
           "mistral_large4_text", "muse_spark_text", "openai_privacy_filter", "granitemoehybrid",
           "jamba", "kimi_linear", "glm4v_moe"}  # fmt: skip


class Numbers:
    """A tokenizer whose tokens are numbers."""

    eos_token_id = None

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{i}>" for i in ([ids] if isinstance(ids, int) else ids))

    def convert_ids_to_tokens(self, ids: Any, **_: Any) -> Any:
        return [str(i) for i in ids] if isinstance(ids, list) else str(ids)


@pytest.fixture(autouse=True)
def _every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(joined, "LEAST_WEIGHTS", 1)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offloaded]:
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with load(make_tiny("mixtral", tmp_path_factory.mktemp("m")), ram_budget="60%") as offloaded:
        offloaded.model.generation_config.eos_token_id = None
        yield offloaded


class Scores:
    """What the model says of each text's next token: prompt and text so far -> scores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moebound.text import generation

        self.seen = dict[tuple[int, ...], torch.Tensor]()
        read = generation._Reader.read

        def watched(reader: Any, ids: Sequence[int]) -> torch.Tensor:
            found = read(reader, ids)
            self.seen[tuple(reader._ids)] = found.clone()
            return found

        monkeypatch.setattr(generation._Reader, "read", watched)

    def of(self, call: Callable[[], Any]) -> dict[tuple[int, ...], torch.Tensor]:
        self.seen.clear()
        call()
        return dict(self.seen)


def drawn(prompt: Sequence[int], n: int = 6) -> GenerationSettings:
    """Of a prompt its own seed and length: they end at different times."""
    return GenerationSettings(n + len(prompt) % 3, temperature=1.0, seed=len(prompt))


def texts_of(
    offloaded: Offloaded, prompts: Sequence[Sequence[int]], **options: Any
) -> dict[int, str]:
    found = dict[int, str]()
    settings = [drawn(prompt) for prompt in prompts]
    for index, piece in generate_together(offloaded.model, Numbers(), prompts, settings, **options):
        found[index] = found.get(index, "") + piece.text
    return found


def check_alone_and_together(offloaded: Offloaded, scores: Scores) -> None:
    together = scores.of(lambda: texts_of(offloaded, PROMPTS))
    for prompt in PROMPTS:
        alone = scores.of(lambda: texts_of(offloaded, [prompt]))  # noqa: B023
        assert len(alone) == drawn(prompt).max_new_tokens
        for so_far, wanted in alone.items():
            assert torch.equal(together[so_far], wanted)


@pytest.mark.parametrize("name", [name for name in TINY if name not in NOT_RUN])
def test_alone_and_together_are_the_same_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY[name]
    if name in LATENT:
        more = {"num_key_value_heads": 4}
        monkeypatch.setitem(tiny_models.TINY, name, replace(tiny, overrides=tiny.overrides | more))
    with load(make_tiny(name, tmp_path / "src"), ram_budget="80%") as offloaded:
        offloaded.model.generation_config.eos_token_id = None
        check_alone_and_together(offloaded, Scores(monkeypatch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("budget", ["60%", "100%"])
def test_whatever_the_dtype_and_the_budget(
    dtype: str, budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny("qwen3_moe", tmp_path / "src")
    with load(source, ram_budget=budget, dtype=dtype, predictor="gate") as offloaded:
        offloaded.model.generation_config.eos_token_id = None
        check_alone_and_together(offloaded, Scores(monkeypatch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "by_rows"), [("qwen3_moe", True), ("gemma4_text", False)])
def test_experts_of_codes_have_the_rows_of_all_texts(
    name: str, by_rows: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a prompt with so many that torch computes them; and where torch computes the gate,
    prompts are by themselves."""
    monkeypatch.setattr(few_rows, "HAS_BFLOAT16", True)
    monkeypatch.setattr(few_rows, "MANY_ROWS", 4)
    rows = list[int]()

    def spy(experts: Sequence[FewRows], *args: Any, **given: Any) -> torch.Tensor:
        rows.extend(len(one.rows) for one in experts)
        return gated_outputs(experts, *args, **given)

    alone = list[int]()

    def spy_alone(module: Any, expert: int, slot: Any, x: torch.Tensor, dtype: Any) -> torch.Tensor:
        alone.append(len(x))
        return expert_output(module, expert, slot, x, dtype)

    monkeypatch.setattr(joint, "gated_outputs", spy)
    monkeypatch.setattr(joint, "expert_output", spy_alone)
    source = open_checkpoint(make_tiny(name, tmp_path / "src"))
    compress(source, tmp_path / "dst", bound=ErrorBound(0.9, "rate"))
    with load(tmp_path / "dst", ram_budget="100%", slots="codes", dtype=dtype) as offloaded:
        assert offloaded.choice.slots == "codes"
        offloaded.model.generation_config.eos_token_id = None
        check_alone_and_together(offloaded, Scores(monkeypatch))
    assert (max(rows, default=0) > (4 if dtype == "bfloat16" else 12)) == by_rows
    if by_rows:
        assert bool(alone) == (dtype == "bfloat16")
        assert min(alone, default=4) >= 4


def test_it_differs_from_one_text_at_a_time_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products are summed in another order. With one at a time, not even that."""
    scores = Scores(monkeypatch)
    with load(make_tiny("mixtral", tmp_path / "src"), dtype="float32") as offloaded:
        model = offloaded.model
        model.generation_config.eos_token_id = None

        def plain() -> None:
            for _ in generate(model, Numbers(), PROMPTS[0], drawn(PROMPTS[0])):
                pass

        stock = scores.of(plain)
        one = scores.of(lambda: texts_of(offloaded, PROMPTS[:1], most=1))
        several = scores.of(lambda: texts_of(offloaded, PROMPTS[:1]))
    assert all(torch.equal(one[so_far], wanted) for so_far, wanted in stock.items())
    assert list(several) == list(stock)
    for so_far, wanted in stock.items():
        assert (several[so_far] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_the_same_texts_however_many_at_a_time(mixtral: Offloaded, most: int) -> None:
    prompts = [PROMPTS[i % 5] for i in range(12)]
    found = texts_of(mixtral, prompts, most=most)
    if most > 1:
        assert found == texts_of(mixtral, prompts)
    assert sorted(found) == list(range(12))
    assert found[0] == found[5] == found[10]


def test_experts_are_loaded_once_for_all(mixtral: Offloaded) -> None:
    """The same text four times at once asks for no more experts than once."""
    mixtral.meter.reset()
    texts_of(mixtral, PROMPTS[:1])
    alone = mixtral.stats()
    mixtral.meter.reset()
    texts_of(mixtral, PROMPTS[:1] * 4)
    together = mixtral.stats()
    assert sum(together["tiers"].values()) == sum(alone["tiers"].values())
    assert together["tokens"] == 4 * alone["tokens"]
    assert together["steps"] == alone["steps"]
    assert together["step_s"] >= together["experts_s"] > 0


def test_the_model_is_left_as_it_was(mixtral: Offloaded) -> None:
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = mixtral.model(ids).logits
        linears = [m for m in mixtral.model.modules() if type(m) is torch.nn.Linear]
        running = generate_together(mixtral.model, Numbers(), PROMPTS, GenerationSettings(50))
        next(running)
        assert any("forward" in vars(module) for module in linears)
        assert torch.equal(mixtral.model(ids).logits, before)  # meanwhile, too
        running.close()
        assert not any("forward" in vars(module) for module in linears)
        assert torch.equal(mixtral.model(ids).logits, before)


def collect(
    together: Together, texts: Sequence[Text]
) -> tuple[list[list[Piece]], list[Exception | None]]:
    """Starts all of them now, and goes on until they have ended."""
    pieces: list[list[Piece]] = [[] for _ in texts]
    errors: list[Exception | None] = [None] * len(texts)

    def teller(index: int) -> Callable[[Piece | Exception], None]:
        def tell(found: Piece | Exception) -> None:
            if isinstance(found, Exception):
                errors[index] = found
            else:
                pieces[index].append(found)

        return tell

    for index, text in enumerate(texts):
        together.start(text, teller(index))
    while together.running:
        together.step()
    return pieces, errors


def test_an_error_of_one_is_not_the_others(
    mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text whose expert cannot be read ends; those beside it, which share its visits, go on."""
    expected = texts_of(mixtral, [PROMPTS[1]])[0]
    cannot = Text([3, 4, 5], GenerationSettings(8, json_schema="{}"))  # no JSON in this vocabulary
    well = Text(PROMPTS[1], drawn(PROMPTS[1]))
    with Together(mixtral.model, Numbers()) as together:
        pieces, errors = collect(together, [cannot, well])
    assert errors[0] is not None
    assert errors[1] is None
    assert "".join(piece.text for piece in pieces[1]) == expected


def test_an_expert_that_cannot_be_loaded_ends_only_those_who_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(make_tiny("qwen3_moe", tmp_path / "src"), ram_budget="80%") as offloaded:
        offloaded.model.generation_config.eos_token_id = None
        wanted = [experts_of(offloaded, prompt) for prompt in ([5], [7], [9], [11], [13], [15])]
        prompts = [[5], [7], [9], [11], [13], [15]]
        one, bad = next(
            (i, key) for i, keys in enumerate(wanted) for key in sorted(keys)
            if any(key not in others for others in wanted)
        )  # fmt: skip
        fetcher = offloaded._fetcher
        demand = fetcher.loader.demand

        def refuse(keys: Any) -> Any:
            keys = list(keys)
            if bad in keys:
                raise CacheError(f"{bad}: damaged")
            return demand(keys)

        monkeypatch.setattr(fetcher.loader, "demand", refuse)
        monkeypatch.setattr(fetcher.cache, "visit", _never_resident(fetcher.cache))
        with Together(offloaded.model, Numbers()) as together:
            settings = GenerationSettings(1)
            _, errors = collect(together, [Text(prompt, settings) for prompt in prompts])
        assert isinstance(errors[one], CacheError)
        failed = {i for i, error in enumerate(errors) if error is not None}
        assert failed == {i for i, keys in enumerate(wanted) if bad in keys}
        assert len(failed) < len(prompts)


def experts_of(offloaded: Offloaded, prompt: list[int]) -> set[ExpertKey]:
    """What the prompt's pass asks for."""
    found = set[ExpertKey]()
    cache = offloaded.cache
    visit = cache.visit

    def watched(layer: int, experts: Sequence[int], **options: Any) -> Any:
        found.update(ExpertKey(layer, int(expert)) for expert in experts)
        return visit(layer, experts, **options)

    cache.visit = watched  # type: ignore[method-assign]
    for _ in generate(offloaded.model, Numbers(), prompt, GenerationSettings(1)):
        pass
    del cache.visit
    return found


def _never_resident(cache: Any) -> Callable[..., Any]:
    visit = type(cache).visit

    def found(layer: int, experts: Sequence[int], **options: Any) -> Any:
        there = visit(cache, layer, experts, **options)
        return replace(there, hits={}, missing=tuple(there.keys))

    return found


def test_who_is_given_up_ends_before_the_next_pass_and_the_others_go_on(
    mixtral: Offloaded,
) -> None:
    expected = texts_of(mixtral, [PROMPTS[0]])[0]
    found, gone = [list[Piece](), list[Piece]()], False
    with Together(mixtral.model, Numbers()) as together:

        def tell(index: int) -> Callable[[Any], None]:
            return lambda piece: found[index].append(piece)

        together.start(Text(PROMPTS[0], drawn(PROMPTS[0])), tell(0))
        together.start(Text(PROMPTS[1], GenerationSettings(50)), tell(1), should_stop=lambda: gone)
        for _ in range(3):
            together.step()
        gone = True
        together.step()
        assert together.running == 1
        assert (last := found[1][-1].finish) is not None
        assert (last.reason, last.n_new) == ("cancelled", 3)
        while together.running:
            together.step()
    assert "".join(piece.text for piece in found[0]) == expected


def test_those_that_end_in_one_pass_are_all_gone_behind_it(mixtral: Offloaded) -> None:
    found = list[Any]()
    with Together(mixtral.model, Numbers()) as together:
        for prompt in PROMPTS:
            together.start(Text(prompt, GenerationSettings(2)), found.append)
        assert together.running == 5
        together.step()
        assert together.running == 5
        together.step()
        assert together.running == 0
    assert sum(piece.finish is not None for piece in found) == 5


def test_texts_are_admitted_in_order_as_memory_allows(mixtral: Offloaded) -> None:
    """Nobody starves: a large prompt at the head of the queue waits for room, and gets it."""
    began = list[int]()
    prompts = [[3] * 20, [4] * 60, [5, 6], [7, 8]]
    held = list[tuple[int, int]]()
    with Together(mixtral.model, Numbers(), kv_budget=110_000) as together:
        waiting = [Text(prompt, GenerationSettings(12)) for prompt in prompts]
        while waiting or together.running:
            while waiting and together.has_room(waiting[0]):
                began.append(len(waiting[0].prompt_ids))
                together.start(waiting.pop(0), lambda found: None)
            together.step()
            held.append((together.running, together.kv_bytes))
    assert began == [20, 60, 2, 2]
    assert max(running for running, _ in held) > 1
    assert all(n_bytes <= 110_000 for running, n_bytes in held if running > 1)


def test_a_text_that_is_larger_than_all_memory_runs_alone(mixtral: Offloaded) -> None:
    one, other = Text([3] * 30, GenerationSettings(4)), Text([4], GenerationSettings(4))
    with Together(mixtral.model, Numbers(), kv_budget=1) as together:
        assert together.has_room(one)
        together.start(one, lambda found: None)
        together.step()
        assert not together.has_room(other)
        while together.running:
            together.step()
        assert together.has_room(other)


def test_where_texts_outgrow_the_memory_the_oldest_goes_on(
    mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebound.text.together.MEASURE_EVERY", 2)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    expected = texts_of(mixtral, prompts)
    paused, ended = set[int](), list[int]()
    texts = ["" for _ in prompts]
    with Together(mixtral.model, Numbers(), kv_budget=10**9) as together:

        def tell(index: int) -> Callable[[Any], None]:
            def told(piece: Any) -> None:
                texts[index] += piece.text
                if piece.finish is not None:
                    ended.append(index)

            return told

        for index, prompt in enumerate(prompts):
            together.start(Text(prompt, drawn(prompt)), tell(index))
        together.step()
        together._memory.budget = together.kv_bytes - 1
        while together.running:
            together.step()
            paused.add(together.paused)
    assert 2 in paused
    assert ended[0] == 0
    assert dict(enumerate(texts)) == expected


def test_what_cannot_be(mixtral: Offloaded) -> None:
    for options in ({"most": 0}, {"kv_budget": 0}):
        with pytest.raises(MoeboundError, match="1"):
            Together(mixtral.model, Numbers(), **options)  # type: ignore[arg-type]
    with pytest.raises(MoeboundError, match="one for each of 2 prompts"):
        next(generate_together(mixtral.model, Numbers(), [[1], [2]], [GenerationSettings(1)]))
    with pytest.raises(MoeboundError, match="no tokens"):
        list(generate_together(mixtral.model, Numbers(), [[1], []], GenerationSettings(1)))
    assert list(generate_together(mixtral.model, Numbers(), [], GenerationSettings(1))) == []


def test_sequences_that_share_state_run_one_at_a_time(mixtral: Offloaded) -> None:
    def model(rope: Any) -> Any:
        config = SimpleNamespace(rope_parameters=rope)
        return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: config))

    assert not shares_state(mixtral.model)
    assert shares_state(model({"rope_type": "dynamic", "factor": 2.0}))
    assert shares_state(model({"full_attention": {"rope_type": "dynamic"}}))
    assert not shares_state(model({"rope_type": "longrope"}))
    assert not shares_state(model(None))
    assert MOST == joined.ROWS
