"""from_pretrained(store): bit for bit the model of the decompressed checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from moebound.checkpoint import open_checkpoint
from moebound.errors import CorruptionError, FormatError, StoreError
from moebound.integrations.transformers import register
from moebound.store import compress, decompress, open_store
from moebound.types import ErrorBound
from tiny_models import TINY, make_tiny, model_class, tiny_config

register()

MakeBoth = Callable[..., tuple[Path, Path]]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> MakeBoth:
    """both(name, ...) -> (store, the ordinary checkpoint it decompresses to). Not to be changed."""
    made: dict[tuple[Any, ...], tuple[Path, Path]] = {}

    def make(
        name: str,
        *,
        codec: str = "bound",
        dtype: torch.dtype = torch.bfloat16,
        original_format: bool = True,
        **options: Any,
    ) -> tuple[Path, Path]:
        key = (
            name,
            codec,
            dtype,
            original_format,
            *sorted((k, str(v)) for k, v in options.items()),
        )
        if key not in made:
            hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            folder = tmp_path_factory.mktemp(name)
            src = make_tiny(name, folder / "src", dtype=dtype, original_format=original_format)
            bound = ErrorBound(0.3, "rate", "expert")
            compress(open_checkpoint(src), folder / "dst", bound=bound, codec=codec, **options)
            decompress(folder / "dst", folder / "out")
            made[key] = folder / "dst", folder / "out"
        return made[key]

    return make


def load(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    options = {"dtype": "auto", **options}
    return model_class(tiny_config(name)).from_pretrained(folder, **options)


def assert_equal(a: PreTrainedModel, b: PreTrainedModel) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)), key


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name: str, both: MakeBoth) -> None:
    store, out = both(name, shared_experts=True)
    assert_equal(load(name, store), load(name, out))


# Families whose renamings or converters meet transformers' own (fused) names in different ways.
@pytest.mark.parametrize(
    "name",
    ["deepseek_v3", "mixtral", "granitemoe", "nemotron_h", "jamba", "lfm2_moe", "laguna",
     "mistral_large4_text", "qwen3_vl_moe", "llama4", "aria", "gemma4"],
)  # fmt: skip
def test_fused_names(name: str, both: MakeBoth) -> None:
    store, out = both(name, original_format=False, shared_experts=True)
    assert_equal(load(name, store), load(name, out))


@pytest.mark.parametrize("codec", ["bound", "raw"])
@pytest.mark.parametrize("loaded", ["auto", *DTYPES])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_dtypes(name: str, stored: str, loaded: str, codec: str, both: MakeBoth) -> None:
    store, out = both(name, codec=codec, dtype=DTYPES[stored])
    dtype = DTYPES.get(loaded, "auto")
    a, b = load(name, store, dtype=dtype), load(name, out, dtype=dtype)
    assert_equal(a, b)
    wanted = DTYPES[stored if loaded == "auto" else loaded]
    assert a.dtype == wanted


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "llama4_text"])
def test_some_layers_and_experts_only(name: str, both: MakeBoth) -> None:
    store, out = both(name, layers={1}, experts={0, 2})
    assert_equal(load(name, store), load(name, out))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_auto_class_gives_an_ordinary_model(name: str, both: MakeBoth) -> None:
    store, out = both(name)
    a = AutoModelForCausalLM.from_pretrained(store, dtype="auto")
    b = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert type(a) is type(b)
    assert not getattr(a, "is_quantized", False)
    assert not hasattr(a, "hf_quantizer")
    assert not hasattr(a.config, "quantization_config")
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(a(tokens).logits, b(tokens).logits)
    a(tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None for n, p in a.named_parameters() if "experts" in n)


@pytest.mark.parametrize("original_format", [True, False], ids=["hub", "fused"])
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "gpt_oss", "granitemoe", "llama4"])
def test_save_pretrained_writes_an_ordinary_checkpoint(
    name: str, original_format: bool, both: MakeBoth, tmp_path: Path
) -> None:
    store, out = both(name, original_format=original_format)
    load(name, store).save_pretrained(tmp_path / "a")
    load(name, out).save_pretrained(tmp_path / "b")
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert {file.name for file in (tmp_path / "a").iterdir()} == names
    for file in names:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(name: str, device_map: Any, both: MakeBoth) -> None:
    store, out = both(name)
    assert_equal(load(name, store, device_map=device_map), load(name, out))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_offload_to_disk(name: str, both: MakeBoth, tmp_path: Path) -> None:
    # Transformers writes what a converter made to the offload folder: decoded weights.
    store, out = both(name)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "lm_head": "cpu",
                  "model.rotary_emb": "cpu"}  # fmt: skip
    model = load(name, store, device_map=device_map, offload_folder=str(tmp_path))
    assert any(p.device.type == "meta" for p in model.parameters())
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(name, out)(tokens).logits)


def test_synchronous_loading(both: MakeBoth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    store, out = both("mixtral")
    assert_equal(load("mixtral", store), load("mixtral", out))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_damaged_tensor_fails_and_is_named(name: str, both: MakeBoth, tmp_path: Path) -> None:
    dst = Path(shutil.copytree(both(name)[0], tmp_path / "dst"))
    tensor = open_store(dst).experts()[5].matrices[1].tensor
    with open(tensor.file, "r+b") as handle:
        handle.seek(tensor.offset + tensor.n_bytes // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptionError, match=rf"{tensor.file.name}: tensor '{tensor.name}'"):
        load(name, dst)


def test_a_newer_store_is_refused(both: MakeBoth) -> None:
    config = AutoConfig.from_pretrained(both("mixtral")[0])
    config.quantization_config["version"] = 4
    with pytest.raises(FormatError, match="store version 4"):
        load("mixtral", both("mixtral")[0], config=config)


def test_config_of_a_store_on_ordinary_shards(both: MakeBoth) -> None:
    store, out = both("mixtral")
    with pytest.raises(StoreError, match="no shard has compressed tensors"):
        load("mixtral", out, config=AutoConfig.from_pretrained(store))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.slow
def test_without_moebound_loading_fails_instead_of_making_weights_up(
    name: str, both: MakeBoth
) -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(both(name)[0])],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "Unknown quantization type, got moebound" in done.stderr
    assert "RuntimeError" in done.stderr


def test_nothing_is_reported_missing(both: MakeBoth, caplog: pytest.LogCaptureFixture) -> None:
    hf_logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    hf_logging.enable_propagation()
    loader: Any = model_class(tiny_config("mixtral"))
    with caplog.at_level(logging.WARNING, "transformers"):
        _, info = loader.from_pretrained(both("mixtral")[0], dtype="auto", output_loading_info=True)
    hf_logging.disable_propagation()
    assert not any(info.values())
    assert not caplog.records
