"""Slots of codes: the same logits whatever the way, those of slots of values up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from calibrate.test_collect import TEXT, loaded
from codec.kernel import ISAS, using
from moebound import _native
from moebound.calibrate import Settings, collect
from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError, MoeboundError
from moebound.model import few_rows
from moebound.offload import codes, compute, on_demand, slots
from moebound.offload.costs import Speeds
from moebound.offload.fetcher import Fetcher
from moebound.offload.loading import load
from moebound.offload.timing import Turns
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny

SLOTS = codes.SLOTS
CODES: tuple[codes.SlotsName, ...] = ("codes", "codes4")
IDS = torch.arange(5, 25).view(2, 10)
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(name, ...) -> a store. Not to be changed. felt: rows of gate and up in steps of their
    own, by Fisher statistics."""
    stores = dict[tuple[Any, ...], Path]()

    def make(name: str, *, rate: float = 0.9, felt: bool = False, **options: Any) -> Path:
        key = (name, rate, felt, *sorted((k, str(v)) for k, v in options.items()))
        if key not in stores:
            folder = tmp_path_factory.mktemp(name)
            src = make_tiny(name, folder / "src")
            bound = ErrorBound(rate, "rate")
            if felt:
                statistics = collect(loaded(src), TEXT, folder / "stats", Settings(fisher=True))
                options |= {"method": "calibrated", "calibration": statistics}
            compress(open_checkpoint(src), folder / "dst", bound=bound, **options)
            stores[key] = folder / "dst"
        return stores[key]

    return make


def logits(store: Path, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with load(store, **{"dtype": "float32", "slots": "codes"} | options) as offloaded:
        with torch.no_grad():
            offloaded.model(ids)
            found: torch.Tensor = offloaded.model(ids).logits
        return found


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "nemotron_h", "qwen3_next", "aria_text"])
def test_logits_of_values_up_to_rounding(name: str, made: Make) -> None:
    values = logits(made(name), slots="values")
    for of in CODES:
        assert (logits(made(name), slots=of) - values).abs().max() <= 1e-5


