"""The comparison at equal bytes, on a tiny model: sizes are equal, promises are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moebound.bench.quality import run
from moebound.bench.quality_table import render_quality
from moebound.errors import MoeboundError
from moebound.tasks import get_task
from moebound.wordmath.builtin import resolve


@pytest.fixture
def tiny_wordmath(tmp_path: Path) -> str:
    """The built-in model's shape and tokenizer, with three layers of eight experts, untrained."""
    folder = Path(resolve("builtin:wordmath"))
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok = 3, 8, 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    return str(tmp_path)


def test_bounded_ways_get_the_bytes_of_the_quantizer_within_a_percent_or_two(
    tiny_wordmath: str,
) -> None:
    said: list[str] = []
    report = run(
        tiny_wordmath,
        get_task("wordmath"),
        quantizers=["rtn:int4:g64"],
        limit=4,
        say=lambda what, done, total: said.append(f"{what} {done}/{total}"),
    )
    quantizer, bound, sz3, cuszp = report.rows
    assert [row.method for row in report.rows] == ["rtn:int4:g64", "bound", "sz3", "cuszp"]
    assert quantizer.bits_per_weight == pytest.approx(4 + 20 / 64)
    for row in (bound, sz3, cuszp):
        assert row.n_bytes == pytest.approx(quantizer.n_bytes, rel=0.02)
    # The better coder keeps the narrower bound.
    assert (bound.largest_rate or 9) < (sz3.largest_rate or 0) < (cuszp.largest_rate or 0)
    assert bound.fidelity.answer_kl_nats < 1
    assert said[-1].endswith("3/4")
    assert render_quality(report).row_count == 5
    assert report.to_json()["rows"][1]["to_original"]["pia"]["n"] == 4


def test_an_unknown_quantizer_is_found_before_any_work() -> None:
    with pytest.raises(MoeboundError, match="rtn:int99:g64"):
        run("builtin:nothing", get_task("wordmath"), quantizers=["rtn:int99:g64"])
