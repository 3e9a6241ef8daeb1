"""Tokens of several texts as rows of one pass: the same bits as a pass for each, or not used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

import tiny_models
from moebound import _native
from moebound.errors import CacheError
from moebound.model.joined import JoinedLinears
from moebound.model.native_routers import NativeRouter
from moebound.model.strands import Strand, Strands
from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.text import one_pass
from moebound.text.growing_cache import GrowingCache
from moebound.text.one_pass import OnePass
from tiny_models import make_tiny

TEXTS = [[3, 9, 4, 5, 7, 8], [11, 2, 6, 3, 5, 9], [8, 8, 1, 4, 2, 5]]
N_PROMPT = 2


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class Client:
    """A text, read by a strand; rests before each pass. logits: of its passes."""

    def __init__(self, model: Any, ids: list[int], strands: Strands) -> None:
        self.model, self.ids = model, ids
        self.logits = list[torch.Tensor]()
        self.strand: Strand = strands.start(self.work)

    def work(self) -> None:
        cache = GrowingCache(self.model.config).cache
        for start in (0, *range(N_PROMPT, len(self.ids))):
            self.strand.rest()
            ids = self.ids[start : start + 1] if start else self.ids[:N_PROMPT]
            output = self.model(
                input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True
            )
            self.logits.append(output.logits[0, -1].clone())


@contextmanager
def joining(model: Any, *, one: bool) -> Iterator[OnePass | None]:
    linears = JoinedLinears(model)
    found = OnePass(model) if one else None
    try:
        yield found
    finally:
        if found is not None:
            found.remove()
        linears.remove()


def read(model: Any, texts: list[list[int]] = TEXTS) -> list[Client]:
    strands = Strands()
    clients = [Client(model, text, strands) for text in texts]
    while alive := [client.strand for client in clients if not client.strand.dead]:
        strands.advance(alive)
    for client in clients:
        if client.strand.error is not None:
            raise client.strand.error
    return clients


def same(some: list[Client], others: list[Client]) -> bool:
    return all(
        torch.equal(x, y)
        for a, b in zip(some, others, strict=True)
        for x, y in zip(a.logits, b.logits, strict=True)
    )


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offloaded]:
    source = make_tiny("mixtral", tmp_path_factory.mktemp("mixtral") / "src")
    with load(source, ram_budget="80%", dtype="bfloat16") as offloaded:
        yield offloaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe"])
def test_the_bits_of_a_pass_for_each(name: str, dtype: str, tmp_path: Path) -> None:
    with load(make_tiny(name, tmp_path / "src"), ram_budget="80%", dtype=dtype) as offloaded:
        model = offloaded.model
        with joining(model, one=False):
            expected = read(model)
        with joining(model, one=True) as one:
            assert one is not None
            assert one.usable, one.why_not
            found = read(model)
            assert not one.apart, one.why_apart
        assert same(found, expected)
        # The first pass behind the prompts is tried out, and the others are taken, if it may be:
        # in float32, torch rounds some of these small layers otherwise for several rows.
        taken = len(TEXTS[0]) - N_PROMPT - 1
        assert one.taken in ((taken,) if dtype == "bfloat16" else (0, taken))


@pytest.mark.skipif(_native.isa() == "scalar", reason="no vector instructions")
def test_routers_get_all_rows_at_once(mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    called, route = list[int](), NativeRouter.__call__

    def counted(router: NativeRouter, x: torch.Tensor) -> Any:
        called.append(x.numel() // x.shape[-1])
        return route(router, x)

    monkeypatch.setattr(NativeRouter, "__call__", counted)
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        read(mixtral.model)
    n_routers = len(mixtral.model.model.layers)
    assert called[-one.taken * n_routers :] == [len(TEXTS)] * (one.taken * n_routers)
    assert one.taken > 0


def test_stats_count_what_is_tried_out_once(mixtral: Offloaded) -> None:
    counted = []
    for one in (False, True):
        with joining(mixtral.model, one=one):
            mixtral.meter.reset()
            read(mixtral.model)
            stats = mixtral.stats()
            counted.append((sum(stats["tiers"].values()), stats["tokens"], stats["steps"]))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("name", ["nemotron_h", "qwen3_next"])
def test_what_has_other_states_goes_on_as_before(name: str, tmp_path: Path) -> None:
    with load(make_tiny(name, tmp_path / "src"), ram_budget="80%") as offloaded:
        with joining(offloaded.model, one=False):
            expected = read(offloaded.model)
        with joining(offloaded.model, one=True) as one:
            assert one is not None
            assert not one.usable
            assert one.why_not
            assert same(read(offloaded.model), expected)
        assert one.taken == 0


def test_other_bits_are_not_taken(mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with joining(mixtral.model, one=False):
        expected = read(mixtral.model)
    mix = one_pass._mix

    def off(*args: Any, **given: Any) -> Any:
        found = mix(*args, **given)
        return (found[0] + 0.01, *found[1:])

    monkeypatch.setattr(one_pass, "_mix", off)
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        assert same(read(mixtral.model), expected)
        assert one.taken == 0


def test_what_fails_when_tried_out_is_not_used(
    mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joining(mixtral.model, one=False):
        expected = read(mixtral.model)

    def refuse(*_: Any) -> Any:
        raise ValueError("no such rows")

    monkeypatch.setattr(one_pass, "OfTexts", refuse)  # attention is called row by row then
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        assert same(read(mixtral.model), expected)
        assert "no such rows" in one.why_apart
        assert one.usable
        assert one.taken == len(TEXTS[0]) - N_PROMPT - 2
    monkeypatch.setattr(one_pass, "_row", refuse)
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        assert same(read(mixtral.model), expected)
        assert "no such rows" in one.why_not
        assert one.taken == 0


def test_where_one_pass_fails_texts_go_on_from_where_they_were(
    mixtral: Offloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joining(mixtral.model, one=False):
        expected = read(mixtral.model)
    tried = list[int]()
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        last = list(mixtral.model.model.layers)[-1].mlp.experts.moebound
        run_all = last._run_all

        def failing(calls: Any) -> Any:
            tried.append(len(calls))
            if len(tried) == 4:  # the pass behind the one that was tried out, in its last layer
                raise CacheError("damaged")
            return run_all(calls)

        monkeypatch.setattr(last, "_run_all", failing)
        found = read(mixtral.model)
        assert not any(client.strand.error for client in found)
        assert same(found, expected)
        assert one.taken == len(TEXTS[0]) - N_PROMPT - 2


def test_prompts_and_single_texts_are_left_alone(mixtral: Offloaded) -> None:
    with joining(mixtral.model, one=True) as one:
        assert one is not None
        read(mixtral.model, TEXTS[:1])
        assert one.taken == 0
        long = [TEXTS[0], TEXTS[1] + TEXTS[2]]
        read(mixtral.model, long)
        assert one.taken == len(TEXTS[0]) - N_PROMPT - 1
    before = dict(vars(mixtral.model))
    assert "forward" not in before


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_attention_of_all_texts_is_one_call(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        monkeypatch.setitem(tiny_models.SMALL, width, 64)
    attend, asked = ("attend_latent" if "deepseek" in name else "attend"), list[int]()
    before = getattr(_native, attend)

    def counting(queries: Any, *args: Any) -> None:
        asked.append(len(queries))
        before(queries, *args)

    monkeypatch.setattr(_native, attend, counting)
    with load(make_tiny(name, tmp_path / "src"), ram_budget="80%", dtype="bfloat16") as offloaded:
        with joining(offloaded.model, one=False):
            expected = read(offloaded.model)
        n_layers = offloaded.model.config.num_hidden_layers
        asked.clear()
        with joining(offloaded.model, one=True) as one:
            assert one is not None
            assert same(read(offloaded.model), expected)
        assert one.taken == 3
        # The pass that was tried out, each text alone beside it, and those that were taken.
        assert asked.count(3) == n_layers * 4
        assert asked.count(1) == n_layers * 3
