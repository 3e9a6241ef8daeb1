"""From a store back to an ordinary checkpoint, which needs moebound no more.

The tensors get their old names, dtypes, shapes and shards; those of experts have the decoded
values. One output shard at a time, matrices decoded in parallel and written in order.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moebound.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardWriter,
    TensorInfo,
    TensorSpec,
    read_chunks,
    write_index,
)
from moebound.codec import thread_count
from moebound.errors import CorruptionError, StoreError
from moebound.files.durable import disk_errors
from moebound.jobs.ordered import in_order
from moebound.store.beside import json_bytes, read_pieces
from moebound.store.checks import (
    check_files,
    check_hash,
    check_inside,
    check_parts,
    hashes_are_checked,
)
from moebound.store.folder import WorkFolder, check_apart, write_synced
from moebound.store.format import (
    CARD_FILE,
    CERTIFICATES_FILE,
    CONFIG_FILE,
    ORIGINAL_CARD_FILE,
    PLAN_FILE,
)
from moebound.store.reader import Store, StoredMatrix, open_store
from moebound.store.stored import StoredTensor
from moebound.store.summary import DecompressSummary, Meter, ProgressCallback
from moebound.types import Array

_EXPERTS_BIAS = re.compile(r"\.experts\..*bias$")


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: kept as it is, or decoded from one matrix or from all slices, or of no
    expert and coded. kept: with its certified SHA-256."""

    spec: TensorSpec
    kept: tuple[TensorInfo, str] | None
    matrices: tuple[StoredMatrix | StoredTensor, ...]


