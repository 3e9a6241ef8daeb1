"""Methods through a store and every loader: shared parts, router edits, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import moebound
from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError, MethodError, MoeboundError, StoreError
from moebound.integrations.transformers.router_edits import apply_router_edits
from moebound.methods import RouterEdit
from moebound.methods.blob import SharedBlob, parse_shared
from moebound.offload.entries import FIRST_SHARED
from moebound.plan import Plan, PlannedExpert
from moebound.store import compress, decompress, open_store, verify
from moebound.types import ErrorBound, ExpertKey
from tiny_models import MakeTiny

from .made import Plain, known

IDS = torch.arange(5, 25).view(2, 10)
Made = Callable[..., tuple[Path, Path]]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def made(tiny: MakeTiny, tmp_path: Path) -> Made:
    """made(name, method) -> (source, store)."""

    def make(name: str, method: str, **options: Any) -> tuple[Path, Path]:
        src = tiny(name)
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)
        compress(open_checkpoint(src), tmp_path / "dst", method=method, **options)
        return src, tmp_path / "dst"

    return make


FAMILIES = ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v4"]


@pytest.mark.parametrize("method", ["rtn:int4:g16", "mean_rest"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_road(name: str, method: str, made: Made, tmp_path: Path) -> None:
    src, dst = made(name, method)
    report = verify(dst, against=open_checkpoint(src))
    assert report.ok, report.problems
    assert (report.guarantee, report.worst) == ("none", None)
    assert report.max_abs_error > 0
    store = open_store(dst)
    assert bool(store.parts) == (method == "mean_rest")
    decompress(dst, tmp_path / "plain")
    plain = loaded(tmp_path / "plain")
    assert verify(dst, against=open_checkpoint(tmp_path / "plain")).ok is False
    for (key, a), b in zip(
        plain.state_dict().items(), loaded(dst).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), logits(plain), atol=1e-5)


def test_shared_parts_are_entries_of_the_cache(made: Made) -> None:
    """In the least memory that works: parts are held while experts are decoded, counted, and gone
    again; the logits are the same."""
    _, dst = made("mixtral", "mean_rest")
    with moebound.load(dst, dtype="float32") as all_of_it:
        want = logits(all_of_it.model)
    with pytest.raises(CacheError, match="the smallest budget is") as caught:
        moebound.load(dst, dtype="float32", ram_budget=1)
    least = int(str(caught.value).split("the smallest budget is ")[1].split()[0])
    store = open_store(dst)
    for tier in ("disk", "ram"):
        room = least if tier == "disk" else least + sum(t.n_bytes for t in store.tensors.values())
        with moebound.load(dst, dtype="float32", ram_budget=room, tier=tier) as offloaded:
            for _ in range(2):
                assert torch.equal(logits(offloaded.model), want)
            keys = [key for key in offloaded.cache.catalog.keys if key.expert >= FIRST_SHARED]
            assert len(keys) == len(store.parts)
            assert offloaded.cache.used_bytes <= offloaded.cache.budget_bytes
            assert offloaded.pool_bytes <= offloaded.cache.budget_bytes
            if tier == "disk":  # not everything fits
                assert not all(key in offloaded.cache for key in offloaded.cache.catalog.keys)
    with moebound.load(dst, dtype="float32", ram_budget=least, predictor="gate") as guessing:
        for token in range(4):
            with torch.inference_mode():
                guessing.model(IDS[:1, token : token + 1])


def rewritten(dst: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The shard with the experts, with other tensors in it; its index follows."""
    shard = sorted(dst.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, shard, metadata)
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file
        for name, file in index["weight_map"].items()
        if file != shard.name or name in tensors
    }
    (dst / "model.safetensors.index.json").write_text(json.dumps(index))


SHARED = "moebound.shared.0."


def test_a_missing_part_is_refused_by_name(made: Made) -> None:
    _, dst = made("mixtral", "mean_rest")
    rewritten(dst, lambda tensors: tensors.pop(SHARED + "1"))
    for use in (open_store, loaded, moebound.load):
        with pytest.raises(MoeboundError, match=r"moebound\.shared\.0\.1"):
            use(dst)


