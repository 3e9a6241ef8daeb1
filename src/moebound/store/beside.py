"""Everything beside a store's shards: index, certificates, plan, card, and what is copied."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from moebound.checkpoint import Checkpoint, TensorInfo, read_header, write_index
from moebound.checkpoint.shards import is_text
from moebound.errors import CheckpointError
from moebound.files.durable import disk_errors
from moebound.files.regular import regular_file
from moebound.plan import Plan
from moebound.store.card import model_card
from moebound.store.folder import write_synced
from moebound.store.format import (
    CARD_FILE,
    CERTIFICATES_FILE,
    CONFIG_FILE,
    ORIGINAL_CARD_FILE,
    OWN_PREFIX,
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

_DOCUMENTS = (".md", ".pdf", ".png", ".jpg")
_PIECE_BYTES = 8 << 20


def write_rest(
    folder: Path,
    checkpoint: Checkpoint,
    shards: list[str],
    settings: Settings,
    plan: Plan | None,
    *,
    copied: Mapping[str, Path],
    records: Iterable[bytes],
) -> None:
    """Everything beside the shards; config.json, without which nothing opens, last.

    copied: what `choose_files` chose. records: of the shards' contents, as lines. Raises StoreError
    if the disk refuses.
    """
    tensors = dict[str, TensorInfo]()
    for name in shards:
        tensors |= read_header(folder / name)[0]
    weight_map = {name: tensor.file.name for name, tensor in tensors.items()}
    write_index(folder, weight_map, sum(tensor.n_bytes for tensor in tensors.values()))
    config = {**checkpoint.config, "quantization_config": settings.to_json()}
    config_bytes = json_bytes(config)
    with disk_errors(folder):
        kept = list[Record](_copy_files(copied, folder))
        if plan is not None:
            kept.append(_write(folder, PLAN_FILE, [plan.to_bytes()]))
        kept += (_file_record(folder / name) for name in ("model.safetensors.index.json",))
        kept.append(
            FileRecord(CONFIG_FILE, len(config_bytes), hashlib.sha256(config_bytes).hexdigest())
        )
        kept += (ShardRecord(name, header_sha256(folder / name)) for name in shards)
        write_synced(
            folder / CERTIFICATES_FILE,
            certificates_bytes(chain(records, map(to_line, kept)), version=settings.version),
        )
        known = read_certificates(folder / CERTIFICATES_FILE)
        card = model_card(settings, tensors, known, plan)
        write_synced(folder / CARD_FILE, card.encode())
        write_synced(folder / CONFIG_FILE, config_bytes)


def choose_files(
    checkpoint: Checkpoint, shards: list[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """The source's other files, by their paths in the store (its card gets another name, since a
    store has its own); and those that are left out, with the reason.

    Decided before the first weight is compressed. Raises CheckpointError for a file that cannot be
    read.
    """
    chosen, left_out = dict[str, Path](), checkpoint.left_out
    own = {CERTIFICATES_FILE, PLAN_FILE, ORIGINAL_CARD_FILE, *shards}
    for file in checkpoint.files():
        name = file.relative_to(checkpoint.path).as_posix()
        if name in own or name.startswith(OWN_PREFIX):
            left_out[name] = "has a name that the store needs for itself"
            continue
        if not os.access(file, os.R_OK):
            raise CheckpointError(f"{file}: cannot be read: permission denied")
        chosen[ORIGINAL_CARD_FILE if name == CARD_FILE else name] = file
    return chosen, dict(sorted(left_out.items()))


def is_document(name: str) -> bool:
    """Whether a file is for people, who may edit it, so that no record keeps its hash."""
    return name.lower().endswith(_DOCUMENTS)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as it is written. What is no text (halves of surrogate pairs) stays escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if not is_text(text):
        text = json.dumps(document, indent=2)
    return text.encode() + b"\n"


def _copy_files(copied: Mapping[str, Path], folder: Path) -> Iterable[FileRecord]:
    for name, file in sorted(copied.items(), key=lambda item: item[1]):
        record = _write(folder, name, read_pieces(file))
        if not is_document(name):
            yield record


def read_pieces(file: Path) -> Iterator[bytes]:
    """A file's bytes, some megabytes at a time. Raises OSError."""
    with regular_file(file) as (fd, _):
        while piece := os.read(fd, _PIECE_BYTES):
            yield piece


def _write(folder: Path, name: str, pieces: Iterable[bytes]) -> FileRecord:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    digest = write_synced(path, pieces)
    return FileRecord(name, path.stat().st_size, digest)


def _file_record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())
