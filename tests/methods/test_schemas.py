"""docs/schemas: what is written validates, what is changed does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from moebound.checkpoint import Role, experts_name, open_checkpoint
from moebound.files.formats.statistics import (
    Chunk,
    Of,
    Part,
    Statistics,
    read_statistics,
    save_statistics,
)
from moebound.methods import (
    Encoding,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    RouterEdit,
    SharedPayload,
    register_method,
)
from moebound.methods.registry import METHODS
from moebound.plan import Measured, Plan, PlannedExpert
from moebound.plan.joint import Joint
from moebound.score import Score
from moebound.store import compress, open_store
from moebound.store.format import CERTIFICATES_FILE, to_line
from moebound.types import NUMPY_DTYPES, Array, ErrorBound
from tiny_models import make_tiny

from .made import routed

ROOT = Path(__file__).parents[2]
RATE = ErrorBound(0.3, "rate", "expert")


def schema(name: str) -> Draft202012Validator:
    document = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_bytes())
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


LINES, PLANS = schema("certificates"), schema("plan")


class Merged(Method):
    """Every expert is the layer's first, which is kept as a part that all share."""

    id: ClassVar[str] = "merged_for_schemas"
    scope: ClassVar[Any] = "layer"
    edits_router: ClassVar[bool] = True

    def n_shared(self, roles: Sequence[Role]) -> int:
        return len(roles)

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        first = group.experts[0].matrices
        shared = [SharedPayload(matrix.tobytes(), matrix.nbytes) for matrix in first.values()]
        payloads = {role: Payload(b"", (part,)) for part, role in enumerate(first)}
        edit = RouterEdit(group.layer, (0, 1, 2), {1: 0}, {2: np.zeros(4, np.float32)})
        return Encoding({expert.key: payloads for expert in group.experts}, shared, edit)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        return np.frombuffer(shared[0], NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("mixtral") / "src")


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of every kind of record."""
    patch = pytest.MonkeyPatch()
    patch.setattr(METHODS, "classes", dict(METHODS.classes))
    register_method(Merged)
    folder = tmp_path_factory.mktemp("stores")
    asked: dict[str, dict[str, Any]] = {
        "bounded": {"bound": RATE},
        "rmse": {"bound": ErrorBound(0.1, "rmse"), "codec": "bound"},
        "lossless": {"method": "bounded:lossless"},
        "some": {"bound": RATE, "experts": {0, 1}},
        "rtn": {"method": "rtn:int4:g64"},
        "merged": {"method": "merged_for_schemas"},
        "planned": {"bound": plan_of(source)},
        "calibrated": {"bound": RATE, "method": "calibrated", "calibration": statistics_of(source)},
    }
    for name, options in asked.items():
        compress(source, folder / name, **options)
    patch.undo()
    return {name: folder / name for name in asked}


def statistics_of(source: Path) -> Statistics:
    """Made up: no model is run."""
    checkpoint = open_checkpoint(source)
    experts = checkpoint.experts()
    inner, width = next(m.shape for m in experts[0].matrices if m.role == "gate")
    of = Of("tiny", experts_name(checkpoint), "t", "0" * 64, 1, 9, True, "diagonal", width, inner)
    folder = source.parent / "stats"
    folder.mkdir()
    parts = []
    for layer in sorted({e.key.layer for e in experts}):
        n = sum(e.key.layer == layer for e in experts)
        parts.append(Part.of(layer, 0, n))
        Chunk(
            parts[-1], np.full(n, 9, np.int64), np.ones(n),
            np.ones((n, width), np.float32), np.ones((n, inner), np.float32),
            np.ones((n, 2, width), np.float32), *routed(n, width),
        ).save(folder)  # fmt: skip
    save_statistics(folder, of, parts)
    return read_statistics(folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / CERTIFICATES_FILE).read_bytes().splitlines()]


def plan_of(source: Path) -> Plan:
    """With bounds, methods and groups of their own."""
    checkpoint = open_checkpoint(source)
    kinds: list[dict[str, Any]] = [
        {"bounds": {"gate": RATE, "up": RATE, "down": RATE}},
        {"bounds": {}, "method": "rtn:int4:g64"},
        {"bounds": {}, "method": "merged_for_schemas", "group": "a"},
    ]
    return Plan(
        method="bounded:bound",
        scheme="by hand",
        budget={"bpw": 4.0},
        source="tiny",
        source_bytes=checkpoint.expert_bytes,
        experts=tuple(
            PlannedExpert(e.key, n_weights=e.size, n_bytes=1, kl=0.1, **kinds[e.key.expert % 3])
            for e in checkpoint.experts()
        ),
        joint=Joint((0.1, 0.2), (0.05, 0.1)),
    )


def test_lines_of_every_kind(stores: dict[str, Path]) -> None:
    found = {name: lines(folder) for name, folder in stores.items()}
    for records in found.values():
        for record in records:
            LINES.validate(record)
    kinds = {record["kind"] for records in found.values() for record in records}
    kinds.add("coded")  # of version 3: tests/store/test_others.py
    document = json.loads((ROOT / "docs" / "schemas" / "certificates.schema.json").read_bytes())
    known = [ref["$ref"].split("/")[-1] for ref in document["oneOf"]]
    assert kinds == {document["$defs"][name]["properties"]["kind"]["const"] for name in known}
    guarantees = {
        m["certificate"]["guarantee"]
        for records in found.values()
        for record in records
        if record["kind"] == "expert"
        for m in record["matrices"]
    }
    assert guarantees == {"max_abs", "rmse", "lossless", "none"}
    certificates = [
        m["certificate"]
        for record in found["calibrated"]
        if record["kind"] == "expert"
        for m in record["matrices"]
    ]
    assert all({"columns", "outputs"} <= set(certificate) for certificate in certificates)


def test_an_open_store_has_the_records_that_were_written(stores: dict[str, Path]) -> None:
    for folder in (stores["merged"], stores["planned"]):
        again = [json.loads(to_line(record)) for record in open_store(folder).records()]
        written = [r for r in lines(folder) if r["kind"] in ("expert", "part", "router")]
        assert len(again) == len(written)
        assert all(record in written for record in again)


def test_lines_of_version_1() -> None:
    files = sorted((ROOT / "tests/store/fixtures/v1").glob(f"*/{CERTIFICATES_FILE}"))
    assert len(files) == 5
    for file in files:
        for record in lines(file.parent):
            LINES.validate(record)


def changed(document: dict[str, Any], *path: Any, to: Any = None) -> dict[str, Any]:
    """A copy in which one field is another, or is not there (to: ...)."""
    copy = deepcopy(document)
    place: Any = copy
    for step in path[:-1]:
        place = place[step]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copy


CERTIFICATE = ("matrices", 0, "certificate")


@pytest.mark.parametrize(
    ("store", "kind", "path", "to"),
    [
        ("bounded", "header", ("version",), 4),
        ("bounded", "header", ("format",), "moebound.plan"),
        ("bounded", "end", ("sha256",), "0"),
        ("bounded", "expert", ("kind",), "experts"),
        ("bounded", "expert", ("layer",), -1),
        ("bounded", "expert", ("layer",), True),
        ("bounded", "expert", ("shared",), 0),
        ("bounded", "expert", ("matrices",), []),
        ("bounded", "expert", ("method",), ...),
        ("bounded", "expert", ("matrices", 0, "role"), "router"),
        ("bounded", "expert", ("matrices", 0, "home"), "../model.safetensors"),
        ("bounded", "expert", ("matrices", 0, "uses"), [-1]),
        ("bounded", "expert", (*CERTIFICATE, "guarantee"), "all"),
        ("bounded", "expert", (*CERTIFICATE, "guarantee"), "none"),
        ("bounded", "expert", (*CERTIFICATE, "guarantee"), "rmse"),
        ("bounded", "expert", (*CERTIFICATE, "guarantee"), "lossless"),
        ("bounded", "expert", (*CERTIFICATE, "bound"), None),
        ("bounded", "expert", (*CERTIFICATE, "bound", "mode"), "abs"),
        ("bounded", "expert", (*CERTIFICATE, "bound", "value"), 0),
        ("bounded", "expert", (*CERTIFICATE, "max_abs_error"), -1.0),
        ("bounded", "expert", (*CERTIFICATE, "codec_version"), None),
        ("bounded", "expert", (*CERTIFICATE, "dtype"), "F64"),
        ("bounded", "expert", (*CERTIFICATE, "shape"), [4]),
        ("bounded", "expert", (*CERTIFICATE, "signature"), "x"),
        ("bounded", "expert", (*CERTIFICATE, "sha256_encoded"), ...),
        ("rtn", "expert", (*CERTIFICATE, "abs_bound"), 1.0),
        ("rtn", "expert", (*CERTIFICATE, "codec"), "bound"),
        ("bounded", "tensor", ("home",), ...),
        ("bounded", "tensor", ("sha256",), "A" * 64),
        ("bounded", "shard", ("name",), "a/b"),
        ("bounded", "file", ("n_bytes",), 1.5),
        ("merged", "part", ("name",), "moebound.shared.0"),
        ("merged", "part", ("checksum",), 2**32),
        ("merged", "part", ("held_bytes",), ...),
        ("merged", "router", ("keep",), []),
        ("merged", "router", ("keep",), [1, 1]),
        ("merged", "router", ("alias",), {"x": 0}),
        ("merged", "router", ("constants",), None),
    ],
)
def test_changed_lines(
    stores: dict[str, Path], store: str, kind: str, path: tuple[Any, ...], to: Any
) -> None:
    record = next(record for record in lines(stores[store]) if record["kind"] == kind)
    assert LINES.is_valid(record)
    assert not LINES.is_valid(changed(record, *path, to=to))


def test_plans(source: Path, stores: dict[str, Path]) -> None:
    plan = plan_of(source)
    measured = [
        None,
        Measured.of(0.1, 0.01, "wordmath", 8),
        Measured.of(float("inf"), float("nan"), "wordmath", 8),
        Measured(Score(kl_nats=0.2, kl_stderr=0.1, answer_kl_nats=0.1, answer_kl_stderr=0.1,
                       top1_agreement=0.9, n_problems=3, n_tokens=70), "gsm8k"),
    ]  # fmt: skip
    for found in measured:
        PLANS.validate(json.loads(replace(plan, measured=found).to_bytes()))
    free = replace(plan, experts=tuple(replace(e, kl=None) for e in plan.experts), joint=Joint())
    PLANS.validate(json.loads(free.to_bytes()))
    PLANS.validate(json.loads((stores["planned"] / "moebound.plan.json").read_bytes()))


def test_plans_of_version_1() -> None:
    folder = ROOT / "tests/plan/fixtures/v1"
    files = [file for file in folder.glob("*.json") if file.stem != "expected"]
    files += (ROOT / "tests/store/fixtures/v1").glob("*/moebound.plan.json")
    assert len(files) == 4
    for file in files:
        PLANS.validate(json.loads(file.read_bytes()))


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("version",), 1),
        (("version",), 4),
        (("format",), "moebound.certificates"),
        (("method",), ...),
        (("method",), "RTN"),
        (("codec",), "bound"),
        (("experts",), []),
        (("experts", 0, "bounds"), {}),
        (("experts", 0, "bounds", "router"), {"mode": "abs", "value": 1, "scope": "matrix"}),
        (("experts", 0, "bounds", "gate", "mode"), "range"),
        (("experts", 0, "bounds", "gate", "value"), -1),
        (("experts", 1, "method"), "bounded:bound"),
        (("experts", 1, "method"), ...),
        (("experts", 2, "group"), 3),
        (("experts", 0, "n_weights"), -1),
        (("experts", 0, "predicted_bytes"), 0.5),
        (("experts", 0, "expert"), ...),
        (("predicted", "kl"), -1),
        (("joint", "sums"), [0.0]),
        (("measured",), {"kl": 1}),
        (("budget",), {"bpw": "3"}),
        (("source",), None),
    ],
)
def test_changed_plans(source: Path, path: tuple[Any, ...], to: Any) -> None:
    document = json.loads(plan_of(source).to_bytes())
    assert PLANS.is_valid(document)
    assert not PLANS.is_valid(changed(document, *path, to=to))