def in_place(dst: Path, name: str) -> tuple[Path, int, int]:
    tensor = open_store(dst).tensors[name]
    return tensor.file, tensor.offset, tensor.n_bytes


def test_parts_that_were_swapped_are_refused_by_name(made: Made) -> None:
    _, dst = made("mixtral", "mean_rest")
    one, other = in_place(dst, SHARED + "0"), in_place(dst, SHARED + "1")
    data = bytearray(one[0].read_bytes())
    assert one[2] == other[2]
    first, second = (slice(at, at + n) for _, at, n in (one, other))
    data[first], data[second] = data[second], data[first]
    one[0].write_bytes(data)
    for use in (open_store, loaded, moebound.load):
        with pytest.raises(MoeboundError, match=r"moebound\.shared\.0\.[01].*part [01] of group 0"):
            use(dst)


def test_a_part_of_another_store_is_refused(made: Made, tmp_path: Path) -> None:
    """The same group and number, whole, and not what was encoded with."""
    _, dst = made("mixtral", "mean_rest")
    file, at, n = in_place(dst, SHARED + "0")
    of_next = open_store(dst).tensors["moebound.shared.1.0"]
    blob = parse_shared(
        of_next.file.read_bytes()[of_next.offset : of_next.offset + of_next.n_bytes]
    )
    forged = SharedBlob(blob.method, 1, 0, 0, blob.held_bytes, blob.payload).build()
    assert len(forged) == n
    data = bytearray(file.read_bytes())
    data[at : at + n] = forged
    file.write_bytes(data)
    with pytest.raises(
        MoeboundError, match=r"moebound\.shared\.0\.0.*not the part that was written"
    ):
        open_store(dst)
    with pytest.raises(
        MoeboundError, match=r"moebound\.shared\.0\.0.*not the part that was written"
    ):
        loaded(dst)


class Breaks(Plain):
    id = "breaks"

    def encode(self, group: Any, *, threads: int = 1) -> Any:
        if group.experts[0].key >= ExpertKey(1, 0):
            raise RuntimeError("no more")
        return super().encode(group)


def test_a_method_that_breaks_leaves_no_store(tiny: MakeTiny, tmp_path: Path) -> None:
    with (
        known(Breaks),
        pytest.raises(
            MethodError, match=r"\.safetensors: tensor '.*': method 'breaks': RuntimeError: no more"
        ),
    ):
        compress(open_checkpoint(tiny("mixtral")), tmp_path / "dst", method="breaks")
    assert not (tmp_path / "dst").exists()


# Router edits


def kept_only(model: Any, n: int) -> Any:
    """The same Mixtral with its first n experts and no others."""
    for block in (layer.mlp for layer in model.model.layers):
        block.gate.weight = nn.Parameter(block.gate.weight[:n])
        block.gate.num_experts = n
        for name in ("gate_up_proj", "down_proj"):
            setattr(block.experts, name, nn.Parameter(getattr(block.experts, name)[:n]))
        block.experts.num_experts = n
    return model


def test_experts_that_are_never_chosen(made: Made) -> None:
    src, dst = made("mixtral", "keep_two")
    want = logits(kept_only(loaded(src), 2))
    assert torch.allclose(logits(loaded(dst)), want, atol=1e-5)
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)
        assert {key.expert for key in offloaded.cache.catalog.keys if key in offloaded.cache} == {
            0,
            1,
        }
    assert verify(dst).ok


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe", "granitemoe"])
def test_no_family_chooses_what_is_dropped(name: str, made: Made) -> None:
    _, dst = made(name, "keep_two")
    model = loaded(dst)
    chosen: set[int] = set()

    def hear(_module: Any, args: Any, kwargs: Any) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        chosen.update(index.flatten().tolist())

    for module in model.modules():
        if hasattr(module, "num_experts") and hasattr(module, "down_proj"):
            module.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        logits(model)
    except RuntimeError:
        assert name == "deepseek_v3"  # tiny as it is, its attention cannot run
        return
    assert chosen == {0, 1}


