"""What every door of a store checks, because it is cheap: names, places, hashes of what is read.

docs/checks.md has the table. Certificates say the hash of everything; whoever reads bytes to use
them compares. `MOEBOUND_CHECK=0` turns the comparing of hashes off, and a warning says so.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from moebound.checkpoint import INDEX_FILE, TensorInfo, find_family, read_into
from moebound.checkpoint.families import ROLE_ORDER, Family
from moebound.codec import thread_count
from moebound.codec.certificate import sha256
from moebound.errors import CorruptionError, MoeboundError, StoreError
from moebound.files.regular import regular_file
from moebound.jobs.ordered import in_order
from moebound.store.format import (
    CONFIG_FILE,
    OWN_PREFIX,
    CodedRecord,
    ExpertRecord,
    FileRecord,
    Record,
    ShardRecord,
)
from moebound.store.shard import header_sha256
from moebound.store.summary import Problem


class Store(Protocol):
    """What is looked at of a `reader.Store`."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def shards(self) -> tuple[ShardRecord, ...]: ...
    @property
    def files(self) -> tuple[FileRecord, ...]: ...
    def records(self) -> Iterator[Record]: ...
    def hashes(self) -> dict[str, str]: ...


CHECK_VARIABLE = "MOEBOUND_CHECK"
_PIECE_BYTES = 4 << 20


def hashes_are_checked() -> bool:
    """Whether loaders compare hashes. Where not, a warning says so."""
    value = os.environ.get(CHECK_VARIABLE, "1")
    if value not in ("0", "1"):
        raise StoreError(f"{CHECK_VARIABLE}={value!r}: expected 0 or 1")
    if value == "0":
        warnings.warn(
            f"moebound: {CHECK_VARIABLE}=0: hashes of stores are not compared; damage and "
            "exchanged bytes may go unseen",
            RuntimeWarning,
            stacklevel=2,
        )
    return value == "1"


def surface_problems(store: Store) -> Iterator[Problem]:
    """What headers, records and config say otherwise than each other: names against layers,
    experts and roles, and the hashes of what opening reads."""
    shards = {tensor.file.name for tensor in store.tensors.values()}
    recorded = {shard.name for shard in store.shards}
    for name in sorted(shards ^ recorded):
        what = "has no record" if name in shards else "has a record, and no tensor is in it"
        yield Problem("file", name, what)
    for shard in store.shards:
        try:
            found = header_sha256(store.path / shard.name)
        except StoreError as error:
            yield Problem("file", shard.name, str(error))
            continue
        if found != shard.sha256:
            yield Problem("file", shard.name, f"header: {differs(shard.sha256, found)}")
    files = {file.name: file for file in store.files}
    for name in (CONFIG_FILE, INDEX_FILE):
        if name in files:
            yield from file_problems(store.path, files[name])
        elif name == CONFIG_FILE or (store.path / name).exists():
            yield Problem("file", name, "has no record")
    try:
        family = find_family(store.config)
    except MoeboundError as error:
        yield Problem("certificate", CONFIG_FILE, str(error))
        return
    for record in store.records():
        if isinstance(record, ExpertRecord):
            yield from _misnamed(record, family)
        elif isinstance(record, CodedRecord) and family.match(record.name) is not None:
            message = "is named as a routed expert is, and certified as of no expert"
            yield Problem("certificate", record.name, message)


def _misnamed(record: ExpertRecord, family: Family) -> Iterator[Problem]:
    """Do the tensors' names say that they are this expert's, in these roles?"""
    key = record.key
    for matrix in record.matrices:
        match = family.match(matrix.name, shared=key.shared)
        if match is None:
            what = f"is named as no {'shared ' if key.shared else ''}expert of this model is"
            yield Problem("certificate", matrix.stored_name, f"{what}; certified as {key}")
            continue
        # A shared expert has no number in its name; it may be a slice.
        expert = matrix.index if match.expert is None else match.expert
        named = match.layer, expert or 0, match.role
        certified = key.layer, key.expert, matrix.role
        sliced = matrix.index is not None
        if named != certified or (not key.shared and sliced != match.layout.fused):
            yield Problem(
                "certificate",
                matrix.stored_name,
                f"is by its name layer {named[0]} expert {named[1]} {named[2]}, certified as "
                f"layer {certified[0]} expert {certified[1]} {certified[2]}",
            )
    roles = [matrix.role for matrix in record.matrices]
    expected = [role for role in ROLE_ORDER if role in roles]
    if frozenset(roles) not in family.roles or roles != expected:
        message = f"{key} has the matrices {', '.join(roles)}"
        yield Problem("certificate", record.matrices[0].stored_name, message)


