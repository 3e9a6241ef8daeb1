"""Through a store and every loader: the weights of the decompressed checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moebound
from moebound.calibrate import Text, collect
from moebound.checkpoint import open_checkpoint
from moebound.errors import StoreError
from moebound.evaluate.loading import Loaded, Source
from moebound.store import compress, decompress, open_store, verify
from moebound.types import ErrorBound
from tiny_models import MakeTiny, model_class

IDS = torch.arange(5, 25).view(2, 10)
BOUND = ErrorBound(0.5, "rate", "expert")
NO_TEXT = [
    "svd:b7", "mobe_fixed:b8:s3", "d2_moe_fixed:b9:plain", "resmoe_fixed:b9", "milo_fixed:b7",
    "rfid_re:b9:flat", "moqe_re:int4",
]  # fmt: skip
WITH_TEXT = ["rfid_re:b9", "d2_moe_fixed:b9", "moe_i2_re:b7", "moe_i2_re:b7:p0.5", "soco_lite:b7",
             "modegpt_re:b9", "modegpt_re:k0.5+rtn:int4:g16", "gptq_re:int4:g16",
             "awq_re:int4:g16", "moequant_re:int4", "qmoe_re", "qmoe_re:coded"]  # fmt: skip
BOUNDED = [
    "residual:svd:b4:f8",
    "residual:d2_moe_fixed:r2:plain",
    "residual:calibrated:mobe_fixed:r4:s2",
]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def whole_road(src: Path, dst: Path, plain: Path, **options: Any) -> Any:
    """Verified, decompressed, loaded and offloaded."""
    compress(open_checkpoint(src), dst, **options)
    report = verify(dst, against=open_checkpoint(src))
    assert report.ok, report.problems
    stored = loaded(dst)
    if any(edit.keep for edit in open_store(dst).router_edits().values()):
        with pytest.raises(StoreError, match="no ordinary checkpoint can say"):
            decompress(dst, plain)
    else:
        decompress(dst, plain)
        dense = loaded(plain).state_dict()
        for (key, a), b in zip(dense.items(), stored.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
    want = logits(stored)
    with moebound.load(dst, dtype="float32", ram_budget="90%") as offloaded:
        found = logits(offloaded.model)
        assert torch.allclose(found, want, atol=1e-5)
        everything = [offloaded.model(IDS[:1, :3]).logits for _ in range(2)]
        assert torch.equal(*everything)
    return report


@pytest.mark.parametrize("method", NO_TEXT)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v4"])
def test_without_a_text(name: str, method: str, tiny: MakeTiny, tmp_path: Path) -> None:
    report = whole_road(tiny(name), tmp_path / "dst", tmp_path / "plain", method=method)
    assert report.guarantee == "none"
    assert report.max_abs_error > 0
    parts = open_store(tmp_path / "dst").parts
    assert bool(parts) == method.startswith(("mobe", "d2", "resmoe", "rfid"))


@pytest.fixture(scope="module")
def statistics(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = tiny("qwen3_moe")
    config = AutoConfig.from_pretrained(source)
    model = model_class(config).from_pretrained(source, dtype=torch.float32).train(False)
    at = tmp_path_factory.mktemp("statistics")
    text = Text("rows", tuple(tuple(range(2 + i, 40 + i)) for i in range(9)))
    collect(Loaded(model, None, Source("tiny", "checkpoint", "float32", "")), text, at / "stats")
    return source, at / "stats"


@pytest.mark.parametrize("method", WITH_TEXT)
def test_with_a_text(method: str, statistics: tuple[Path, Path], tmp_path: Path) -> None:
    source, stats = statistics
    report = whole_road(
        source, tmp_path / "dst", tmp_path / "plain", method=method, calibration=stats
    )
    assert report.guarantee == "none"
    edits = open_store(tmp_path / "dst").router_edits()
    kept = [edit.keep for edit in edits.values()]
    if method == "moe_i2_re:b7:p0.5":
        assert all(keep is not None and len(keep) == 2 for keep in kept)
    else:
        assert not any(kept)


def test_channels_that_were_cut_have_no_bound(
    statistics: tuple[Path, Path], tmp_path: Path
) -> None:
    source, stats = statistics
    report = whole_road(source, tmp_path / "dst", tmp_path / "plain", bound=BOUND,
                        method="modegpt_re:k0.5+calibrated", calibration=stats)  # fmt: skip
    assert report.guarantee == "none"
    assert report.outputs is None


@pytest.mark.parametrize("method", BOUNDED)
def test_with_a_bound(method: str, statistics: tuple[Path, Path], tmp_path: Path) -> None:
    source, stats = statistics
    calibration = stats if "calibrated" in method else None
    report = whole_road(source, tmp_path / "dst", tmp_path / "plain", method=method, bound=BOUND,
                        calibration=calibration)  # fmt: skip
    assert report.guarantee == "max_abs"
    assert report.worst is not None
    assert 0.3 < report.worst <= 1


def test_shared_experts_too(tiny: MakeTiny, tmp_path: Path) -> None:
    """Groups of their own, without statistics."""
    options: dict[str, Any] = {"method": "d2_moe_fixed:b19:plain", "shared_experts": True}
    whole_road(tiny("qwen2_moe"), tmp_path / "dst", tmp_path / "plain", **options)
    assert any(e.key.shared for e in open_store(tmp_path / "dst").experts())
