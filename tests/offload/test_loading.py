"""moebound.load: the same logits as everything in memory, whatever the budget and the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from moebound.checkpoint import open_checkpoint
from moebound.errors import (
    CacheError,
    CheckpointError,
    CorruptionError,
    MoeboundError,
    UnsupportedArchitectureError,
)
from moebound.model.pretrained import load_model
from moebound.offload.costs import measure_speeds
from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.store import compress, decompress, open_store
from moebound.types import ErrorBound, ExpertKey
from moebound.wordmath.builtin import resolve
from tiny_models import make_tiny

IDS = torch.arange(5, 25).view(2, 10)

# Packed in every way that transformers knows: as linear layers or the other way round, with biases,
# without gate, one tensor an expert on disk or one a layer.
FAMILIES = ["olmoe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h", "qwen3_next", "deepseek_v4",
            "aria_text", "inkling_text", "ernie4_5_moe"]  # fmt: skip

Make = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """both(name, ...) -> (store, the ordinary checkpoint it decompresses to). Not to be changed."""
    made: dict[tuple[Any, ...], tuple[Path, Path]] = {}

    def make(name: str, **options: Any) -> tuple[Path, Path]:
        key = (name, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            src = make_tiny(name, folder / "src", original_format=options.pop("original", True))
            compress(open_checkpoint(src), folder / "dst", bound=ErrorBound(0.3, "rate"), **options)
            decompress(folder / "dst", folder / "out")
            made[key] = folder / "dst", folder / "out"
        return made[key]

    return make


@pytest.fixture(scope="module")
def wordmath(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model's store, of some layers only: the others' experts are plain tensors."""
    folder = tmp_path_factory.mktemp("wordmath") / "store"
    source = open_checkpoint(resolve("builtin:wordmath"))
    compress(source, folder, bound=ErrorBound(0.3, "rate"), layers=set(range(1, 24)))
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("original", [True, False], ids=["one-by-one", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_stock_transformers(name: str, original: bool, both: Make) -> None:
    store, out = both(name, original=original)
    expected = logits(stock(out))
    for source in (store, out):
        with load(source, dtype="float32") as offloaded:
            assert (logits(offloaded.model) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{"shared_experts": True}, {"experts": {1}}])
def test_stores_of_some_experts_or_of_more(options: dict[str, Any], both: Make) -> None:
    store, out = both("qwen2_moe", **options)
    with load(store, dtype="float32") as offloaded:
        assert (logits(offloaded.model) - logits(stock(out))).abs().max() <= 1e-5


def test_experts_are_not_in_the_model(both: Make) -> None:
    store, out = both("mixtral")
    with load(store) as offloaded:
        names = [name for name, _ in offloaded.model.named_parameters()]
        assert not any("experts" in name for name in names)
        assert all(p.device.type == "cpu" for p in offloaded.model.parameters())
        assert offloaded.model.dtype == torch.bfloat16
        plain = {name for name, _ in stock(out).named_parameters() if "experts" not in name}
        assert set(names) == plain
        assert getattr(offloaded.model.config, "quantization_config", None) is None


WAYS: list[dict[str, Any]] = [
    {"ram_budget": "100%"},
    {"ram_budget": "20%", "tier": "disk"},
    {"ram_budget": "20%", "tier": "disk", "policy": "hobbit", "predictor": "gate"},
    {"ram_budget": "40%", "tier": "ram", "policy": "lru", "predictor": "previous"},
    {"ram_budget": "25%", "policy": "greedy-dual", "predictor": "matching", "threads": 1},
    {"ram_budget": "30%", "tier": "disk", "drop_cache": True, "threads": 3},
]


@pytest.fixture(scope="module")
def expected(wordmath: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with load(wordmath, dtype="float32", ram_budget="100%") as offloaded:
        model = offloaded.model
        ids = offloaded.tokenizer("Anna has 3 apples .", return_tensors="pt").input_ids
        texts = model.generate(ids, max_new_tokens=24, do_sample=False)
        yield ids, torch.cat([logits(model, ids[:, :n]).flatten() for n in (1, ids.shape[1])])
        assert torch.equal(stock(wordmath).generate(ids, max_new_tokens=24, do_sample=False), texts)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_bits_do_not_depend_on_the_way(
    options: dict[str, Any], wordmath: Path, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, found = expected
    with load(wordmath, dtype="float32", **options) as offloaded:
        for _ in range(2):  # a cache that is empty, and one that is not
            again = [logits(offloaded.model, ids[:, :n]).flatten() for n in (1, ids.shape[1])]
            assert torch.equal(torch.cat(again), found)
        stats = offloaded.stats()
    assert stats["loads"] >= stats["evictions"]
    if options["ram_budget"] == "100%":
        assert stats["evictions"] == 0
    else:
        assert stats["evictions"] > 0


def test_budget_is_kept(wordmath: Path) -> None:
    with load(wordmath, ram_budget="20%", tier="disk") as offloaded:
        ids = offloaded.tokenizer("Anna has 3 apples .", return_tensors="pt").input_ids
        offloaded.model.generate(ids, max_new_tokens=8, do_sample=False)
        assert 0 < offloaded.cache.used_bytes <= offloaded.choice.cache_bytes
        assert offloaded.pool_bytes <= offloaded.choice.cache_bytes


def test_everything_resident_reads_nothing_more(both: Make) -> None:
    store, _ = both("olmoe")
    with load(store, ram_budget="100%") as offloaded:
        logits(offloaded.model)
        logits(offloaded.model)
        offloaded.meter.reset()
        logits(offloaded.model)
        stats = offloaded.stats()
    assert (stats["hit_ratio"], stats["loads"], stats["bytes_moved"]) == (1, 0, 0)


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    share=st.integers(60, 100),
    policy=st.sampled_from(["lru", "lfu", "lfru", "hobbit", "activation-aware", "greedy-dual"]),
    predictor=st.sampled_from(["none", "gate", "previous", "matching"]),
    tier=st.sampled_from(["disk", "auto"]),
    threads=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_any_way_gives_the_same(
    share: int, policy: str, predictor: str, tier: Any, threads: int, lengths: list[int], both: Make
) -> None:
    store, out = both("mixtral")
    model = stock(out)
    with load(store, dtype="float32", ram_budget=f"{share}%", policy=policy, predictor=predictor,
              tier=tier, threads=threads) as offloaded:  # fmt: skip
        for length in lengths:
            ids = torch.arange(3, 3 + 2 * length).view(2, length)
            assert (logits(offloaded.model, ids) - logits(model, ids)).abs().max() <= 1e-5


def test_raw_where_it_is_faster(both: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = both("olmoe")

    def slow_decoder(entries: Any, *args: Any) -> Any:
        speeds = measure_speeds(entries, *args)
        return replace(speeds, decode_s=1.0) if entries[0].encoded else speeds

    monkeypatch.setattr("moebound.offload.choose.measure_speeds", slow_decoder)
    with load(store, dtype="float32", raw=out, ram_budget="90%") as offloaded:
        assert offloaded.choice.source == "raw"
        assert (logits(offloaded.model) - logits(stock(out))).abs().max() <= 1e-5
    with load(store, ram_budget="90%") as offloaded:
        assert offloaded.choice.source == "compressed"


class TestRefusals:
    def test_a_budget_that_is_too_small(self, both: Make) -> None:
        store, _ = both("mixtral")
        with pytest.raises(CacheError, match=r"smallest budget is \d+ bytes"):
            load(store, ram_budget=1000)
        with pytest.raises(CacheError, match="expected a size"):
            load(store, ram_budget="much")
        message = ""
        try:
            load(store, ram_budget=1000, tier="ram")
        except CacheError as error:
            message = str(error)
        least = int(message.split("smallest budget is ")[1].split()[0])
        load(store, ram_budget=least, tier="ram").close()
        with pytest.raises(CacheError, match="smallest budget"):
            load(store, ram_budget=least - 1, tier="ram")

    def test_a_family_with_a_forward_of_its_own(self, both: Make) -> None:
        store, _ = both("jetmoe")
        with pytest.raises(UnsupportedArchitectureError, match="from_pretrained"):
            load(store)

    def test_names(self, both: Make) -> None:
        store, _ = both("mixtral")
        with pytest.raises(CacheError, match="predictor 'crystal ball': expected none, gate"):
            load(store, predictor="crystal ball")
        with pytest.raises(CacheError, match="policy"):
            load(store, policy="fifo")
        with pytest.raises(MoeboundError, match="dtype"):
            load(store, dtype="int8")

    def test_raw_of_another_model(self, both: Make) -> None:
        store, _ = both("mixtral")
        _, other = both("nemotron_h")
        with pytest.raises(CheckpointError, match="not those of"):
            load(store, raw=other)
        with pytest.raises(CheckpointError, match="found a store"):
            load(store, raw=store)

    def test_the_function_without_a_store(self, both: Make) -> None:
        _, out = both("mixtral")
        model = stock(out)
        model.set_experts_implementation("moebound")
        with pytest.raises(CacheError, match=r"moebound\.load"):
            logits(model)


class TestDamage:
    """Found while the model runs: an error that names the expert, no hang, no wrong text."""

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        src = make_tiny("mixtral", tmp_path / "src")
        compress(open_checkpoint(src), tmp_path / "dst", bound=ErrorBound(0.3, "rate"))
        return tmp_path / "dst"

    @staticmethod
    def spoil(store: Path, key: ExpertKey) -> Callable[[], None]:
        expert = open_store(store).expert(key)
        with open(expert.file, "r+b") as file:
            file.seek(expert.offset + expert.n_bytes // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0xFF]))

        def mend() -> None:
            with open(expert.file, "r+b") as file:
                file.seek(expert.offset + expert.n_bytes // 2)
                file.write(byte)

        return mend

    def test_a_corrupt_expert(self, copy: Path) -> None:
        expected = logits(stock(copy))
        with load(copy, dtype="float32", ram_budget="70%", tier="disk") as offloaded:
            before = threading.active_count()
            mend = self.spoil(copy, ExpertKey(1, 2))
            with pytest.raises(CorruptionError, match=r"layer 1 expert 2: .*tensor 'model"):
                logits(offloaded.model)
            mend()  # nothing is left behind: what was wrong is right again
            assert (logits(offloaded.model) - expected).abs().max() <= 1e-5
            assert threading.active_count() == before

    def test_a_file_that_goes_away(self, copy: Path) -> None:
        with load(copy, ram_budget="70%", tier="disk") as offloaded:
            for file in copy.glob("*.safetensors"):
                file.unlink()
            with pytest.raises(CheckpointError, match="layer 0 expert"):
                logits(offloaded.model)

    def test_in_ram_nothing_can_go_away(self, copy: Path) -> None:
        expected = logits(stock(copy))
        with load(copy, dtype="float32", ram_budget="130%", tier="ram") as offloaded:
            for file in copy.glob("*.safetensors"):
                file.unlink()
            assert (logits(offloaded.model) - expected).abs().max() <= 1e-5

    def test_an_interrupt(self, copy: Path) -> None:
        expected = logits(stock(copy))
        with load(copy, dtype="float32", ram_budget="70%", tier="disk") as offloaded:
            module = offloaded.model.model.layers[1].mlp.experts
            compute = module._apply_gate

            def interrupted(*_: Any) -> Any:
                raise KeyboardInterrupt

            module._apply_gate = interrupted
            with pytest.raises(KeyboardInterrupt):
                logits(offloaded.model)
            module._apply_gate = compute
            assert (logits(offloaded.model) - expected).abs().max() <= 1e-5

    def test_after_close(self, copy: Path) -> None:
        before = threading.active_count()
        offloaded = load(copy)
        offloaded.close()
        assert threading.active_count() == before
        with pytest.raises(CacheError, match="closed"):
            logits(offloaded.model)


@pytest.mark.slow
def test_stats_add_up(wordmath: Path) -> None:
    with load(wordmath, ram_budget="20%", tier="disk", predictor="gate") as offloaded:
        assert isinstance(offloaded, Offloaded)
        ids = offloaded.tokenizer("Anna has 3 apples .", return_tensors="pt").input_ids
        out = offloaded.model.generate(ids, max_new_tokens=12, do_sample=False)
        n_new = out.shape[1] - ids.shape[1]
        stats = offloaded.stats()
    assert stats["tiers"]["decoded"] + stats["tiers"]["disk"] == sum(stats["tiers"].values()) > 0
    assert (stats["steps"], stats["tokens"]) == (n_new, ids.shape[1] + n_new - 1)
    assert sum(stats["stall_s"].values()) <= stats["experts_s"] <= stats["step_s"]
    assert stats["prefetch"]["loads"] > 0
    assert 0 < stats["prefetch"]["precision"] <= 1
    assert stats["choice"]["predicted_s"]["compressed, disk"] > 0


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4", "ernie4_5_vl_moe"])
def test_the_language_part_of_a_multimodal_model(name: str, both: Make) -> None:
    store, out = both(name)
    expected = logits(load_model(out, dtype=torch.float32))
    with load(store, dtype="float32", ram_budget="90%") as offloaded:
        assert (logits(offloaded.model) - expected).abs().max() <= 1e-5


def test_a_device_that_is_not_there(both: Make) -> None:
    store, _ = both("mixtral")
    with pytest.raises(MoeboundError, match=r"device 'cuda:99': torch .* cannot use it here"):
        load(store, device="cuda:99")


def test_it_is_a_model_and_a_tokenizer_and_says_so(both: Make) -> None:
    store, _ = both("olmoe")
    with load(store, ram_budget="50%") as offloaded:
        model, tokenizer = offloaded
        assert model is offloaded.model
        assert tokenizer is offloaded.tokenizer
        with pytest.raises(AttributeError, match=r"use \.model\.generate"):
            _ = offloaded.generate
        with pytest.raises(TypeError, match=r"use \.model\(\.\.\.\)"):
            offloaded(IDS)
