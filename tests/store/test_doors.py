"""docs/checks.md is true: every damage of its table is done to a store, and every door is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moebound
from moebound.errors import CheckpointError, MoeboundError, StoreError
from moebound.store import decompress, open_store, verify

from .conftest import MakeSource, MakeStore, run
from .test_lies import claim_all, exchange, records_of, seal, write_records
from .test_reader import CERTIFICATES, last_shard
from .test_verify import flip

DOCS = Path(__file__).parents[2] / "docs" / "checks.md"


def table() -> tuple[list[str], dict[str, list[str]]]:
    lines = DOCS.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| damage"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


COLUMNS, ROWS = table()


def load_and_run(dst: Path) -> None:
    with moebound.load(dst, ram_budget="100%", dtype="float32") as loaded:
        loaded.model(torch.arange(40).reshape(1, -1))


def from_pretrained(dst: Path) -> None:
    AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)


def judge(dst: Path, against: Path | None = None) -> None:
    report = verify(dst, against=against, jobs=1)
    if not report.ok:
        raise StoreError(str(report.problems[0]))


Door = Callable[[Path, Path, Path], object]
DOORS: dict[str, list[Door]] = {
    "inspect": [lambda dst, src, out: open_store(dst)],
    "load, from_pretrained": [
        lambda dst, src, out: load_and_run(dst), lambda dst, src, out: from_pretrained(dst),
    ],
    "decompress": [lambda dst, src, out: decompress(dst, out, jobs=1)],
    "verify": [lambda dst, src, out: judge(dst)],
    "verify --against": [lambda dst, src, out: judge(dst, src)],
}  # fmt: skip


def exchange_bytes(dst: Path) -> None:
    experts = open_store(dst).experts()
    first = experts[0].matrices[0].tensor
    second = next(
        t for t in (m.tensor for e in experts[1:] for m in e.matrices) if t.n_bytes == first.n_bytes
    )
    with open(first.file, "r+b") as one, open(second.file, "r+b") as two:
        one.seek(first.offset)
        two.seek(second.offset)
        a, b = one.read(first.n_bytes), two.read(second.n_bytes)
        one.seek(first.offset)
        two.seek(second.offset)
        one.write(b)
        two.write(a)


def flip_kept(dst: Path) -> None:
    store = open_store(dst)
    tensor = store.tensors[next(name for name in store.kept if "norm" in name)]
    flip(tensor.file, tensor.offset + 1)


def change_config(dst: Path, *, sealed: bool = False) -> None:
    config = json.loads((dst / "config.json").read_text())
    config["num_experts_per_tok"] -= 1
    (dst / "config.json").write_text(json.dumps(config))
    if sealed:
        write_records(dst, records_of(dst))


def change_records(dst: Path, change: Callable[..., None]) -> None:
    records = records_of(dst)
    change(records)
    seal(dst, records)


def claim_less(dst: Path) -> None:
    config, records = json.loads((dst / "config.json").read_text()), records_of(dst)
    config["quantization_config"]["bound"]["value"] /= 4
    (dst / "config.json").write_text(json.dumps(config))
    claim_all(
        records,
        lambda m: m["certificate"]["bound"].update(value=m["certificate"]["bound"]["value"] / 4),
    )
    write_records(dst, records)


def cut(dst: Path) -> None:
    data = (dst / CERTIFICATES).read_bytes()
    (dst / CERTIFICATES).write_bytes(data[: len(data) // 2])


def link_to_device(dst: Path) -> None:
    (dst / "tokenizer.json").unlink()
    os.symlink("/dev/zero", dst / "tokenizer.json")


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a shard is missing": lambda dst, other: (dst / last_shard(dst)).unlink(),
    "unfinished work of a killed run": lambda dst, other: (
        dst / "moebound.journal.json"
    ).write_text("{}"),
    "certificates cut in half": lambda dst, other: cut(dst),
    "a shard of another store": lambda dst, other: (dst / last_shard(dst)).write_bytes(
        (other / last_shard(dst)).read_bytes()
    ),
    "config.json changed": lambda dst, other: change_config(dst),
    "two records exchange their experts": lambda dst, other: change_records(
        dst, exchange("expert")
    ),
    "two matrices exchange their bytes": lambda dst, other: exchange_bytes(dst),
    "a flipped bit in a kept tensor": lambda dst, other: flip_kept(dst),
    "a file beside the shards changed": lambda dst, other: (dst / "tokenizer.json").write_text(
        '{"model": []}'
    ),
    "a file beside the shards is a link to a device": lambda dst, other: link_to_device(dst),
    "a file without a record": lambda dst, other: (dst / "extra.json").write_text("{}"),
    "a ratio that is not the certificate's": lambda dst, other: change_records(
        dst, lambda records: claim_all(records, lambda m: m.update(ratio=0.001))
    ),
    "another top-k, sealed again": lambda dst, other: change_config(dst, sealed=True),
    "a smaller bound everywhere, sealed again": lambda dst, other: claim_less(dst),
}  # fmt: skip


def test_the_table_has_every_damage_and_every_door() -> None:
    assert list(ROWS) == list(DAMAGES)
    assert list(DOORS) == COLUMNS
    assert {cell for row in ROWS.values() for cell in row} == {"refuses", "-"}


@pytest.fixture(scope="session")
def other_store(source: MakeSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same model, under another bound."""
    dst = tmp_path_factory.mktemp("other") / "dst"
    run(source("qwen3_moe"), dst, bound=moebound.ErrorBound(0.5, "rate", "expert"))
    return dst


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_doors(damage: str, own_store: MakeStore, other_store: Path, tmp_path: Path) -> None:
    # Exchanged bytes have to be of one length, which the codec `raw` gives.
    options = {"codec": "raw"} if "their bytes" in damage else {}
    src, dst = own_store("qwen3_moe", **options)
    DAMAGES[damage](dst, other_store)
    for column, expected in zip(COLUMNS, ROWS[damage], strict=True):
        for door in DOORS[column]:
            if expected == "refuses":
                with pytest.raises(MoeboundError):
                    door(dst, src, tmp_path / "out")
                assert column != "decompress" or not (tmp_path / "out").exists()
            else:
                door(dst, src, tmp_path / "out")


