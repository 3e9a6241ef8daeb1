"""Loaders of vLLM and SGLang: the weights of the decompressed checkpoint, bit for bit, by name.

Against the real classes where the engine is installed, else against their recorded signatures
(record.py): then the engines' own part, building models and placing weights, is not run.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integrations.engines.stand_in import RECORDS, put_in_place
from methods.made import KeepTwo, known
from moebound import ErrorBound
from moebound.errors import CheckpointError, CorruptionError, StoreError
from moebound.errors import UnsupportedArchitectureError as Unsupported
from moebound.store import compress, decompress
from tiny_models import make_tiny

RATE = ErrorBound(0.3, "rate", "expert")
PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our loader module, imported against one engine."""
    name: str = request.param
    real = put_in_place(name, monkeypatch)
    module = f"moebound.integrations.{name}.loader"
    if not real:
        monkeypatch.delitem(sys.modules, module, raising=False)
    loaded = importlib.import_module(module)
    yield loaded
    if not real:
        sys.modules.pop(module, None)


def weights(engine: ModuleType, store: Path | str, model: Any = None, **config: Any) -> Any:
    """What the engine's `model.load_weights` would be handed."""
    load_config = SimpleNamespace(
        load_format="auto", download_dir=None, draft_model_idx=None, model_loader_extra_config={},
        safetensors_load_strategy=None,
    )  # fmt: skip
    loader = engine.MoeboundModelLoader(load_config)
    for name, value in config.items():
        setattr(loader, name, value)
    if "vllm" in engine.__name__:
        model_config = SimpleNamespace(model=str(store), revision=None)
        return loader.get_all_weights(model_config, model)
    source = SimpleNamespace(model_or_path=str(store), revision=None, prefix="")
    engine.refuse_more_sources(model)
    return loader._get_weights_iterator(source, resolved_source=None)


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(found: list[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    names = [name for name, _ in found]
    assert sorted(names) == sorted(expected)
    for name, tensor in found:
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
        ours = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(ours, expected[name].reshape(-1).view(torch.uint8)), name


# One tensor an expert; all in one, with biases; shared experts too; a method with shared parts.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek_v3", {"bound": RATE, "shared_experts": True}),
        ("mixtral", {"bound": RATE, "shard_bytes": 100_000}),
        ("gpt_oss", {"bound": RATE}),
        ("granitemoe", {"bound": RATE, "layers": {1}, "experts": {0, 2}}),
        ("mixtral", {"method": "mobe_fixed:b4"}),
    ],
)
def test_the_weights_are_those_of_the_decompressed_checkpoint(
    engine: ModuleType, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    compress(make_tiny(name, tmp_path / "src"), tmp_path / "store", **options)
    decompress(tmp_path / "store", tmp_path / "plain")
    assert_same(list(weights(engine, tmp_path / "store")), checkpoint(tmp_path / "plain"))


def test_what_belongs_to_one_module_comes_together_in_the_order_of_layers(
    engine: ModuleType, tmp_path: Path
) -> None:
    compress(make_tiny("mixtral", tmp_path / "src"), tmp_path / "store", bound=RATE)
    names = [name for name, _ in weights(engine, tmp_path / "store")]
    layers = [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)", name))]
    assert layers == sorted(layers)
    tops = [name.partition(".")[0] for name in names]
    assert [t for t, before in zip(tops, ["", *tops], strict=False) if t != before] == sorted(
        set(tops)
    )


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)  # SGLang has no such filter
def test_only_the_experts_of_a_process_are_read(engine: ModuleType, tmp_path: Path) -> None:
    compress(make_tiny("mixtral", tmp_path / "src"), tmp_path / "store", bound=RATE)
    every = [name for name, _ in weights(engine, tmp_path / "store")]
    some = [name for name, _ in weights(engine, tmp_path / "store", local_expert_ids={1})]
    assert some == [n for n in every if ".experts." not in n or ".experts.1." in n]
    assert len(some) < len(every)