def decompress(
    store_path: Path | str,
    out: Path | str,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> DecompressSummary:
    """Write an ordinary checkpoint with the decoded weights to `out`.

    overwrite: replace a checkpoint that is at out, once the new one is whole. jobs: as for
    `compress`; memory is that of jobs + 1 matrices, encoded and decoded.

    Guarantee: out appears whole, or not at all. Raises StoreError (place, disk) and what
    `open_store` and `StoredMatrix.decode` raise.
    """
    begun, out = time.monotonic(), Path(out)
    store = open_store(store_path)
    jobs = thread_count() if jobs is None else jobs
    check_apart(out, store.path)
    _check_free(out, overwrite)
    check_plain(store)
    check_parts(store)
    if hashes_are_checked():
        check_files(store)
    shards = _plan(store)
    tensors = [tensor for shard in shards.values() for tensor in shard]
    meter = Meter(
        progress,
        total_bytes=sum(tensor.spec.n_bytes for tensor in tensors),
        total_experts=len(store.experts()),
    )
    # An expert is done when the last of its matrices is.
    left = {m.tensor.name: e.key for e in store.experts() for m in e.matrices}
    with WorkFolder(out) as work:
        work.start_over({"decompress": str(store.settings.run)})
        counts: dict[object, int] = defaultdict(int)
        for key in left.values():
            counts[key] += 1

        def done(matrix: StoredMatrix | StoredTensor, n_bytes: int) -> None:
            key = left.get(matrix.tensor.name)
            if key is None:
                meter.add(matrix.tensor.name, n_bytes=n_bytes)
                return
            counts[key] -= 1
            meter.add(str(key), n_bytes=n_bytes, experts=int(counts[key] == 0))

        for name, shard in shards.items():
            _write_shard(work.path / name, shard, meter, done, jobs)
        _write_rest(store, work.path, shards)
        work.seal()
        work.publish()
    return DecompressSummary(
        path=str(out),
        n_experts=len(store.experts()),
        n_tensors=len(tensors),
        n_shards=len(shards),
        n_bytes=sum(tensor.spec.n_bytes for tensor in tensors),
        seconds=time.monotonic() - begun,
    )


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise StoreError(f"{out}: expected a free name or an empty folder, found a file or link")
    with disk_errors(out, "cannot be read"):
        if not out.exists() or not any(out.iterdir()):
            return
    if not overwrite:
        raise StoreError(f"{out}: exists and is not empty; choose another folder, or overwrite it")
    weights = (out / SINGLE_FILE).is_file() or (out / INDEX_FILE).is_file()
    if not weights or not (out / CONFIG_FILE).is_file():
        raise StoreError(f"{out}: only a checkpoint is overwritten, and this folder is none")


def check_plain(store: Store) -> None:
    """Raises StoreError for routing that an ordinary checkpoint cannot have. An alias it can: both
    experts have the same weights."""
    for layer, edit in store.router_edits().items():
        if edit.keep is not None or edit.constants:
            raise StoreError(
                f"{store.path}: layer {layer}: its router is edited (experts that are never "
                "chosen, or put out a constant), which no ordinary checkpoint can say; load the "
                "store itself"
            )
        if edit.alias and any(_EXPERTS_BIAS.search(name) for name in store.tensors):
            raise StoreError(
                f"{store.path}: layer {layer}: experts stand for others, and have biases, which an "
                "ordinary checkpoint would have of each; load the store itself"
            )


def _plan(store: Store) -> dict[str, list[_Tensor]]:
    """Output shard -> its tensors, in the order in which they are written."""
    shards: dict[str, list[_Tensor]] = defaultdict(list)
    for name, record in store.kept.items():
        tensor = store.tensors[name]
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        shards[record.home].append(_Tensor(spec, (tensor, record.sha256), ()))
    for name, stored in store.coded.items():
        certificate = stored.record.certificate
        spec = TensorSpec(name, certificate.dtype, certificate.shape)
        shards[stored.record.home].append(_Tensor(spec, None, (stored,)))
    by_name: dict[str, list[StoredMatrix]] = defaultdict(list)
    for expert in store.experts():
        for matrix in expert.matrices:
            by_name[matrix.record.name].append(matrix)
    for name, matrices in by_name.items():
        matrices.sort(key=lambda matrix: matrix.record.index or 0)
        first = matrices[0].record
        shape = first.certificate.shape
        if first.index is not None:
            shape = (len(matrices), *shape)
        elif len(matrices) > 1:
            raise CorruptionError(f"{store.path}: tensor {name!r} is certified twice")
        spec = TensorSpec(name, first.certificate.dtype, shape)
        shards[first.home].append(_Tensor(spec, None, tuple(matrices)))
    return dict(sorted(shards.items()))


def _write_shard(
    path: Path,
    tensors: list[_Tensor],
    meter: Meter,
    done: Callable[[StoredMatrix | StoredTensor, int], None],
    jobs: int,
) -> None:
    matrices = [(t.spec.name, matrix) for t in tensors for matrix in t.matrices]
    with ShardWriter(path, [tensor.spec for tensor in tensors]) as out:
        for tensor in tensors:
            if tensor.kept is not None:
                kept, certified = tensor.kept
                digest = hashlib.sha256()
                for piece in read_chunks(kept):
                    digest.update(piece)
                    out.write(tensor.spec.name, piece)
                check_hash(kept, certified, digest.hexdigest())
                meter.add(tensor.spec.name, n_bytes=tensor.spec.n_bytes)
        decode = partial(_decode, jobs)
        with closing(in_order(decode, [m for _, m in matrices], jobs=jobs)) as decoded:
            for (name, matrix), array in zip(matrices, decoded, strict=True):
                out.write(name, array.reshape(-1).view("u1").data)
                done(matrix, array.nbytes)


def _decode(jobs: int, matrix: StoredMatrix | StoredTensor) -> Array:
    return matrix.decode(matrix.read(), threads=1 if jobs > 1 else None)


def _write_rest(store: Store, folder: Path, shards: dict[str, list[_Tensor]]) -> None:
    ours = {CERTIFICATES_FILE, CONFIG_FILE, INDEX_FILE, SINGLE_FILE, PLAN_FILE, CARD_FILE}
    with disk_errors(folder):
        for file in sorted(store.path.iterdir()):
            if file.name not in ours and file.suffix != ".safetensors" and not file.is_dir():
                name = CARD_FILE if file.name == ORIGINAL_CARD_FILE else file.name
                _copy(store, file, folder / name)
        for record in store.files:  # in a folder, or weights that no index names
            if ("/" in record.name or record.name.endswith(".safetensors")) and (
                record.name not in shards
            ):
                (folder / record.name).parent.mkdir(exist_ok=True)
                _copy(store, store.path / record.name, folder / record.name)
    if list(shards) != [SINGLE_FILE]:
        weight_map = {t.spec.name: name for name, shard in shards.items() for t in shard}
        total = sum(tensor.spec.n_bytes for shard in shards.values() for tensor in shard)
        write_index(folder, weight_map, total)
    config = {k: v for k, v in store.config.items() if k != "quantization_config"}
    with disk_errors(folder):
        write_synced(folder / CONFIG_FILE, json_bytes(config))


def _copy(store: Store, file: Path, to: Path) -> None:
    """A file beside the shards, in pieces. Nothing from outside the store is copied."""
    check_inside(store.path, file)
    write_synced(to, read_pieces(file))
