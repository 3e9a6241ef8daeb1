"""Every field of every record, changed into another that could be true, and sealed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebound.checkpoint import INDEX_FILE, open_checkpoint
from moebound.errors import CorruptionError, FormatError
from moebound.methods import Encoding, GroupView, Method, RouterEdit, SharedPayload, register_method
from moebound.methods.base import Payload
from moebound.store import verify
from moebound.store.format import Settings, certificates_bytes, from_line
from moebound.types import ErrorBound

from .conftest import MakeSource, MakeStore, run
from .test_reader import CERTIFICATES

UNCHECKED = {("config", "run"), ("config", "source")}
"""Said in docs/checks.md not to be checked: names of the run and of the source."""

OTHER_WORDS = {
    "gate": "up", "up": "gate", "gate_up": "down", "down": "gate_up",
    "max_abs": "rmse", "rmse": "max_abs", "lossless": "max_abs", "none": "lossless",
    "BF16": "F16", "F16": "F32", "F32": "BF16", "bound": "cuszp", "raw": "lossless",
    "bounded:bound": "bounded:cuszp", "bounded:raw": "bounded:lossless", "rate": "abs",
    "expert": "matrix", "matrix": "expert", "told": "rtn", "rtn:int4:g32": "rtn:int8:g32",
}  # fmt: skip


def others(value: Any, path: tuple[Any, ...]) -> Iterator[Any]:
    """Values that a reader could take for true in the place of this one."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value:
            yield value - 1
    elif isinstance(value, float):
        yield value * 0.5 if value else 0.001
        yield value * 1.0001 + 1e-12
    elif value is None:
        yield {"bound": {"mode": "abs", "value": 0.1, "scope": "matrix"}}.get(path[-1], 0)
    elif isinstance(value, str):
        if len(value) == 64 and all(c in "0123456789abcdef" for c in value):
            yield hashlib.sha256(value.encode()).hexdigest()
        elif value in OTHER_WORDS:
            yield OTHER_WORDS[value]
        else:
            yield value.replace(".1.", ".0.") if ".1." in value else value + "x"
    elif isinstance(value, list) and not value:
        yield [0]
    elif isinstance(value, dict) and not value:
        yield {"0": 1}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    empty = True
    for name, inner in items:
        empty = False
        yield from leaves(inner, (*path, name))
    if empty:
        yield path, value


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for name in path[:-1]:
        document = document[name]
    document[path[-1]] = value


def records_of(dst: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dst / CERTIFICATES).read_bytes().splitlines()[1:-1]]


