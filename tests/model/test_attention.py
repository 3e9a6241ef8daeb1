"""Attention of one token a text: the kernel against a reference in float64, and what is torch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from codec.kernel import ISAS, using
from moebound import _native
from moebound.model import attention as module_of_attention
from moebound.model import few_rows
from moebound.model.attention import (
    NAME,
    Latents,
    OfTexts,
    _is_latent,
    _unexpanded,
    attention,
    fuse_attention,
    padded_attention,
    register_attention,
)
from moebound.text.growing_cache import GrowingCache
from tiny_models import tiny_model

LENGTHS = [1, 300, 19]
WIDE: Any = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
}

vectors = pytest.mark.skipif(_native.isa() == "scalar", reason="no vector instructions")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Module(torch.nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy()


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """query: [heads, D], key: [shared, T, D], value: [shared, T, V]; [heads, V] in float64."""
    each = len(query) // len(key)
    found = []
    for head, q in enumerate(query.double()):
        scores = scale * (key[head // each].double() @ q)
        found.append(torch.softmax(scores, 0) @ value[head // each].double())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("heads", "shared", "keys", "values"),
    [(2, 2, 64, 64), (6, 2, 128, 128), (3, 3, 192, 128), (20, 1, 256, 32)],
)
def test_texts_together_and_alone(heads: int, shared: int, keys: int, values: int) -> None:
    query = 3 * drawn(len(LENGTHS), heads, keys)
    of = [
        (drawn(shared, n + 2, keys, seed=n)[:, :n], drawn(shared, n, values, seed=n + 1))
        for n in LENGTHS
    ]

    def run(isa: str, threads: int, which: list[int]) -> torch.Tensor:
        out = torch.empty(len(which) * heads * values)
        with using(isa):
            _native.attend(
                bits(query[which]), [bits(of[i][0]) for i in which],
                [bits(of[i][1]) for i in which], out.numpy(), keys**-0.5, threads,
            )  # fmt: skip
        return out.view(-1, heads, values)

    whole = run(ISAS[0], 1, [0, 1, 2])
    expected = torch.stack(
        [reference(q, *some, keys**-0.5) for q, some in zip(query, of, strict=True)]
    )
    assert (whole - expected).abs().max() < 2e-6
    assert torch.equal(whole[0].bfloat16(), of[0][1][:, 0].repeat_interleave(heads // shared, 0))
    for isa in ISAS:
        assert torch.equal(run(isa, 3, [2, 0, 1]), whole[[2, 0, 1]])
        assert torch.equal(run(isa, 2, [1]), whole[[1]])


def test_latents_together_and_alone() -> None:
    heads, rank, turn, nope, values = 9, 96, 32, 64, 40
    query, weights = 2 * drawn(3, heads, nope + turn), drawn(heads * (nope + values), rank) / 8
    of = [(drawn(n, rank, seed=n), drawn(n, turn, seed=n + 1)) for n in LENGTHS]
    scale = 0.07

    def run(isa: str, threads: int, which: list[int]) -> torch.Tensor:
        out = torch.empty(len(which) * heads * values)
        with using(isa):
            _native.attend_latent(
                bits(query[which]), [bits(of[i][0]) for i in which],
                [bits(of[i][1]) for i in which], bits(weights), out.numpy(), scale, threads,
            )  # fmt: skip
        return out.view(-1, heads, values)

    whole = run(ISAS[0], 1, [0, 1, 2])
    for i, (latents, turned) in enumerate(of):
        made = (latents.double() @ weights.double().t()).view(-1, heads, nope + values)
        key = torch.cat([made[..., :nope], turned.double()[:, None].expand(-1, heads, -1)], -1)
        expected = reference(query[i], key.transpose(0, 1), made[..., nope:].transpose(0, 1), scale)
        assert (whole[i] - expected).abs().max() < 3e-6 * expected.abs().max()
    for isa in ISAS:
        assert torch.equal(run(isa, 3, [2, 0, 1]), whole[[2, 0, 1]])
        assert torch.equal(run(isa, 2, [1]), whole[[1]])


def test_long_texts_are_in_pieces() -> None:
    n, width = 64 * 256 + 5, 32
    query, key, value = 4 * drawn(1, 1, width), drawn(1, n, width), drawn(1, n, width, seed=1)
    out = torch.empty(width)
    _native.attend(bits(query), [bits(key)], [bits(value)], out.numpy(), 0.2, 2)
    assert (out - reference(query[0], key, value, 0.2)[0]).abs().max() < 2e-6


def test_nan_comes_out() -> None:
    query, key, value = drawn(1, 2, 64), drawn(1, 40, 64), drawn(1, 40, 64)
    key[0, 17, 3] = torch.nan
    out = torch.zeros(2 * 64, dtype=torch.bfloat16)
    _native.attend(bits(query), [bits(key)], [bits(value)], bits(out), 0.1, 1)
    assert out.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, out = drawn(2, 4, 64), drawn(2, 9, 64), drawn(2, 9, 32), torch.empty(256)
    good: dict[str, Any] = {
        "queries": bits(query), "keys": [bits(key)] * 2, "values": [bits(value)] * 2,
        "out": out.numpy(), "scale": 1.0, "threads": 1,
    }  # fmt: skip
    _native.attend(**good)
    for name, other in {
        "queries": [bits(query)[:1], bits(query)[:, :3], bits(query)[..., ::2], bits(query)[:, :0],
                    bits(drawn(2, 4, 32)), bits(drawn(2, 4, 48)), bits(query)[:0]],
        "keys": [[], [bits(key)], [bits(key)[:, :0]] * 2, [bits(key), bits(drawn(1, 9, 64))],
                 [bits(key), bits(drawn(2, 8, 64))], [bits(drawn(2, 64, 9).mT)] * 2],
        "values": [[bits(value)], [bits(value), bits(drawn(2, 9, 64))], [bits(value)[..., :0]] * 2],
        "out": [out.numpy()[:-1], out.half().numpy()],
    }.items():  # fmt: skip
        for bad in other:
            with pytest.raises(ValueError, match=r"\w+"):
                _native.attend(**good | {name: bad})
    for name, wrong in {"keys": [query.float().numpy()] * 2, "out": out.double().numpy()}.items():
        with pytest.raises(TypeError):
            _native.attend(**good | {name: wrong})
    weights = drawn(4 * 64, 32)
    latent: dict[str, Any] = {
        "queries": bits(query), "latents": [bits(drawn(9, 32))] * 2, "out": out.numpy(),
        "turned": [bits(drawn(9, 32))] * 2, "weights": bits(weights), "scale": 1.0, "threads": 1,
    }  # fmt: skip
    _native.attend_latent(**latent)
    for name, other in {
        "queries": [bits(query)[:1], bits(query)[:, :3], bits(query)[..., :32]],
        "latents": [[], [bits(drawn(9, 64))] * 2, [bits(drawn(8, 32))] * 2],
        "turned": [[bits(drawn(9, 32))], [bits(drawn(9, 64))] * 2],
        "weights": [bits(weights)[:-1], bits(weights)[:128], bits(weights)[:, :16],
                    bits(weights.t())],
        "out": [out.numpy()[:-1]],
    }.items():  # fmt: skip
        for bad in other:
            with pytest.raises(ValueError, match=r"\w+"):
                _native.attend_latent(**latent | {name: bad})


@vectors
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_as_torch_has_it(batch: int) -> None:
    query, key, value = drawn(batch, 6, 1, 192), drawn(batch, 2, 40, 192), drawn(batch, 2, 40, 128)
    found, _ = attention(Module(3), query, key, value, None, scaling=0.1)
    expected, _ = sdpa_attention_forward(Module(3), query, key, value, None, scaling=0.1)
    assert found.shape == expected.shape == (batch, 1, 6, 128)
    assert (found.float() - expected.float()).abs().max() <= 2**-8
    exact = torch.stack(
        [reference(*of, 0.1) for of in zip(query[:, :, 0], key, value, strict=True)]
    )
    assert (found[:, 0] - exact).abs().max() <= (expected[:, 0] - exact).abs().max()


@vectors
def test_the_rest_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel")

    monkeypatch.setattr(_native, "attend", refuse)
    module, query, key, value = (
        Module(2),
        drawn(1, 4, 1, 64),
        drawn(1, 2, 9, 64),
        drawn(1, 2, 9, 64),
    )
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bfloat16)
    run = partial(attention, module, query, key, value, None)
    with pytest.raises(AssertionError):
        run(position_ids=mask, use_cache=True, sliding_window=None, softcap=None, dropout=0.0)
    narrow = query[..., :32], key[..., :32], value[..., :32]
    several = query.expand(1, 4, 3, 64)
    floats = query.float(), key.float(), value.float()
    for given in (
        (query, key, value, mask), (*narrow, None), (*floats, None), (several, key, value, None),
        (query.requires_grad_(), key, value, None),
    ):  # fmt: skip
        expected, _ = sdpa_attention_forward(module, *given)
        assert torch.equal(attention(module, *given)[0], expected)
    query.requires_grad_(False)
    learned = query, key.expand(3, 2, 9, 64), value.expand(3, 2, 9, 64)  # one for a batch
    expected, _ = sdpa_attention_forward(module, *learned, None)
    assert torch.equal(attention(module, *learned, None)[0], expected)
    for more in ({"sliding_window": 4}, {"s_aux": mask}, {"dropout": 0.1}, {"cache": mask}):
        torch.manual_seed(0)
        expected, _ = sdpa_attention_forward(module, query, key, value, None, **more)
        torch.manual_seed(0)
        assert torch.equal(run(**more)[0], expected)
    with pytest.raises(ValueError, match="softcap"):
        run(softcap=3.0)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_values_narrower_than_keys_are_padded(n_tokens: int, heads: int) -> None:
    query, key = drawn(1, 4, n_tokens, 72).float(), drawn(1, heads, 5, 72).float()
    value = drawn(1, heads, 5, 16).float()
    expected, _ = sdpa_attention_forward(Module(4 // heads), query, key, value, None, scaling=0.2)
    found = padded_attention(Module(4 // heads), query, key, value, None, scaling=0.2)
    assert found.shape == expected.shape == (1, n_tokens, 4, 16)
    assert (found - expected).abs().max() <= 1e-5


@vectors
@pytest.mark.parametrize("width", [32, 64])
def test_rows_of_texts_as_alone(width: int) -> None:
    query = drawn(1, 4, 3, width)
    keys = [drawn(1, 2, n, width, seed=n) for n in LENGTHS]
    values = [drawn(1, 2, n, width, seed=n + 1) for n in LENGTHS]
    found, _ = attention(Module(2), query, OfTexts(keys), OfTexts(values), None)
    assert found.shape == (1, 3, 4, width)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        alone, _ = attention(Module(2), query[:, :, i : i + 1], key, value, None)
        assert torch.equal(found[:, i : i + 1], alone)


@pytest.mark.parametrize(
    ("name", "ours"), [("deepseek_v3", True), ("mixtral", True), ("deepseek_v32", False)]
)
def test_sparse_attention_stays_stocks(name: str, ours: bool) -> None:
    """Its code makes its mask for attention of known names alone."""
    model = tiny_model(name)
    assert fuse_attention(model) is ours
    assert (model.config._attn_implementation == NAME) is ours


@pytest.mark.parametrize(
    ("name", "latent"),
    [
        ("deepseek_v2", 2), ("deepseek_v3", 3), ("glm4_moe_lite", 2), ("deepseek_v32", 0),
        ("mixtral", 0),
    ],
)  # fmt: skip
def test_latent_attention_is_known_by_its_code(name: str, latent: int) -> None:
    with torch.device("meta"):
        assert sum(_is_latent(module) for module in tiny_model(name).modules()) == latent


class Read:
    """One layer of latent attention reads a text: all at once, or a token at a time."""

    def __init__(self, dtype: torch.dtype, *, ours: bool) -> None:
        config = DeepseekV3Config(
            hidden_size=128, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None,
            num_hidden_layers=1, **WIDE,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        self.layer: Any = DeepseekV3Attention(config, 0).requires_grad_(False)
        for parameter in self.layer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.08)
        self.layer.bfloat16().to(dtype)
        self.turn = DeepseekV3RotaryEmbedding(config)
        if ours:
            register_attention()
            config._attn_implementation = NAME
            self.layer.expand_kv = partial(_unexpanded, self.layer)  # type: ignore[method-assign]
        self.config, self.dtype = config, dtype

    def __call__(
        self, x: torch.Tensor, pieces: list[int], *, growing: bool = False
    ) -> torch.Tensor:
        cache = GrowingCache(self.config).cache if growing else DynamicCache(config=self.config)
        found, start = [], 0
        for n in pieces:
            positions = torch.arange(start, start + n)[None]
            some, start = x[:, start : start + n].to(self.dtype), start + n
            mask = (
                None
                if n == 1 or start == n
                else torch.ones(n, start, dtype=torch.bool).tril(start - n)
            )
            found.append(
                self.layer(some, self.turn(some, positions), mask, past_key_values=cache)[0]
            )
        return torch.cat(found, 1)


@vectors
def test_latent_attention_against_the_stock_module() -> None:
    x = 2 * drawn(1, 12, 128)
    pieces = [5, 1, 1, 3, 1, 1]
    exact = Read(torch.float64, ours=False)(x, [12])
    stock = Read(torch.bfloat16, ours=False)(x, pieces).double()
    ours = Read(torch.bfloat16, ours=True)
    found = ours(x, pieces).double()
    assert torch.equal(found, ours(x, pieces, growing=True).double())
    far, stock_far = ((some - exact).square().mean().sqrt() for some in (found, stock))
    assert far <= 1.02 * stock_far <= 0.02 * exact.square().mean().sqrt()
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):  # expanded as ever
        assert (Read(dtype, ours=True)(x, pieces).double() - exact).abs().max() <= most


@vectors
def test_latents_of_texts_as_alone_and_expanded_where_the_layer_is_watched() -> None:
    read = Read(torch.bfloat16, ours=True)
    layer = read.layer
    query = drawn(1, 4, 3, 192)
    of = [(drawn(1, 1, n, 512, seed=n), drawn(1, 1, n, 64, seed=n + 1)) for n in LENGTHS]
    texts = Latents(layer, OfTexts([kv for kv, _ in of]), OfTexts([turned for _, turned in of]))
    run = partial(attention, layer, attention_mask=None, scaling=layer.scaling)
    together = run(query, texts, None)[0]
    expanded, by_torch = list[torch.Tensor](), list[torch.Tensor]()
    for i, some in enumerate(of):
        latents, nothing = layer.expand_kv(*some)
        assert isinstance(latents, Latents)
        assert nothing is None
        alone = run(query[:, :, i : i + 1], latents, None)[0]
        assert torch.equal(together[:, i : i + 1], alone)
        keys, values = DeepseekV3Attention.expand_kv(layer, *some)
        row = query[:, :, i : i + 1]
        expanded.append(run(row, keys, values)[0])
        by_torch.append(padded_attention(layer, row, keys, values, None, scaling=layer.scaling))
    wanted = torch.cat(expanded, 1)
    assert not torch.equal(together, wanted)
    heard = list[int]()
    hook = layer.kv_b_proj.register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(run(query, texts, None)[0], wanted)
    assert len(heard) == 3
    hook.remove()
    layer.kv_b_proj.weight.requires_grad_()
    assert torch.equal(run(query, texts, None)[0], torch.cat(by_torch, 1))
    with torch.no_grad():
        assert torch.equal(run(query, texts, None)[0], together)


def test_a_model_that_is_set_to_another_attention_has_stocks_keys() -> None:
    layer = Read(torch.bfloat16, ours=True).layer
    layer.config._attn_implementation = "eager"
    keys, values = layer.expand_kv(drawn(1, 1, 3, 512), drawn(1, 1, 3, 64))
    assert keys.shape == (1, 4, 3, 192)
    assert values.shape == (1, 4, 3, 128)


@vectors
def test_gradients_are_torchs() -> None:
    module = Module(1)
    query = drawn(1, 2, 1, 64).requires_grad_()
    key, value = drawn(1, 2, 5, 64), drawn(1, 2, 5, 64)
    output: Any = attention(module, query, key, value, None)[0].float()
    output.square().sum().backward()
    assert query.grad is not None
    assert query.grad.abs().max() > 0
    assert module_of_attention.LEAST_WIDTH == 64
