"""A store's router edits against plain models that were edited by hand, for every kind of routing.

Experts are really removed there: rows of the router, slices of the experts, entries of the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moebound
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MoeboundError, StoreError
from moebound.methods import Encoding, GroupView, MatrixSpec, Payload, RouterEdit
from moebound.methods.blob import RouterBlob, parse_router
from moebound.model.live import live_experts
from moebound.model.routers import router_of
from moebound.offload.costs import sample
from moebound.offload.entries import open_entries
from moebound.store import compress, decompress, open_store, verify
from moebound.types import Array, ExpertKey
from tiny_models import model_class, tiny_config

from .made import Plain, known

IDS = torch.arange(5, 45).view(2, 20)

GROUPED = {"n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_key_value_heads": 4}
EIGHT = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, renormalised": ("mixtral", EIGHT),
    "softmax, as it is": ("qwen2_moe", EIGHT),
    "softmax of the chosen, with a bias": ("gpt_oss", EIGHT),
    "sigmoid, with a correction": ("deepseek_v3", {**EIGHT, "num_key_value_heads": 4}),
    "sigmoid, groups, a correction": ("deepseek_v3", GROUPED),
    "sigmoid, groups, a correction, GLM": ("glm4_moe", {**GROUPED, "num_key_value_heads": 2}),
    "softmax, groups": ("deepseek_v2", {**GROUPED, "topk_method": "group_limited_greedy"}),
    "sigmoid, groups masked by 0": ("axk2", GROUPED),
}


class Edited(Plain):
    """Weights as they are, and the edit of the test; what it leaves out has no bytes."""

    id: ClassVar[str] = "edited"
    scope = "layer"
    lossless: ClassVar[bool] = False
    edits_router: ClassVar[bool] = True
    asked: ClassVar[Callable[[int], RouterEdit]]

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        found = super().encode(group, threads=threads)
        edit = type(self).asked(group.layer)
        gone = {*edit.alias, *edit.constants}
        keys = [e.key for e in group.experts]
        gone |= set() if edit.keep is None else {k.expert for k in keys} - set(edit.keep)
        matrices = {
            key: {r: Payload(b"") for r in roles} if key.expert in gone else roles
            for key, roles in found.matrices.items()
        }
        return Encoding(matrices, router=edit)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Any) -> Array:
        return super().decode(payload, spec, shared)


@pytest.fixture(autouse=True)
def _edited() -> Iterator[None]:
    with known(Edited):
        yield


def source(kind: str, folder: Path, *, less: float = 0.0) -> Path:
    """A checkpoint whose router really chooses: its weights and biases are large. less: taken off
    every correction of a score."""
    name, fields = KINDS[kind]
    config = tiny_config(name)
    for field, value in fields.items():
        if hasattr(config, field):
            setattr(config, field, value)
    torch.manual_seed(1)
    model: Any = model_class(config)._from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for entry in live_experts(model).stacks:
            router = router_of(model, entry.stack.name)
            assert router is not None
            for tensor in (*router.parameters(), *router.buffers()):
                tensor.copy_(0.3 * torch.randn(tensor.shape) - (less if tensor.dim() == 1 else 0))
            for parameter in entry.module.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def stored(src: Path, dst: Path, edit: Callable[[int], RouterEdit]) -> Path:
    Edited.asked = edit
    compress(src, dst, method="edited")
    report = verify(dst, against=src)
    assert report.ok, report.problems
    assert report.guarantee == "none"
    return dst


def removed(model: Any, keep: list[int]) -> Any:
    """The same model with these experts and no others."""
    for entry in live_experts(model).stacks:
        router, n = router_of(model, entry.stack.name), entry.stack.n_experts
        assert router is not None
        for owner in (router, entry.module):
            for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
                if len(tensor) == n:
                    cut = tensor.detach()[keep].clone()
                    parameter = isinstance(tensor, nn.Parameter)
                    setattr(owner, name, nn.Parameter(cut) if parameter else cut)
            for name in ("num_experts", "n_routed_experts"):
                if hasattr(owner, name):
                    setattr(owner, name, len(keep))
    model.config.n_routed_experts = len(keep)
    return model


def kept_of(kind: str) -> list[int]:
    return [0, 2, 4, 5, 7, 8, 9, 10] if "groups" in kind else [1, 2, 5, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_experts_are_a_model_without_the_others(kind: str, tmp_path: Path) -> None:
    src, keep = source(kind, tmp_path / "src"), kept_of(kind)
    dst = stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, keep=tuple(keep)))
    want = logits(removed(loaded(src), keep))
    assert not torch.allclose(want, logits(loaded(src)), atol=1e-3)  # it makes a difference
    # Not to the bit: the router may give its choices in another order, and sums them up.
    assert torch.allclose(logits(loaded(dst)), want, atol=1e-6)
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)
        there = {key.expert for key in offloaded.cache.catalog.keys if key in offloaded.cache}
        assert there <= set(keep)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alias_is_the_other_expert(kind: str, tmp_path: Path) -> None:
    """Nothing is stored for it; loaded when needed, it is bit for bit the decompressed model."""
    src = source(kind, tmp_path / "src")
    dst = stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, alias={1: 4, 6: 4, 0: 2}))
    store, model = open_store(dst), loaded(src)
    layer = next(iter(store.router_edits()))
    assert store.expert(ExpertKey(layer, 1)).n_bytes < 200
    with torch.no_grad():
        for entry in live_experts(model).stacks:
            for parameter in entry.module.parameters():
                parameter[[1, 6]] = parameter[4].clone()
                parameter[0] = parameter[2]
    want, found = logits(model), loaded(dst)
    assert torch.allclose(logits(found), want, atol=1e-6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    biased = KINDS[kind][0] == "gpt_oss"  # its biases are tensors of all experts
    if biased:
        with pytest.raises(StoreError, match="biases"):
            decompress(dst, tmp_path / "plain")
        model.save_pretrained(tmp_path / "plain")
    else:
        decompress(dst, tmp_path / "plain")
    with (
        torch.inference_mode(),
        moebound.load(dst, dtype="float32") as offloaded,
        moebound.load(tmp_path / "plain", dtype="float32") as plain,
    ):
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)
        both = (live_experts(owner.model).stacks for owner in (offloaded, plain))
        for ours, theirs in zip(*both, strict=True):
            for n_tokens in (1, 1, 16):
                x, gates = torch.randn(n_tokens, 32), torch.rand(n_tokens, 2)
                some = torch.stack([torch.randperm(8)[:2] for _ in range(n_tokens)])
                given = x, some, gates
                assert torch.equal(ours.module(*given), theirs.module(*given))
        there = {key.expert for key in offloaded.cache.catalog.keys if key in offloaded.cache}
        assert not there & {0, 1, 6}


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][0] != "gpt_oss"])
def test_a_constant_is_put_out_whatever_goes_in(kind: str, tmp_path: Path) -> None:
    src = source(kind, tmp_path / "src")
    vector = torch.linspace(-1, 1, 32)
    constants = {1: vector.numpy(), 5: -2 * vector.numpy()}
    dst = stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, constants=constants))
    model = loaded(src)

    def added(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        _, index, weights = args
        for expert, values in constants.items():
            gate = torch.where(index == expert, weights, 0).sum(-1, keepdim=True)
            output = output + gate * torch.from_numpy(values)
        return output

    with torch.no_grad():
        for entry in live_experts(model).stacks:
            for name in ("down_proj",):
                getattr(entry.module, name)[[1, 5]] = 0
            entry.module.register_forward_hook(added)
    want = logits(model)
    assert torch.allclose(logits(loaded(dst)), want, atol=1e-5)
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)


def chosen_by(model: Any) -> dict[int, set[int]]:
    """By layer: the experts that IDS are sent to."""
    found: dict[int, set[int]] = {}
    for layer, module in live_experts(model).modules.items():
        found[layer] = set()
        module.register_forward_pre_hook(
            lambda _, args, layer=layer: found[layer].update(args[1].flatten().tolist())
        )
    logits(model)
    return found


def test_no_mask_of_groups_brings_an_expert_back(tmp_path: Path) -> None:
    """Where all scores are below the 0 that masked groups get, any of these would be chosen."""
    src, keep = (
        source("sigmoid, groups masked by 0", tmp_path / "src", less=2.0),
        {0, 1, 3, 4, 6, 9},
    )
    dst = stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, keep=tuple(sorted(keep))))
    assert all(chosen <= keep for chosen in chosen_by(loaded(dst)).values())


def test_a_layer_of_its_own_edit(tmp_path: Path) -> None:
    """Each layer has its own, and one may have none."""
    src = source("softmax, renormalised", tmp_path / "src")
    dst = stored(
        src, tmp_path / "dst", lambda layer: RouterEdit(layer, keep=(0, 3, 5) if layer else None)
    )
    assert list(open_store(dst).router_edits()) == [1]
    chosen = chosen_by(loaded(dst))
    assert chosen[1] <= {0, 3, 5}
    assert len(chosen[0]) > 3


def test_what_is_never_loaded_is_not_measured(tmp_path: Path) -> None:
    """Its frames are no example of how long an expert takes to read and decode."""
    src = source("softmax, renormalised", tmp_path / "src")
    vector = torch.ones(32).numpy()
    dst = stored(
        src, tmp_path / "dst",
        lambda layer: RouterEdit(layer, (0, 2, 3, 5), {2: 0}, {5: vector}) if layer
        else RouterEdit(layer),
    )  # fmt: skip
    entries = open_entries(dst)
    found = {0: set[int](), 1: set[int]()}
    for entry in entries.asked_for:
        found[entry.key.layer].add(entry.key.expert)
    assert found == {0: set(range(8)), 1: {0, 3}}
    assert {entry.key for entry in sample(entries)} <= {e.key for e in entries.asked_for}


def test_an_alias_of_an_expert_of_another_size_is_refused(tmp_path: Path) -> None:
    src = source("softmax, renormalised", tmp_path / "src")
    with pytest.raises(MoeboundError, match="expert 99, which stands for it"):
        stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, alias={1: 99}))


def test_an_edit_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    """One that leads to no expert, or to another than was certified; both with right checksums."""
    src = source("softmax, renormalised", tmp_path / "src")
    dst = stored(src, tmp_path / "dst", lambda layer: RouterEdit(layer, alias={1: 4}))
    tensor, _ = open_store(dst).routers[0]
    whole = tensor.file.read_bytes()
    own = whole[tensor.offset : tensor.offset + tensor.n_bytes]
    for other, message in ((b'"1":9', "has no such matrix"), (b'"1":5', "router.0")):
        blob = parse_router(own)
        forged = bytes(blob.payload).replace(b'"1":4', other)
        data = RouterBlob(blob.method, 1, blob.group, memoryview(forged)).build()
        assert len(data) == len(own)
        tensor.file.write_bytes(whole.replace(own, data))
        for use in (open_store, loaded, moebound.load):
            with pytest.raises(MoeboundError, match=message):
                use(dst)
        assert not verify(dst).ok
    tensor.file.write_bytes(whole)
    assert verify(dst).ok


def test_groups_of_routers() -> None:
    for kind, (name, fields) in KINDS.items():
        config = {**tiny_config(name).to_dict(), **fields}
        assert router_groups_of(config) == ((4, 2) if "groups" in kind else (1, 1)), kind