def check_surface(store: Store) -> None:
    """Raises CorruptionError for the first of `surface_problems`."""
    for problem in surface_problems(store):
        raise CorruptionError(
            f"{store.path}: {problem.tensor}: {problem.message}. Something was changed since this "
            "store was written; `moebound verify` lists all that is wrong"
        )


def file_problems(folder: Path, record: FileRecord) -> Iterator[Problem]:
    """Is this file what was written? Its size is looked at first, and it is read in pieces."""
    digest, path = hashlib.sha256(), folder / record.name
    try:
        with regular_file(path) as (fd, size):
            if size != record.n_bytes:
                message = f"expected {record.n_bytes} bytes, found {size}"
                yield Problem("file", record.name, message)
                return
            while piece := os.read(fd, _PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        yield Problem("file", record.name, f"cannot be read: {error.strerror or error}")
        return
    if (found := digest.hexdigest()) != record.sha256:
        yield Problem("file", record.name, differs(record.sha256, found))


def check_files(store: Store) -> None:
    """The files beside the shards. Of a hub's cache, from which a loader takes only what it needs,
    those that are there. Raises StoreError for one that is missing, CorruptionError for one that
    is not what was written."""
    for record in store.files:
        if not os.path.lexists(store.path / record.name):
            if hub_blobs(store.path) is not None:
                continue
            raise StoreError(
                f"{store.path / record.name}: missing; the store is not whole, copy or download it "
                "again"
            )
        for problem in file_problems(store.path, record):
            raise CorruptionError(
                f"{store.path / record.name}: {problem.message}. It was changed since the store "
                f"was written; restore it, or set {CHECK_VARIABLE}=0 to load without checks"
            )


def check_read(store: Store, *, unread: Collection[str] = ()) -> None:
    """Read all tensors but those in `unread` and compare their hashes; then the files beside.

    Raises CorruptionError, naming file and tensor, and as `check_files`."""
    certified = store.hashes()

    def check(name: str) -> None:
        check_tensor(store.tensors[name], certified[name])

    wanted = [name for name in certified if name not in unread]
    with closing(in_order(check, wanted, jobs=thread_count())) as checked:
        for _ in checked:
            pass
    check_files(store)


def check_parts(store: Store) -> None:
    """Shared parts and router edits: few bytes, and many experts need them. As `check_read`."""
    certified = store.hashes()
    for name in certified:
        if name.startswith(OWN_PREFIX):
            check_tensor(store.tensors[name], certified[name])


def check_hash(tensor: TensorInfo, expected: str, found: str) -> None:
    """Raises CorruptionError, naming file and tensor."""
    if found != expected:
        raise CorruptionError(
            f"{tensor.file}: tensor {tensor.name!r}: {differs(expected, found)}: it is damaged, "
            "or not the one that was written here"
        )


def check_tensor(tensor: TensorInfo, expected: str) -> None:
    """Read a tensor in pieces and compare. Raises as `check_hash` and `read_into`."""
    if os.environ.get(CHECK_VARIABLE) == "0":  # who opened the store has said so
        return
    check_hash(tensor, expected, tensor_sha256(tensor))


def check_bytes(tensor: TensorInfo, expected: str, data: Any) -> None:
    """As `check_tensor`, of bytes that have been read."""
    if os.environ.get(CHECK_VARIABLE) == "0":
        return
    check_hash(tensor, expected, sha256(data))


def tensor_sha256(tensor: TensorInfo) -> str:
    """Of a tensor's bytes, with some megabytes of them in memory at a time."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_PIECE_BYTES, tensor.n_bytes)))
    for start in range(0, tensor.n_bytes, _PIECE_BYTES):
        piece = buffer[: tensor.n_bytes - start]
        read_into(tensor, piece, start=start)
        digest.update(piece)
    return digest.hexdigest()


def hub_blobs(folder: Path) -> Path | None:
    """Where the files of a snapshot in a Hugging Face cache really are, which are links there; None
    for any other folder."""
    for above in folder.absolute().parents:
        if above.name == "snapshots" and (above.parent / "blobs").is_dir():
            return (above.parent / "blobs").resolve()
    return None


def check_inside(folder: Path, file: Path) -> None:
    """Raises StoreError for a link that leads out of the folder, unless it is a snapshot in a hub's
    cache and leads to the cache's own files."""
    target, homes = file.resolve(), [folder.resolve(), hub_blobs(folder)]
    if not any(home is not None and home in target.parents for home in homes):
        raise StoreError(f"{file}: a link out of the store's folder, to {target}; it is not copied")


def differs(expected: str, found: str) -> str:
    return f"expected SHA-256 {expected[:16]}…, found {found[:16]}…"