def test_unchecked_loading_says_so(own_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, dst = own_store("qwen3_moe")
    flip_kept(dst)
    monkeypatch.setenv("MOEBOUND_CHECK", "0")
    with pytest.warns(RuntimeWarning, match="not compared"):
        from_pretrained(dst)
    monkeypatch.setenv("MOEBOUND_CHECK", "maybe")
    with pytest.raises(StoreError, match="MOEBOUND_CHECK"):
        open_store(dst)


def test_a_pipe_as_a_shard_or_as_certificates(own_store: MakeStore) -> None:
    _, dst = own_store("qwen3_moe")
    for name in (CERTIFICATES, last_shard(dst)):
        data = (dst / name).read_bytes()
        (dst / name).unlink()
        os.mkfifo(dst / name)
        with pytest.raises((StoreError, CheckpointError)):
            open_store(dst)
        (dst / name).unlink()
        (dst / name).write_bytes(data)
    open_store(dst)


def test_links_are_copied_from_a_hubs_cache_only(own_store: MakeStore, tmp_path: Path) -> None:
    _, dst = own_store("qwen3_moe")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in dst.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    decompress(snapshot, tmp_path / "good", jobs=1)
    from_pretrained(snapshot)
    secret = tmp_path / "secret.md"
    secret.write_text("not the store's")
    (dst / "secret.md").symlink_to(secret)
    with pytest.raises(StoreError, match="a link out of the store"):
        decompress(dst, tmp_path / "bad", jobs=1)
    assert not (tmp_path / "bad").exists()


def test_a_sparse_file_is_not_read_whole(own_store: MakeStore) -> None:
    _, dst = own_store("qwen3_moe")
    with open(dst / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 40)
    assert [p.tensor for p in verify(dst, jobs=1).problems] == ["tokenizer.json"]
