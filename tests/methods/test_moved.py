"""Statistics again after routing has moved: gathered, coded by, and told apart from the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.calibrate import Settings, Statistics, collect, edit_model
from moebound.errors import MethodError, MoeboundError
from moebound.evaluate.loading import Loaded, Source
from moebound.model.fingerprint import of_corners
from moebound.model.live import live_experts
from moebound.store import compress, open_store, verify
from moebound.types import ErrorBound, ExpertKey
from tiny_models import MakeTiny

from .keeping import IDS, TEXT, loaded, statistics

METHODS = ["reap_re:keep3", "mone_re:keep3", "hc_smoe_fixed:keep3", "modegpt_re:k0.5"]
RATE = ErrorBound(0.5, "rate", "expert")


def after(src: Path, setting: str, first: Statistics, out: Path) -> Statistics:
    """As `moebound calibrate --after` does."""
    model = loaded(src)
    own = of_corners(live_experts(model))
    setting = edit_model(model, setting, first)
    there = Loaded(model, None, Source(src.name, "checkpoint", "float32", "its own"))
    return collect(there, TEXT, out, Settings(after=setting, fingerprint=own))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_edited_as_its_store_would_be(
    method: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    src = tiny("mixtral")
    first = statistics(src, tmp_path / "first")
    compress(src, tmp_path / "alone", method=method, calibration=first)
    edited = loaded(src)
    assert edit_model(edited, method, first) == method
    with torch.inference_mode():
        want, found = (model(IDS).logits for model in (loaded(tmp_path / "alone"), edited))
    assert torch.allclose(want, found, atol=1e-2)
    assert not torch.allclose(want, loaded(src)(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_coded_by_what_it_gets_then(
    method: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    src = tiny("mixtral")
    first = statistics(src, tmp_path / "first")
    moved = after(src, method, first, tmp_path / "moved")
    assert moved.of.after == method
    assert moved.of.fingerprint == first.of.fingerprint
    assert sum(moved.tokens().values()) == sum(first.tokens().values())
    stores: dict[str, Any] = {}
    for name, by in {"first": None, "moved": moved}.items():
        compress(src, tmp_path / f"to-{name}", method=f"{method}+calibrated", bound=RATE,
                 calibration=first, moved=by)  # fmt: skip
        stores[name] = open_store(tmp_path / f"to-{name}")
    # The same choice, other weights.
    edits = [{at: e.to_bytes() for at, e in s.router_edits().items()} for s in stores.values()]
    assert edits[0] == edits[1]
    digests = [
        {m.tensor.name: m.record.certificate.sha256_encoded for e in s.experts()
         for m in e.matrices} for s in stores.values()
    ]  # fmt: skip
    assert digests[0] != digests[1]
    certified = stores["moved"].settings.calibration
    assert certified is None or certified.of.after == method
    assert verify(tmp_path / "to-moved", against=src).ok
    if certified is not None:
        assert verify(tmp_path / "to-moved", against=src, calibration=moved).ok
        report = verify(tmp_path / "to-moved", against=src, calibration=first)
        assert [p.kind for p in report.problems] == ["calibration"]
        assert f"after is None, certified {method!r}" in report.problems[0].message


def test_of_merged_experts_second_moments_are_those_of_all_members(
    tiny: MakeTiny, tmp_path: Path
) -> None:
    """Every token of a cluster goes through its common weights, under the numbers of its members:
    the moments of the first layer's inputs, which nothing has changed, add up to the same."""
    src = tiny("mixtral")
    first = statistics(src, tmp_path / "first")
    moved = after(src, "hc_smoe_fixed:keep3", first, tmp_path / "moved")
    layers = sorted({key.layer for key in first.keys})

    def inputs(of: Statistics, layer: int) -> Any:
        return sum(of.moments(k, "inputs") for k in of.keys if k.layer == layer)

    np.testing.assert_allclose(inputs(moved, layers[0]), inputs(first, layers[0]), rtol=1e-4)
    assert not np.allclose(inputs(moved, layers[-1]), inputs(first, layers[-1]), rtol=1e-3)
    own = [moved.moments(ExpertKey(layers[0], e), "hidden") for e in range(2)]
    assert not np.allclose(own[0], own[1])


def test_statistics_of_something_else_are_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    src = tiny("mixtral")
    first = statistics(src, tmp_path / "first")
    moved = after(src, "reap_re:keep3", first, tmp_path / "moved")

    def made(method: str, by: Statistics) -> None:
        compress(src, tmp_path / "x", method=method, bound=RATE, calibration=first, moved=by)

    with pytest.raises(MethodError, match="after reap_re:keep3; expected some after reap_re:keep2"):
        made("reap_re:keep2+calibrated", moved)
    with pytest.raises(MethodError, match="of the whole model; expected some after reap_re:keep3"):
        made("reap_re:keep3+calibrated", first)
    with pytest.raises(MethodError, match="nothing it keeps is coded by inputs"):
        made("reap_re:keep3+bounded:bound", moved)
    with pytest.raises(MethodError, match="nothing it keeps is coded by inputs"):
        made("calibrated", moved)
    for setting in ("rtn:int4:g64", "svd:r2", "reap_re:keep3+rtn:int4:g64"):
        with pytest.raises(MethodError, match="leaves out, merges or cuts"):
            edit_model(loaded(src), setting, first)
    other = tiny("qwen3_moe")
    with pytest.raises(MoeboundError, match="has other weights"):
        edit_model(loaded(other), "reap_re:keep3", first)
