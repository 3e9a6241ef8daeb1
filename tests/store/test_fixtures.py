"""Stores that were written once: every later version reads them, to the bit.

`fixtures/make_v1.py` says what they hold. A fixture that is missing or differs fails: nothing here
makes one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import moebound
from moebound.checkpoint import open_checkpoint, read_tensor
from moebound.store import decompress, open_store, plan_of, verify
from moebound.types import Array, ExpertKey

FOLDER = Path(__file__).parent / "fixtures" / "v1"
NAMES = ["fused", "one_by_one", "planned", "some_lossless", "some_rmse"]
IDS = torch.arange(3, 23).view(2, 10)

MakePlain = Callable[[str], Path]

every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MakePlain:
    """plain(name) -> the ordinary checkpoint of a store. Not to be written to."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp(name) / "plain"
            decompress(FOLDER / name, out)
            made[name] = out
        return made[name]

    return make


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.expected.json").read_bytes())
    return found


def of_array(array: Array) -> dict[str, Any]:
    digest = sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def stock(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@every
def test_the_bytes_are_those_that_version_1_wrote(name: str) -> None:
    found = {f.name: sha256(f.read_bytes()).hexdigest() for f in (FOLDER / name).iterdir()}
    assert found == expected(name)["files"]
    config = json.loads((FOLDER / name / "config.json").read_bytes())
    assert config["quantization_config"]["version"] == 1


def test_no_store_without_a_name() -> None:
    wanted = {*NAMES, *(f"{name}.expected.json" for name in NAMES)}
    assert {path.name for path in FOLDER.iterdir()} == wanted


@every
def test_verify(name: str) -> None:
    report = verify(FOLDER / name)
    assert report.ok, report.problems
    assert report.n_experts == len(expected(name)["experts"])
    assert report.worst is not None
    assert report.worst <= 1


@every
def test_settings(name: str) -> None:
    settings, says = open_store(FOLDER / name).settings, expected(name)["settings"]
    bound = settings.bound
    assert bound is not None
    assert {"mode": bound.mode, "value": bound.value, "scope": bound.scope} == says["bound"]
    for field in ("version", "codec", "shared_experts", "run", "plan", "source"):
        assert getattr(settings, field) == says[field], field


@every
def test_experts_decode_for_ever(name: str) -> None:
    store, says = open_store(FOLDER / name), expected(name)
    keys = [ExpertKey(e["layer"], e["expert"], e["shared"]) for e in says["experts"]]
    assert [stored.key for stored in store.experts()] == keys
    for key, expert in zip(keys, says["experts"], strict=True):
        assert store.expert(key).exact == expert["exact"]
        decoded = store.decode_expert(key)
        assert {role: of_array(array) for role, array in decoded.items()} == expert["matrices"]


@every
def test_kept_tensors(name: str) -> None:
    store = open_store(FOLDER / name)
    found = {key: of_array(read_tensor(store.tensors[key])) for key in store.kept}
    assert found == expected(name)["kept"]


@every
def test_the_ordinary_checkpoint(name: str, plain: MakePlain) -> None:
    tensors = open_checkpoint(plain(name)).tensors
    found = {key: of_array(read_tensor(tensor)) for key, tensor in tensors.items()}
    assert found == expected(name)["decompressed"]


def test_against_the_original(plain: MakePlain) -> None:
    """Which of a lossless store is what it decompresses to."""
    report = verify(FOLDER / "some_lossless", against=open_checkpoint(plain("some_lossless")))
    assert report.ok, report.problems


@every
def test_from_pretrained(name: str, plain: MakePlain) -> None:
    one = stock(FOLDER / name, dtype="auto").state_dict()
    other = stock(plain(name), dtype="auto").state_dict()
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), other[key].view(torch.uint8)), key


@every
def test_offloaded(name: str, plain: MakePlain) -> None:
    wanted = logits(stock(plain(name), dtype=torch.float32))
    assert wanted.isfinite().all()
    with moebound.load(FOLDER / name, dtype="float32") as offloaded:
        assert (logits(offloaded.model) - wanted).abs().max() <= 1e-5


@every
def test_its_plan(name: str) -> None:
    store = open_store(FOLDER / name)
    plan = plan_of(store)
    assert (plan is not None) == (name == "planned")
    if plan is None:
        return
    says = json.loads((FOLDER / name / "moebound.plan.json").read_bytes())
    assert says["version"] == 1
    assert plan.sha256 == store.settings.plan
    assert len(plan.experts) == len(says["experts"]) == len(store.experts())
    for entry in says["experts"]:
        key = ExpertKey(entry["layer"], entry["expert"], entry["shared"])
        for matrix in store.expert(key).matrices:
            planned, promised = plan[key].bounds[matrix.record.role], matrix.record.certificate
            assert planned == promised.bound
            assert planned.value == entry["bounds"][matrix.record.role]["value"]
    assert len({bound.value for bound in plan.bounds}) > 8
    assert any(expert.key.shared for expert in plan.experts)


def test_what_the_stores_are_for() -> None:
    """Every way of version 1 is in one of them."""
    stores = {name: open_store(FOLDER / name) for name in NAMES}
    matrices = {
        name: [m.record for e in store.experts() for m in e.matrices]
        for name, store in stores.items()
    }
    of_all = [record for records in matrices.values() for record in records]
    assert {record.certificate.codec for record in of_all} >= {"bound", "lossless", "cuszp", "raw"}
    assert {record.certificate.dtype for record in of_all} == {"BF16", "F16", "F32"}
    bounds = [record.certificate.bound for record in of_all]
    assert {bound.mode for bound in bounds if bound is not None} >= {"abs", "rate", "rmse"}
    assert all(record.index is None for record in matrices["one_by_one"])
    assert all(record.index is not None for record in matrices["fused"])
    assert any(key.endswith("_bias") for key in stores["fused"].kept)
    assert len({record.home for record in matrices["one_by_one"]}) > 1
    assert all(len(store.shards) > 1 for store in stores.values())
    for name in ("some_lossless", "some_rmse"):
        assert {e.exact for e in stores[name].experts()} == {True, False}