def test_few_tensors_are_held_at_a_time(
    engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moebound.store import weights as module

    monkeypatch.setenv("MOEBOUND_THREADS", "1")
    compress(make_tiny("deepseek_v3", tmp_path / "src"), tmp_path / "store", bound=RATE)
    read: list[str] = []
    other = module.read_other

    def counted(store: Any, name: str, *, checked: bool) -> torch.Tensor:
        read.append(name)
        return other(store, name, checked=checked)

    monkeypatch.setattr(module, "read_other", counted)
    first = iter(weights(engine, tmp_path / "store"))
    next(first)
    assert len(read) <= 2


def test_a_store_that_is_damaged_or_none_is_refused(engine: ModuleType, tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    with pytest.raises(StoreError, match="this is no store"):
        list(weights(engine, src))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        list(weights(engine, f"{tmp_path}/nowhere"))
    compress(src, tmp_path / "store", bound=RATE)
    file = next((tmp_path / "store").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        list(weights(engine, tmp_path / "store"))


def test_edited_routing_and_further_checkpoints_are_refused(
    engine: ModuleType, tmp_path: Path
) -> None:
    with known(KeepTwo):
        compress(make_tiny("mixtral", tmp_path / "src"), tmp_path / "store", method="keep_two")
        with pytest.raises(StoreError, match="its router is edited"):
            list(weights(engine, tmp_path / "store"))
    with pytest.raises(Unsupported, match="other checkpoints"):
        list(weights(engine, tmp_path, SimpleNamespace(secondary_weights=["another"])))


def test_layers_are_the_plain_ones(engine: ModuleType) -> None:
    quantization = engine.MoeboundQuantization.from_config({"quant_method": "moebound"})
    assert quantization.get_name() == "moebound"
    assert torch.bfloat16 in quantization.get_supported_act_dtypes()
    assert quantization.get_quant_method(torch.nn.Linear(1, 1), "model.embed_tokens") is None


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)  # SGLang needs no --load-format
def test_another_load_format_is_refused(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = SimpleNamespace(load_format="auto")
    config = SimpleNamespace(load_config=asked, model_config=SimpleNamespace(model="a/store"))
    monkeypatch.setattr(engine, "get_current_vllm_config_or_none", lambda: config)
    quantization, layer = engine.MoeboundQuantization(), torch.nn.Linear(1, 1)
    with pytest.raises(StoreError, match="auto: a/store is a store of moebound, which vLLM loads"):
        quantization.get_quant_method(layer, "lm_head")
    for asked.load_format in ("moebound", "dummy"):
        assert quantization.get_quant_method(layer, "lm_head") is None


def written_here(cls: type, method: str) -> bool:
    """By the class, or by one of moebound's own that it is made of."""
    of = [base for base in cls.__mro__ if base.__module__.startswith("moebound.")]
    return not method.startswith("__") and any(method in vars(base) for base in of)


def test_overridden_methods_take_what_the_engine_gives(engine: ModuleType) -> None:
    name = engine.__name__.split(".")[-2]
    ours = {
        "DefaultModelLoader": engine.MoeboundModelLoader,
        "QuantizationConfig": engine.MoeboundQuantization,
    }
    checked = 0
    for names in RECORDS[name]["names"].values():
        for dotted, said in names.items():
            cls, _, method = dotted.partition(".")
            if cls not in ours or not written_here(ours[cls], method):
                continue
            arguments = said[said.index("(") :]
            space: dict[str, Any] = {}
            plain = re.sub(r": [\w.\[\], |]+?(?=[=,)])(?![^\[]*\])", "", arguments)
            exec(f"def recorded{plain}: ...", space)
            theirs = list(inspect.signature(space["recorded"]).parameters.values())
            theirs = theirs[1:] if theirs and theirs[0].name in ("self", "cls") else theirs
            signature = inspect.signature(getattr(object.__new__(ours[cls]), method))
            positional = [p.name for p in theirs if p.kind is not p.KEYWORD_ONLY]
            keywords = {p.name: None for p in theirs if p.kind is p.KEYWORD_ONLY}
            signature.bind(*positional, **keywords)
            signature.bind(**dict.fromkeys(positional), **keywords)
            checked += 1
    assert checked >= 8
    for abstract in RECORDS[name]["abstract"].values():
        assert abstract
    assert not inspect.isabstract(engine.MoeboundQuantization)


def test_entering(engine: ModuleType) -> None:
    engine.enter()
    engine.enter()
    if "vllm" in engine.__name__:
        entered = getattr(sys.modules["vllm"], "entered", None)
        if entered is not None:
            assert entered == {
                "register_model_loader moebound": engine.MoeboundModelLoader,
                "register_quantization_config moebound": engine.MoeboundQuantization,
            }
            return
        quantization = importlib.import_module("vllm.model_executor.layers.quantization")
        loaders = importlib.import_module("vllm.model_executor.model_loader")
        config = importlib.import_module("vllm.config.load").LoadConfig(load_format="moebound")
        assert quantization.get_quantization_config("moebound") is engine.MoeboundQuantization
        assert type(loaders.get_model_loader(config)) is engine.MoeboundModelLoader
    else:
        from sglang.srt.layers.quantization import QUANTIZATION_METHODS

        assert QUANTIZATION_METHODS["moebound"] is engine.MoeboundQuantization
        entered = getattr(sys.modules["sglang"], "entered", None)
        if entered is not None:
            assert entered == {engine.HOOKED: (engine.choose_loader, "around")}


@pytest.mark.parametrize("engine", ["sglang"], indirect=True)  # vLLM is told by --load-format
def test_our_loader_is_taken_for_stores_only(engine: ModuleType) -> None:
    def original(load_config: Any, model_config: Any = None) -> str:
        return "theirs"

    def chosen(quantization: str | None, load_format: str) -> Any:
        config = SimpleNamespace(quantization=quantization, model_path="a/store")
        load = SimpleNamespace(load_format=load_format, model_loader_extra_config={})
        return engine.choose_loader(original, load, config)

    assert chosen(None, "auto") == "theirs"
    assert chosen("fp8", "auto") == "theirs"
    assert chosen("moebound", "dummy") == "theirs"
    assert isinstance(chosen("moebound", "auto"), engine.MoeboundModelLoader)
    with pytest.raises(StoreError, match="'gguf': a/store is a store of moebound"):
        chosen("moebound", "gguf")


@pytest.mark.parametrize(
    ("name", "module", "constant"),
    [
        ("vllm", "vllm.plugins", "DEFAULT_PLUGINS_GROUP"),
        ("sglang", "sglang.srt.plugins", "GENERAL_PLUGINS_GROUP"),
    ],
)
def test_the_entry_point_is_in_the_engines_group(name: str, module: str, constant: str) -> None:
    group = RECORDS[name]["names"][module][constant].strip("'")
    target = PROJECT["project"]["entry-points"][group]["moebound"]
    path, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(path), function))