def write_records(dst: Path, records: list[dict[str, Any]]) -> None:
    """Sealed, with the files' own hashes."""
    for record in records:
        if record["kind"] == "file" and (dst / record["name"]).is_file():
            data = (dst / record["name"]).read_bytes()
            record["n_bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    seal(dst, records)


def seal(dst: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records]
    (dst / CERTIFICATES).write_bytes(b"".join(certificates_bytes(lines)))


def one_of_a_kind(records: list[dict[str, Any]]) -> list[int]:
    """One from the middle of each kind of record; exact, shared and other experts apart."""
    kinds: dict[Any, list[int]] = {}
    for number, record in enumerate(records):
        kinds.setdefault((record["kind"], record.get("exact"), record.get("shared")), []).append(
            number
        )
    return sorted(found[len(found) // 2] for found in kinds.values())


class Told(Method):
    """A shared part, float16 payloads and a router edit: everything that a record can be of."""

    id = "told"
    scope = "layer"
    edits_router = True

    def n_shared(self, roles: Any) -> int:
        return 1

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        layer = group.experts[0].key.layer
        matrices = {
            expert.key: {
                role: Payload(np.asarray(a, np.float32).astype(np.float16).tobytes(), uses=(0,))
                for role, a in expert.matrices.items()
            }
            for expert in group.experts
        }
        return Encoding(
            matrices, [SharedPayload(b"common", 6)],
            RouterEdit(layer, keep=(0, 1, 2), alias={1: 0}, constants={2: np.ones(32, np.float32)}),
        )  # fmt: skip

    @classmethod
    def decode(cls, payload: memoryview, spec: Any, shared: Any) -> Any:
        return np.frombuffer(payload, np.float16).reshape(spec.shape).astype(np.float32)


STORES: dict[str, tuple[str, dict[str, Any]]] = {
    "bounded": ("deepseek_v3", {"shared_experts": True}),
    "some of a tensor": ("gpt_oss", {"experts": {0, 2}}),
    "rmse": ("deepseek_v3", {"bound": ErrorBound(0.05, "rmse"), "layers": {1}}),
    "no bound": ("deepseek_v3", {"bound": None, "method": "rtn:int4:g32"}),
    "shared parts": ("mixtral", {"bound": None, "method": "told"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(STORES))
def test_no_field_of_a_record_can_lie(kind: str, source: MakeSource, tmp_path: Path) -> None:
    register_method(Told)
    name, options = STORES[kind]
    src, dst = source(name), tmp_path / "dst"
    run(src, dst, **options)
    original = open_checkpoint(src)
    assert verify(dst, against=original).ok, verify(dst, against=original).problems
    records = records_of(dst)
    believed = []
    for number in one_of_a_kind(records):
        for path, value in leaves(records[number]):
            for other in others(value, path):
                lied = json.loads(json.dumps(records))
                put(lied[number], path, other)
                seal(dst, lied)
                if verify(dst, against=original, jobs=1).ok:
                    believed.append((records[number]["kind"], path, value, other))
    assert believed == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(STORES))
def test_no_field_of_the_settings_can_lie(kind: str, source: MakeSource, tmp_path: Path) -> None:
    register_method(Told)
    name, options = STORES[kind]
    src, dst = source(name), tmp_path / "dst"
    run(src, dst, **options)
    original, config = open_checkpoint(src), json.loads((dst / "config.json").read_text())
    believed = set()
    for path, value in leaves(config):
        for other in others(value, path):
            lied = json.loads(json.dumps(config))
            put(lied, path, other)
            (dst / "config.json").write_text(json.dumps(lied))
            write_records(dst, records_of(dst))
            if verify(dst, against=original, jobs=1).ok:
                believed.add(("config", path[-1]))
    without = set() if name == "deepseek_v3" else {("config", "shared_experts")}  # it has none
    assert believed <= UNCHECKED | without


def exchange(field: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(records: list[dict[str, Any]]) -> None:
        first, second = [r for r in records if r["kind"] == "expert"][:2]
        first[field], second[field] = second[field], first[field]

    return change


def exchange_roles(records: list[dict[str, Any]]) -> None:
    first, second = next(r for r in records if r["kind"] == "expert")["matrices"][:2]
    first["role"], second["role"] = second["role"], first["role"]


def exchange_layers(records: list[dict[str, Any]]) -> None:
    experts = [r for r in records if r["kind"] == "expert"]
    first, last = experts[0], experts[-1]
    first["layer"], last["layer"] = last["layer"], first["layer"]


@pytest.mark.parametrize(
    "change", [exchange("expert"), exchange_roles, exchange_layers, exchange("group")]
)
def test_records_that_exchange_something(
    change: Callable[[list[dict[str, Any]]], None], shared_store: MakeStore, tmp_path: Path
) -> None:
    _, shared = shared_store("qwen3_moe")
    dst = Path(shutil.copytree(shared, tmp_path / "own"))
    records = records_of(dst)
    change(records)
    seal(dst, records)
    assert not verify(dst, jobs=1).ok  # the original is not needed for that


def claim_all(records: list[dict[str, Any]], change: Callable[[dict[str, Any]], None]) -> None:
    for record in records:
        for matrix in record.get("matrices", ()):
            change(matrix)


def test_a_bound_that_all_claim_is_resolved_anew(own_store: MakeStore) -> None:
    """Config, certificates, ratios: all agree on a smaller bound than the weights keep."""
    src, dst = own_store()
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["bound"]["value"] /= 4
    (dst / "config.json").write_text(json.dumps(config))
    records = records_of(dst)

    def smaller(matrix: dict[str, Any]) -> None:
        matrix["certificate"]["bound"]["value"] /= 4

    claim_all(records, smaller)
    write_records(dst, records)
    assert verify(dst, jobs=1).ok
    assert "bound" in {p.kind for p in verify(dst, against=src, jobs=1).problems}


def test_bounds_restated_as_an_average(own_store: MakeStore) -> None:
    src, dst = own_store()
    records = records_of(dst)

    def average(matrix: dict[str, Any]) -> None:
        matrix["certificate"]["bound"] = {"mode": "rmse", "value": 9.0, "scope": "matrix"}
        matrix["certificate"]["guarantee"] = "rmse"

    claim_all(records, average)
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["bound"] = {"mode": "rmse", "value": 9.0, "scope": "matrix"}
    (dst / "config.json").write_text(json.dumps(config))
    write_records(dst, records)
    assert not verify(dst, against=src, jobs=1).ok


@pytest.mark.parametrize("ratio", [0.001, math.nan, -5, math.inf, True, "0.5", [], 10**400])
def test_a_ratio_that_is_none(ratio: Any, own_store: MakeStore) -> None:
    _, dst = own_store()
    records = records_of(dst)
    claim_all(records, lambda matrix: matrix.update(ratio=ratio))
    seal(dst, records)
    assert not verify(dst, jobs=1).ok


def test_files_and_folders_without_a_record(own_store: MakeStore) -> None:
    _, dst = own_store()
    (dst / "modeling_own.py").write_text("")
    (dst / "more").mkdir()
    (dst / "model-00009-of-00009.safetensors").write_bytes(b"")
    (dst / "notes.md").write_text("people's")
    (dst / ".gitattributes").write_text("tools'")
    assert {p.tensor for p in verify(dst, jobs=1).problems} == {
        "modeling_own.py", "more", "model-00009-of-00009.safetensors",
    }  # fmt: skip


def test_an_index_that_says_otherwise(own_store: MakeStore) -> None:
    _, dst = own_store()
    index = json.loads((dst / INDEX_FILE).read_text())
    index["metadata"]["total_size"] += 1
    (dst / INDEX_FILE).write_text(json.dumps(index))
    write_records(dst, records_of(dst))
    assert [p.tensor for p in verify(dst, jobs=1).problems] == [INDEX_FILE]


def test_a_config_that_chooses_more_experts(own_store: MakeStore) -> None:
    src, dst = own_store()
    config = json.loads((dst / "config.json").read_text())
    config["num_experts_per_tok"] += 1
    (dst / "config.json").write_text(json.dumps(config))
    write_records(dst, records_of(dst))
    assert verify(dst, jobs=1).ok  # only the original knows
    found = verify(dst, against=src, jobs=1).problems
    assert [(p.kind, p.tensor) for p in found] == [("original", "config.json")]
    assert "num_experts_per_tok" in found[0].message


WRONG: list[Any] = [None, True, -1, 0.5, math.nan, math.inf, 10**400, "x", [], [[]], {}, {"a": []}]


def test_a_field_of_a_wrong_type_is_damage(shared_store: MakeStore) -> None:
    """Read, or refused as damaged: never another error."""
    for kind, options in (("gpt_oss", {"experts": {0, 2}}), ("deepseek_v3", {})):
        _, dst = shared_store(kind, **options)
        records = records_of(dst)
        for number in one_of_a_kind(records):
            for path, _ in leaves(records[number]):
                for wrong in WRONG:
                    lied = json.loads(json.dumps(records[number]))
                    put(lied, path, wrong)
                    with contextlib.suppress(CorruptionError):
                        from_line(json.dumps(lied).encode(), "here")
        settings = json.loads((dst / "config.json").read_text())["quantization_config"]
        for path, _ in leaves(settings):
            for wrong in WRONG:
                lied = json.loads(json.dumps(settings))
                put(lied, path, wrong)
                with contextlib.suppress(FormatError):
                    Settings.from_json(lied)