@pytest.mark.parametrize("of_codes", CODES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_rows_in_steps_of_their_own(
    name: str, of_codes: codes.SlotsName, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 3 of codec `bound`: the weights that are certified, and one result everywhere."""
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(codes, "MOST_OUTSIDE", 0.5)
    store = made(name, rate=3.0, felt=True)
    states, values = [], logits(store, slots="values")
    for of in SLOTS:
        with load(store, dtype="float32", slots=of) as offloaded:
            states.append(offloaded.model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(weights, state[of]) for of, weights in states[0].items())
    with load(store, dtype="float32", slots=of_codes, ram_budget="100%") as offloaded:
        assert offloaded.choice.slots == of_codes
        assert not offloaded.choice.not_codes
        with torch.no_grad():
            expected = offloaded.model(IDS).logits
        slot = next(iter(offloaded.cache.visit(0, range(4)).hits.values()))
        assert isinstance(slot, slots.CodeSlot)
        assert any(len(part.factors) for part in slot.parts.values())
        aside = sum(part.aside_bytes for part in slot.parts.values())
        assert aside <= (slot.kind.aside_bytes or 0)
    assert (expected - values).abs().max() <= 1e-5
    for options in ({"ram_budget": "60%", "tier": "disk"}, {"ram_budget": "100%", "threads": 1}):
        assert torch.equal(logits(store, slots=of_codes, **options), expected), options
    for isa in ISAS:
        with using(isa):
            assert torch.equal(logits(store, slots=of_codes), expected), isa


@pytest.mark.parametrize("of", CODES)
def test_many_tokens_are_computed_as_by_values(
    of: codes.SlotsName, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "HAS_BFLOAT16", True)
    ids = torch.arange(3, 99).view(1, 96) % 60
    some: dict[str, Any] = {"ids": ids, "dtype": "bfloat16"}
    values = logits(made("mixtral"), slots="values", **some)
    rows = list[int]()

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(slots, "linear", spy)
    assert torch.equal(logits(made("mixtral"), slots=of, **some), values)
    assert min(rows) >= few_rows.MANY_ROWS
    rows.clear()
    logits(made("mixtral"), slots=of, **some | {"ids": IDS})
    assert not rows


@pytest.mark.parametrize("of", CODES)
def test_nothing_but_the_slots_shows_in_logits(
    of: codes.SlotsName, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)  # several threads for small products too
    store = made("mixtral")
    expected = logits(store, slots=of, ram_budget="100%")
    for options in (
        {"ram_budget": "42%", "tier": "disk"},
        {"ram_budget": "42%", "tier": "disk", "policy": "lru", "predictor": "gate", "threads": 1},
        {"ram_budget": "60%", "tier": "ram", "threads": 3},
        {"ram_budget": "45%", "drop_cache": True},
    ):
        assert torch.equal(logits(store, slots=of, **options), expected), options
    for isa in ISAS:
        with using(isa):
            assert torch.equal(logits(store, slots=of), expected), isa
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before != 3 else 2)
        with load(store, dtype="float32", slots=of) as offloaded, torch.no_grad():
            x = torch.randn(9, offloaded.model.config.hidden_size)
            slot = next(iter(offloaded.cache.visit(0, [0]).hits.values()), None)
            assert slot is None  # nothing is there yet
            offloaded.model(IDS)
            (found,) = offloaded.cache.visit(0, [0]).hits.values()
            assert isinstance(found, slots.CodeSlot)
            outputs = []
            for n_threads in (1, 3):
                torch.set_num_threads(n_threads)
                outputs.append(found.project("gate_up_proj", x))
            alone = torch.cat([found.project("gate_up_proj", row) for row in x[:, None]])
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[0], alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("of", "times"), [("codes", 2), ("codes4", 4)])
def test_more_experts_in_the_same_memory(of: codes.SlotsName, times: int, made: Make) -> None:
    with load(made("mixtral"), slots=of, ram_budget="100%", tier="disk") as offloaded:
        assert offloaded.choice.slots == of
        assert not offloaded.choice.not_codes
        with torch.no_grad():
            offloaded.model(IDS)
            offloaded.meter.reset()
            offloaded.model(IDS)
        kinds = {held.kind for held in offloaded.cache.visit(0, [0, 1]).hits.values()}  # type: ignore[union-attr]
        (kind,) = kinds
        values = replace(kind, aside_bytes=None).n_bytes
        assert times * (kind.n_bytes - (kind.aside_bytes or 0)) == values
        assert offloaded.pool_bytes <= offloaded.choice.cache_bytes
        found = offloaded.cache.visit(0, [0]).hits
        for slot in found.values():
            assert isinstance(slot, slots.CodeSlot)
            aside = sum(part.aside_bytes for part in slot.parts.values())
            assert aside <= (kind.aside_bytes or 0)


def test_a_smaller_budget_will_do(made: Make) -> None:
    store = made("mixtral")
    with pytest.raises(CacheError, match="budget 1 bytes") as values:
        load(store, ram_budget=1)
    with pytest.raises(CacheError, match="budget 1 bytes") as less:
        load(store, ram_budget=1, slots="codes")
    sizes = [int(str(e.value).split("smallest budget is ")[1].split()[0]) for e in (values, less)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_that_are_certified(dtype: str, made: Make) -> None:
    states = []
    for of in SLOTS:
        with load(made("mixtral"), dtype=dtype, slots=of) as offloaded:
            states.append(offloaded.model.state_dict())
    for state in states[1:]:
        assert states[0].keys() == state.keys()
        for name, weights in states[0].items():
            assert torch.equal(weights, state[name]), name


def test_a_model_that_is_cast(made: Make) -> None:
    found = []
    for of in SLOTS:
        with load(made("mixtral"), dtype="bfloat16", slots=of) as offloaded:
            offloaded.model.float()
            with torch.no_grad():
                found.append(offloaded.model(IDS).logits)
    for other in found[1:]:
        assert torch.equal(other, found[0])  # by the same weights, cast


def test_gradients(made: Make) -> None:
    found = []
    for of, budget in zip(SLOTS, ("100%", "45%", "30%"), strict=True):
        with load(
            made("mixtral"),
            dtype="float32",
            slots=of,
            ram_budget=budget,
            tier="disk",
        ) as offloaded:
            offloaded.model(IDS).logits.square().sum().backward()
            gradients = {
                name: p.grad.clone()
                for name, p in offloaded.model.named_parameters()
                if p.grad is not None
            }
            found.append(gradients)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, gradient in found[0].items():
            off = (gradient - other[name]).norm() / gradient.norm().clamp_min(1e-12)
            assert off < 1e-4, f"{name}: {off:g}"


def _stays_values(store: Path, why: str, **options: Any) -> None:
    with load(store, dtype="float32", slots="codes", **options) as offloaded:
        choice = offloaded.choice
        assert choice.slots == "values"
        assert all(found.startswith("values: ") for found in choice.not_codes)
        assert why in next(iter(choice.not_codes))
        with torch.no_grad():
            found = offloaded.model(IDS).logits
    assert torch.equal(found, logits(store, slots="values"))


def test_what_cannot_be_codes_stays_values(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _stays_values(made("gpt_oss"), "laid out otherwise than the model computes")
    _stays_values(made("mixtral", rate=1e-4), "codes")
    _stays_values(made("mixtral", codec="lossless"), "compressed by lossless")
    monkeypatch.setattr(codes, "MOST_PATCHED", -1)
    _stays_values(made("mixtral"), "too many patches")


def test_some_of_the_experts_are_codes(made: Make) -> None:
    store = made("mixtral", experts={1})
    with load(store, dtype="float32", slots="codes") as offloaded:
        assert offloaded.choice.slots == "codes"
        assert set(offloaded.choice.not_codes) == {"values: not compressed"}
    assert (logits(store) - logits(store, slots="values")).abs().max() <= 1e-5


def test_where_many_weights_are_outside_of_four_bits_codes_have_a_byte(made: Make) -> None:
    fine, mixed = made("mixtral", rate=0.2), made("mixtral", experts={1})
    with load(fine, dtype="float32", slots="codes4") as offloaded:
        assert offloaded.choice.slots == "codes"
        (why,) = offloaded.choice.not_codes
        assert "sixteen" in why
        with torch.no_grad():
            found = offloaded.model(IDS).logits
    assert torch.equal(found, logits(fine, slots="codes"))
    with load(mixed, dtype="float32", slots="codes4") as offloaded:
        assert offloaded.choice.slots == "codes4"
        assert set(offloaded.choice.not_codes) == {"values: not compressed"}
        kinds = offloaded._fetcher.loader._kinds.values()
        assert {(kind.bits, kind.aside_bytes is None) for kind in kinds} == {(8, True), (4, False)}


def test_more_weights_aside_than_a_slot_has_room_for_is_an_error(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a stream that no encoder made."""
    monkeypatch.setattr(codes, "stored_outside", lambda *_, **__: 0)
    monkeypatch.setattr("moebound.offload.choose.measure_speeds", lambda *_: Speeds(1, 1, 1, 1))
    with load(made("mixtral", rate=0.12), slots="codes4") as offloaded:
        assert offloaded.choice.slots == "codes4"
        with pytest.raises(MoeboundError, match="more than its head allows"), torch.no_grad():
            offloaded.model(IDS)


def test_the_faster_is_taken(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made("mixtral")
    for slow in ("codes", "values"):

        def compute(kinds: Any, between: Any, slow: str = slow) -> Turns:
            slower = {kind: (kind.aside_bytes is not None) == (slow == "codes") for kind in kinds}
            return Turns(0.0, {kind: 1.0 if slower[kind] else 1e-6 for kind in slower})

        monkeypatch.setattr("moebound.offload.choose.measure_turns", compute)
        with load(store, slots="auto", ram_budget="100%") as offloaded:
            assert offloaded.choice.slots != slow
            assert {
                "compressed, disk",
                "compressed, disk, codes",
                "compressed, disk, codes4",
            } <= set(offloaded.choice.predicted_s)
            if slow == "values":
                assert offloaded.choice.slots == "codes4"


def test_another_name_is_refused(store: Path) -> None:
    with pytest.raises(CacheError, match="expected values, codes, codes4 or auto"):
        load(store, slots="bytes")  # type: ignore[arg-type]


def test_a_damaged_expert_is_named(made: Make, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "store"
    shutil.copytree(made("mixtral"), store)
    with load(store, slots="codes", tier="disk", ram_budget="60%") as offloaded:
        for file in store.glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            middle = len(data) // 2
            for at in range(middle, min(len(data), middle + 60000), 64):
                data[at] ^= 0xFF
            file.write_bytes(data)
        with pytest.raises(MoeboundError, match="tensor"), torch.no_grad():
            offloaded.model(IDS)


def test_the_benchmark_runs_both_kinds() -> None:
    from moebound.bench.offload.cases import cases
    from moebound.bench.offload.settings import OffloadSettings

    settings = OffloadSettings(slots=SLOTS, tiers=("disk",), budgets=(0.1,), peers=())
    assert [(case.name, case.options(settings)["slots"]) for case in cases(settings)] == [
        ("raw, disk", "values"),
        ("compressed, disk", "values"),
        ("compressed, disk, slots codes", "codes"),
        ("compressed, disk, slots codes4", "codes4"),
    ]
    with pytest.raises(MoeboundError, match="slots"):
        OffloadSettings(slots=("bytes",))


def _token_by_token(store: Path, n: int = 6, **options: Any) -> torch.Tensor:
    from transformers import DynamicCache

    with load(store, **{"dtype": "float32", "slots": "codes"} | options) as offloaded:
        past, found = DynamicCache(config=offloaded.model.config), list[torch.Tensor]()
        with torch.no_grad():
            for token in IDS[0, :n].tolist():
                step = offloaded.model(torch.tensor([[token]]), past_key_values=past)
                found.append(step.logits)
        return torch.cat(found)


@pytest.mark.parametrize("of", CODES)
@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_experts_computed_together_are_those_computed_alone(
    name: str, of: codes.SlotsName, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    together = list[int]()
    way = "gated_outputs" if name == "mixtral" else "_of_codes"
    whole = getattr(compute, way)

    def spy(*args: Any) -> torch.Tensor:
        together.append(len(args[-3]))
        return whole(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(compute, way, spy)
    found = _token_by_token(made(name), slots=of, ram_budget="100%")
    assert max(together) > 1
    for options in ({"ram_budget": "60%", "tier": "disk"}, {"ram_budget": "100%", "threads": 1}):
        assert torch.equal(_token_by_token(made(name), slots=of, **options), found), options
    together.clear()

    def alone(module: Any, experts: Any, dtype: torch.dtype, threads: int) -> torch.Tensor:
        found = [compute.expert_output(module, e.expert, e.slot, e.rows, dtype) for e in experts]
        return torch.cat(found)

    monkeypatch.setattr(on_demand, "few_rows_outputs", alone)
    assert torch.equal(_token_by_token(made(name), slots=of, ram_budget="100%"), found)
    assert max(together, default=1) == 1


def test_experts_of_a_prompt_come_one_by_one(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each makes room when it has been computed."""
    sizes = list[int]()
    visit: Any = Fetcher.visit

    def spied(self: Fetcher, *args: Any, **options: Any) -> None:
        *rest, called = args

        def compute_some(some: Any, threads: int) -> None:
            sizes.append(len(some))
            called(some, threads)

        visit(self, *rest, compute_some, **options)

    monkeypatch.setattr(Fetcher, "visit", spied)
    for budget in ("45%", "100%"):
        logits(made("mixtral"), ram_budget=budget, tier="disk")
        assert set(sizes) == {1}
        sizes.clear()
    _token_by_token(made("mixtral"), ram_budget="100%")
    assert max(sizes) > 1


def test_linear_layers_of_a_token_are_native(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, and the same whatever the budget and torch's threads."""
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    options: dict[str, Any] = {"dtype": "bfloat16", "ram_budget": "100%"}
    found = _token_by_token(made("mixtral"), **options)
    if _native.isa() != "scalar":
        products = list[int]()
        product = few_rows.NativeLinear.product

        def spy(self: few_rows.NativeLinear, x: torch.Tensor) -> torch.Tensor:
            products.append(x.numel())
            return product(self, x)

        monkeypatch.setattr(few_rows.NativeLinear, "product", spy)
        assert torch.equal(_token_by_token(made("mixtral"), **options), found)
        assert products
    small = options | {"ram_budget": "60%", "tier": "disk", "threads": 1}
    assert torch.equal(_token_by_token(made("mixtral"), **small), found)
