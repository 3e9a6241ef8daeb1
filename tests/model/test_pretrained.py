"""The one door to transformers' Auto classes: no code of a checkpoint, and errors in our words."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.errors import CheckpointError, MoeboundError
from moebound.model.dtypes import check_device
from moebound.model.pretrained import load_model, load_tokenizer, read_config, what_runs
from tiny_models import MakeTiny

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "src/moebound/model/pretrained.py"
PROGRAMS = ROOT / "src/moebound/bench/peers/programs"


def calls(file: Path) -> list[ast.Call]:
    """Calls in a file that could run a checkpoint's code."""
    return [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "pipeline")
    ]


def test_nothing_is_loaded_past_the_door() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert DOOR in files
    # A GGUF file holds no code, and its tokenizer is converted below the door.
    files.remove(ROOT / "src" / "moebound" / "checkpoint" / "gguf_tokenizer.py")
    # They run in environments of their own, on checkpoints that moebound wrote for them.
    files = [file for file in files if not file.is_relative_to(PROGRAMS)]
    assert [file for file in files if file != DOOR and calls(file)] == []


def test_every_call_in_the_door_forbids_code() -> None:
    found = [{k.arg: k.value for k in call.keywords} for call in calls(DOOR)]
    assert len(found) == 5
    for keywords in found:
        # A model's own class, and the settings of generation, can run none.
        if "state_dict" in keywords or not keywords:
            continue
        value = keywords["trust_remote_code"]
        assert isinstance(value, ast.Constant)
        assert value.value is False


@pytest.fixture
def copy(tiny: MakeTiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "copy"))


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | changes))


@pytest.mark.parametrize("model_type", ["kimi_k2", "of_nobody"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(
    copy: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def answer(*words: object) -> str:
        asked.append(words)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    ran = copy / "RAN"
    (copy / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import DeepseekV3Config as OwnConfig\n"
    )
    (copy / "tokenization_own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    edit(
        copy / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "configuration_own.OwnConfig"},
    )
    edit(
        copy / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]},
        tokenizer_class="Own",
    )
    for load in (read_config, load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load(copy)
    with pytest.raises(CheckpointError, match="never run: it can be compressed"):
        load_model(copy)
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize(
    ("model_type", "how"),
    [
        ("qwen3_moe", "offloaded"),
        ("qwen3_vl_moe", "offloaded"),  # multimodal, by the image-text-to-text class
        ("gemma4", "offloaded"),
        ("llama4", "decoded"),  # experts of its own
        ("kimi_k2", "no"),  # code in the checkpoint
        ("qwen3_vl_moe_text", "no"),  # no language-model head of its own
        ("diffusion_gemma", "no"),  # fills in blocks
    ],
)
def test_what_runs(model_type: str, how: str) -> None:
    found = what_runs({"model_type": model_type})
    assert found.how == how
    assert bool(found.why) == (how != "offloaded")
    if how == "no":
        assert f"{model_type!r}" in found.why
        assert "compressed, verified and decompressed, but not run" in found.why


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "three"},
        {"model_type": ["deepseek_v3"]},
        {"rope_parameters": 5},
        {"hidden_size": {}},
        {"architectures": 7},
    ],
)
def test_wrong_types_in_a_config_are_the_checkpoints_fault(
    copy: Path, changes: dict[str, Any]
) -> None:
    edit(copy / "config.json", **changes)
    with contextlib.suppress(CheckpointError):  # some mean nothing to transformers
        load_model(copy)


def test_a_tokenizer_that_its_library_cannot_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": {"type": "BPE", "merges": 5}}')
    edit(copy / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(CheckpointError, match=f"{copy}: cannot be loaded as a tokenizer"):
        load_tokenizer(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match=f"{name}: expected an ordinary file"):
            load(copy)


def test_devices() -> None:
    check_device("cpu")
    check_device("auto", also=("auto",))
    with pytest.raises(MoeboundError, match=r"'nowhere': expected one as torch spells it"):
        check_device("nowhere")
    for name in ["cuda:99"] if torch.cuda.is_available() else ["cuda", "cuda:0"]:
        with pytest.raises(MoeboundError, match=f"device {name!r}: torch .* cannot use it here"):
            check_device(name)
