"""Linear layers that are no expert's, held as codes: the certified weights, one order of sums."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as hf_logging

from codec.kernel import ISAS, using
from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError, CheckpointError, CorruptionError
from moebound.model import code_linear, few_rows, joined
from moebound.model.attention import latent_attention
from moebound.model.code_linear import CodeLinear, bytes_in_codes
from moebound.offload import codes
from moebound.offload.linears import other_bytes
from moebound.offload.loading import load
from moebound.offload.timing import Between, linear_layers, read_weights
from moebound.store import compress, decoded_weights, open_store
from moebound.store import others as store_others
from moebound.types import ErrorBound
from text.test_one_pass import joining, read, same
from tiny_models import SMALL, make_tiny

IDS = torch.arange(5, 25).view(2, 10)
HELD: tuple[codes.SlotsName, ...] = ("codes", "codes4")
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of tiny models are worth codes, and threads."""
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for module in (few_rows, store_others, joined):
        monkeypatch.setattr(module, "LEAST_WEIGHTS", 512)
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(name, ...) -> a store. Not to be changed."""
    stores = dict[tuple[Any, ...], Path]()

    def make(name: str, others: Any = 0.9, *, tied: bool = False) -> Path:
        key = (name, others, tied)
        if key not in stores:
            folder = tmp_path_factory.mktemp(name)
            src = make_tiny(name, folder / "src")
            bound = ErrorBound(0.9, "rate")
            compress(open_checkpoint(src), folder / "dst", bound=bound, others=others)
            stores[key] = folder / "dst"
        return stores[key]

    return make


def logits(store: Path, **options: Any) -> torch.Tensor:
    with load(store, **{"dtype": "float32", "linears": "codes"} | options) as offloaded:
        with torch.no_grad():
            found: torch.Tensor = offloaded.model(IDS).logits
        return found


def layers(model: Any) -> dict[str, CodeLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CodeLinear)}


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_the_certified_weights(name: str, made: Make) -> None:
    store = made(name)
    values = logits(store, linears="values")
    with load(store, linears="values", dtype="bfloat16") as offloaded:
        expected, counted = offloaded.model.state_dict(), offloaded.model.num_parameters()
        assert offloaded.choice.linears.keys() == {"values"}
        n_layers, n_bytes = offloaded.choice.linears["values"], offloaded.choice.other_bytes
    certified = dict(decoded_weights(open_store(store)))
    for of in HELD:
        assert (logits(store, linears=of) - values).abs().max() <= 1e-5
        with load(store, linears=of, dtype="bfloat16") as offloaded:
            model, choice = offloaded.model, offloaded.choice
            found = model.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(weights, expected[key]) for key, weights in found.items())
            assert model.num_parameters() == counted
            held = layers(model)
            by_attention = latent_attention(model)  # which reads weights itself
            assert len(held) + len(by_attention) == n_layers == sum(choice.linears.values())
            assert bool(by_attention) == (name == "deepseek_v3")
            for layer in held.values():
                assert torch.equal(layer.decoded(), certified[layer.source])
            # What they take is counted, and less than a half of the weights less what is none.
            saved = sum(2 * layer.n_weights - layer.n_bytes for layer in held.values())
            assert choice.other_bytes == other_bytes(model) == n_bytes - saved
            assert of != "codes4" or "codes4" in choice.linears
            assert {why for why in choice.not_code_linears if "sixteen" not in why} == {
                "values: no linear layer's weight, or another's or attention's too"  # embeddings
            }


@pytest.mark.parametrize("of", HELD)
def test_nothing_else_shows_in_logits(of: codes.SlotsName, made: Make) -> None:
    store = made("mixtral")
    with load(store, linears=of, dtype="float32", slots="codes") as offloaded, torch.no_grad():
        expected = offloaded.model(IDS).logits
        for isa in ISAS:
            with using(isa):
                assert torch.equal(offloaded.model(IDS).logits, expected), isa
        torch.set_num_threads(3)
        assert torch.equal(offloaded.model(IDS).logits, expected)
        for layer in layers(offloaded.model).values():
            x = torch.randn(2, 4, layer.in_features)
            alone = [layer(row[None, None]) for row in x.view(8, -1)]
            assert torch.equal(torch.cat(alone).view(2, 4, -1), layer(x))
    for tier, threads in (("disk", 2), ("ram", 1)):
        some = {"ram_budget": "60%", "tier": tier, "threads": threads}
        assert torch.equal(logits(store, linears=of, slots="codes", **some), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_in_company(dtype: str, made: Make) -> None:
    with load(made("deepseek_v3"), linears="codes4", dtype=dtype) as offloaded:
        model = offloaded.model
        with joining(model, one=False):
            apart = [read(model, [text])[0] for text in ([3, 9, 4, 5], [11, 2, 6, 3], [8, 8, 1, 4])]
            together = read(model, [client.ids for client in apart])
        assert same(apart, together)
        with joining(model, one=True) as one:
            assert same(read(model, [client.ids for client in apart]), apart)
            assert one is not None
            assert one.usable


@pytest.mark.parametrize("of", HELD)
def test_many_rows_are_torchs_product(
    of: codes.SlotsName, made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "HAS_BFLOAT16", True)
    monkeypatch.setattr(code_linear, "BLOCK_WEIGHTS", 320)
    blocks = list[int]()

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert len(x) >= few_rows.MANY_ROWS
        blocks.append(weight.numel())
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(code_linear, "linear", spy)
    with load(made("qwen2_moe"), linears=of, dtype="bfloat16") as offloaded, torch.no_grad():
        layer = layers(offloaded.model)["model.layers.0.self_attn.q_proj"]
        assert layer.bias is not None
        x = torch.randn(2, 12, layer.in_features, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(x, layer.decoded()) + layer.bias
        assert torch.allclose(layer(x).float(), expected.float(), atol=1e-2)
        assert len(blocks) > 1
        assert max(blocks) <= 320
        blocks.clear()
        assert torch.allclose(layer(x[:1]).float(), expected[:1].float(), atol=1e-2)
        assert layer(x[:, :0]).shape == (2, 0, layer.out_features)
        assert not blocks


def test_gradients(made: Make) -> None:
    found = []
    for of in codes.SLOTS:
        with load(made("qwen2_moe"), linears=of, dtype="float32") as offloaded:
            model = offloaded.model
            model(IDS).logits.square().sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            held = {f"{name}.weight" for name in layers(model)}
            assert not held & found[-1].keys()
    for own in found[1:]:
        assert own.keys() == found[0].keys() - held
        assert any("q_proj.bias" in name for name in own)
        for name, gradient in own.items():
            off = (gradient - found[0][name]).norm() / gradient.norm().clamp_min(1e-12)
            assert off < 1e-4, name


def test_what_cannot_be_codes(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def whys(store: Path, of: codes.SlotsName = "codes4") -> tuple[dict[Any, int], str]:
        with load(store, linears=of) as offloaded:
            choice = offloaded.choice
            return {**choice.linears}, "; ".join(choice.not_code_linears)

    wide, why = whys(made("mixtral", 0.002))
    assert wide.keys() == {"values"}
    assert "a byte has 256" in why
    kinds, why = whys(made("mixtral", 0.1))
    assert kinds.keys() == {"codes"}
    assert "none of the sixteen of four bits" in why
    with monkeypatch.context() as patched:
        patched.setitem(SMALL, "tie_word_embeddings", True)
        store = made("mixtral", tied=True)
    assert sum(whys(store)[0].values()) == 9
    assert whys(store)[0]["values"] == 1  # the head is the embedding
    monkeypatch.setattr(codes, "MOST_PATCHED", -1)
    assert whys(made("mixtral")) == ({"values": 9}, "values: too many patches")
    monkeypatch.undo()
    assert whys(made("mixtral", 0.9)) == ({}, "values: fewer than 65536 weights")


@pytest.mark.parametrize(
    ("others", "message"),
    [(None, "no store"), ("lossless", "without loss"), ("keep", "without loss")],
)
def test_sources_without_codes(others: Any, message: str, made: Make) -> None:
    source = made("mixtral").parent / "src" if others is None else made("mixtral", others)
    with pytest.raises(CacheError, match=f"linears='codes'.*{message}.*--others 0.1"):
        load(source, linears="codes")
    with pytest.raises(CacheError, match="linears 'auto': expected values, codes, codes4"):
        load(source, linears="auto")  # type: ignore[arg-type]


def test_what_needs_the_weight(made: Make, tmp_path: Path) -> None:
    with load(made("mixtral"), linears="codes", dtype="bfloat16") as offloaded:
        model = offloaded.model
        head = model.lm_head
        whole = {f"lm_head.{name}": weights for name, weights in head.state_dict().items()}
        acts: list[tuple[Callable[[], Any], str]] = [
            (lambda: torch.nn.functional.linear(torch.ones(1, 32), head.weight), "linear: .*codes"),
            (lambda: torch.ones(32) * head.weight, "mul.* has codes in place of its weight"),
            (lambda: head.weight.data, r"lm_head\.weight: \.data: "),
            (lambda: copy.deepcopy(head), "deepcopy: lm_head.weight"),
            (lambda: pickle.dumps(head), "pickle: lm_head.weight"),
            (lambda: head.to("meta"), "stays on the CPU"),
            (lambda: model.load_state_dict(whole, strict=False), "load_state_dict: lm_head.weight"),
            (lambda: model.save_pretrained(tmp_path / "out"), "save_pretrained"),
            (lambda: torch.func.vmap(head)(torch.ones(1, 32)), "torch.func"),
        ]
        for act, message in acts:
            with pytest.raises(CacheError, match=message):
                act()
        assert not (tmp_path / "out").exists()
        assert head.weight.size() == head.weight.shape == (96, 32)
        assert head.weight.size(-1) * 96 == head.weight.numel() == 32 * 96
        assert (head.weight.dtype, head.weight.dim()) == (torch.bfloat16, 2)
        with torch.no_grad():
            before = model(IDS).logits
            model.float()
            assert model(IDS).logits.dtype == head.decoded().dtype == torch.float32
            assert torch.allclose(model(IDS).logits, before.float(), atol=0.01)
        with pytest.raises(ValueError, match="rows of 5 values"):
            head(torch.ones(1, 5))


def test_damage_is_found_at_load(made: Make, tmp_path: Path) -> None:
    compress(open_checkpoint(made("mixtral").parent / "src"), tmp_path / "s",
             bound=ErrorBound(0.9, "rate"), others=0.9)  # fmt: skip
    tensor = open_store(tmp_path / "s").coded["lm_head.weight"].tensor
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.offset + tensor.n_bytes - 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptionError, match=r"lm_head\.weight"):
        load(tmp_path / "s", linears="codes")


def test_another_shape_is_an_error(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    init = CodeLinear.__init__

    def taller(self: CodeLinear, of: Any, source: str) -> None:
        init(self, of, source)
        self.out_features += source.startswith("lm_head")

    monkeypatch.setattr(CodeLinear, "__init__", taller)
    with pytest.raises(CheckpointError, match=r"lm_head.*\(96, 32\), the model expects \(97, 32\)"):
        load(made("mixtral"), linears="codes")


def test_they_are_timed_as_they_are(made: Make) -> None:
    with load(made("mixtral"), linears="codes") as offloaded:
        model = offloaded.model
        held = layers(model).values()
        assert set(held) <= set(linear_layers(model))
        n_bytes = sum(layer.n_bytes for layer in held)
        assert bytes_in_codes(model) == n_bytes
        left = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        assert read_weights(model) == left
    between = Between([], torch.device("cpu"), torch.bfloat16, all_bytes=1)
    between._layers = [*held, nn.Linear(32, 40, bias=False)]
    times = [3.0 * layer.n_bytes for layer in held] + [5.0 * 4 * 32 * 40]
    assert between.a_byte(times, codes=True) == pytest.approx(3)
    assert between.a_byte(times, codes=False) == pytest.approx(5)
    between._layers = between._layers[:-1]
    assert between.a_byte(times[:-1], codes=False) == pytest.approx(3)  # there are no others
