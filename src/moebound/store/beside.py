"""Everything beside a store's shards: index, certificates, plan, card, and what is copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from moebound.checkpoint import Checkpoint, read_header, write_index
from moebound.files.durable import disk_errors
from moebound.plan import Plan
from moebound.store.card import model_card
from moebound.store.folder import write_synced
from moebound.store.format import (
    CARD_FILE,
    CERTIFICATES_FILE,
    CONFIG_FILE,
    ORIGINAL_CARD_FILE,
    PLAN_FILE,
    FileRecord,
    Record,
    Settings,
    ShardRecord,
    certificates_bytes,
    read_certificates,
    to_line,
)
from moebound.store.shard import header_sha256
from moebound.store.summary import ExpertTotals

_DOCUMENTS = (".md", ".pdf", ".png", ".jpg")  # for people, who edit them


def write_rest(
    folder: Path,
    checkpoint: Checkpoint,
    shards: list[str],
    settings: Settings,
    plan: Plan | None,
    *,
    records: Iterable[bytes],
) -> None:
    """Everything beside the shards; config.json, without which nothing opens, last.

    records: of the shards' contents, as lines. Raises StoreError if the disk refuses.
    """
    weight_map, total = dict[str, str](), 0
    for name in shards:
        for tensor in read_header(folder / name)[0].values():
            weight_map[tensor.name] = name
            total += tensor.n_bytes
    write_index(folder, weight_map, total)
    config = {**checkpoint.config, "quantization_config": settings.to_json()}
    config_bytes = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    with disk_errors(folder):
        kept = list[Record](_copy_files(checkpoint, folder, shards))
        if plan is not None:
            kept.append(_write(folder / PLAN_FILE, plan.to_bytes()))
        kept += (_file_record(folder / name) for name in ("model.safetensors.index.json",))
        kept.append(
            FileRecord(CONFIG_FILE, len(config_bytes), hashlib.sha256(config_bytes).hexdigest())
        )
        kept += (ShardRecord(name, header_sha256(folder / name)) for name in shards)
        write_synced(
            folder / CERTIFICATES_FILE, certificates_bytes(chain(records, map(to_line, kept)))
        )
        totals = ExpertTotals.of(read_certificates(folder / CERTIFICATES_FILE))
        card = model_card(settings, totals, plan)
        write_synced(folder / CARD_FILE, card.encode())
        write_synced(folder / CONFIG_FILE, config_bytes)


def _copy_files(checkpoint: Checkpoint, folder: Path, shards: list[str]) -> Iterable[FileRecord]:
    """The source's other files; its card under another name, since a store has its own."""
    own = {CERTIFICATES_FILE, PLAN_FILE, ORIGINAL_CARD_FILE, *shards}
    for file in checkpoint.files():
        if file.name in own:
            continue
        name = ORIGINAL_CARD_FILE if file.name == CARD_FILE else file.name
        record = _write(folder / name, file.read_bytes())
        if not name.lower().endswith(_DOCUMENTS):
            yield record


def _write(path: Path, data: bytes) -> FileRecord:
    return FileRecord(path.name, len(data), write_synced(path, data))


def _file_record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())