def test_one_expert_for_two(made: Made, tmp_path: Path) -> None:
    src, dst = made("mixtral", "one_is_zero")
    model = loaded(src)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                stack = getattr(layer.mlp.experts, name)
                stack[1] = stack[0]
    want = logits(model)
    assert torch.allclose(logits(loaded(dst)), want, atol=1e-5)
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)
        one = offloaded.model(IDS[:1, :1]).logits
        assert torch.allclose(one, loaded(dst)(IDS[:1, :1]).logits, atol=1e-5)
        assert ExpertKey(0, 1) not in offloaded.cache
    decompress(dst, tmp_path / "plain")  # an alias is two experts with the same weights
    assert torch.allclose(logits(loaded(tmp_path / "plain")), want, atol=1e-5)


def test_experts_that_put_out_a_constant(made: Made, tmp_path: Path) -> None:
    src, dst = made("mixtral", "constant")
    model = loaded(src)
    edits = open_store(dst).router_edits()

    def constants(layer: int) -> Any:
        def hook(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            _, index, weights = args
            for expert, vector in edits[layer].constants.items():
                gates = torch.where(index == expert, weights, 0).sum(-1, keepdim=True)
                output = output + gates * torch.from_numpy(vector.copy())
            return output

        return hook

    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for expert in (1, 3):
                layer.mlp.experts.down_proj[expert] = 0
            layer.mlp.experts.register_forward_hook(constants(number))
    want = logits(model)
    assert torch.allclose(logits(loaded(dst)), want, atol=1e-5)
    with moebound.load(dst, dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), want, atol=1e-5)
        resident = {k.expert for k in offloaded.cache.catalog.keys if k in offloaded.cache}
        assert resident == {0, 2}
    with pytest.raises(StoreError, match="no ordinary checkpoint can say"):
        decompress(dst, tmp_path / "plain")
    with pytest.raises(StoreError, match="no ordinary checkpoint can say"):
        loaded(dst).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    card = (dst / "README.md").read_text()
    assert "without a guarantee" in card


def test_an_edit_of_another_model_is_refused(made: Made) -> None:
    _, dst = made("mixtral", "constant")
    config = AutoConfig.from_pretrained(dst)
    assert config.num_local_experts == 4
    model = loaded(dst)
    for edit, message in (
        (RouterEdit(9, keep=(0,)), "expected one experts module there, found 0"),
        (RouterEdit(0, keep=(0, 9)), "names expert 9, the model has 4"),
    ):
        with pytest.raises(MoeboundError, match=message):
            apply_router_edits(model, {edit.layer: edit})


# Plans


def test_a_plan_with_a_method_for_each_expert(tiny: MakeTiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    bound = ErrorBound(0.2, "rate", "expert")

    def entry(expert: Any) -> PlannedExpert:
        roles = [matrix.role for matrix in expert.matrices]
        kinds: list[tuple[str | None, str | None]] = [
            (None, None), ("rtn:int4:g16", None), ("mean_rest", "a"), ("mean_rest", "a"),
        ]  # fmt: skip
        method, group = kinds[expert.key.expert]
        bounds = {str(role): bound for role in roles} if method is None else {}
        return PlannedExpert(expert.key, bounds, expert.size, 1, None, method, group)

    plan = Plan("bounded:bound", "uniform", {"bpw": 4.0}, "tiny", 1,
                tuple(map(entry, checkpoint.experts())))  # fmt: skip
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    summary = compress(checkpoint, tmp_path / "dst", bound=Plan.load(tmp_path / "plan.json"))
    assert summary.guarantee == "none"
    store = open_store(tmp_path / "dst")
    settings = [expert.method for expert in store.experts()][:4]
    assert settings == ["bounded:bound", "rtn:int4:g16", "mean_rest", "mean_rest"]
    assert verify(tmp_path / "dst", against=checkpoint).ok
    with moebound.load(tmp_path / "dst", dtype="float32") as offloaded:
        assert torch.allclose(logits(offloaded.model), logits(loaded(tmp_path / "dst")), atol=1e-5)
    bad = plan.to_json()
    bad["experts"][0]["method"] = "nosuch"
    bad["experts"][0]["bounds"] = {}
    with pytest.raises(MethodError, match="'nosuch': unknown"):
        compress(checkpoint, tmp_path / "other", bound=Plan.from_json(bad))
