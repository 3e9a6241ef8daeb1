"""Read a store: which experts it has, one read per expert, and what was promised for each.

Opening reads headers and certificates only, and checks that they agree: every compressed tensor
has a certificate, every certificate a tensor, and the matrices of an expert stand together.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moebound.checkpoint import Role, TensorInfo, read_header, read_into, read_tensors
from moebound.checkpoint.shards import read_json
from moebound.codec import Envelope, decode_array, decode_into, parse
from moebound.codec.arrays import ArrayLike, writable_view
from moebound.errors import CorruptionError, FormatError, StoreError
from moebound.store.folder import JOURNAL_FILE
from moebound.store.format import (
    CERTIFICATES_FILE,
    CONFIG_FILE,
    SHARD_MARK,
    ExpertRecord,
    FileRecord,
    MatrixRecord,
    Settings,
    ShardRecord,
    TensorRecord,
    read_certificates,
    read_settings,
)
from moebound.types import Array, ExpertKey


@dataclass(frozen=True)
class StoredMatrix:
    """One compressed matrix: where its envelope is, and its record with the certificate."""

    tensor: TensorInfo
    record: MatrixRecord

    def decode(self, data: memoryview, *, threads: int | None = None) -> Array:
        """The weights, [rows, cols], from this matrix's bytes.

        Raises FormatError or CorruptionError, naming file and tensor, for bytes that are damaged
        or hold another shape or dtype than certified.
        """
        with self._named():
            return decode_array(self._parse(data), threads=threads)

    def decode_into(self, data: memoryview, out: ArrayLike, *, threads: int | None = None) -> None:
        """As `decode`, into a contiguous array or tensor of that shape and dtype."""
        with self._named():
            envelope = self._parse(data)
            view = writable_view(out, envelope.spec.shape, envelope.spec.dtype)
            decode_into(envelope, view, threads=threads)

    def _parse(self, data: memoryview) -> Envelope:
        certificate = self.record.certificate
        envelope = parse(data)
        found = envelope.spec.shape, envelope.spec.dtype
        if found != (certificate.shape, certificate.dtype):
            raise CorruptionError(
                f"expected shape {certificate.shape} of {certificate.dtype}, found {found[0]} "
                f"of {found[1]}"
            )
        return envelope

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except FormatError as error:
            where = f"{self.tensor.file}: tensor {self.tensor.name!r}"
            raise type(error)(f"{where}: {error}") from error


@dataclass(frozen=True)
class StoredExpert:
    """One expert: n_bytes from `offset` of one file are all its envelopes, in matrix order.

    exact: kept bit for bit instead of under the store's bound.
    """

    key: ExpertKey
    exact: bool
    file: Path
    offset: int
    n_bytes: int
    matrices: tuple[StoredMatrix, ...]

    @property
    def n_weights(self) -> int:
        return sum(m.record.certificate.shape[0] * m.record.certificate.shape[1]
                   for m in self.matrices)  # fmt: skip


@dataclass(frozen=True)
class EncodedExpert:
    """An expert's bytes as read, still compressed. `data` is one buffer for all matrices."""

    stored: StoredExpert
    data: memoryview

    def matrix(self, index: int) -> memoryview:
        """The envelope of matrix `index`, a view."""
        tensor = self.stored.matrices[index].tensor
        start = tensor.offset - self.stored.offset
        return self.data[start : start + tensor.n_bytes]

    def decode(self, *, threads: int | None = None) -> dict[Role, Array]:
        """The weights by role. Raises as `StoredMatrix.decode`."""
        return {
            stored.record.role: stored.decode(self.matrix(index), threads=threads)
            for index, stored in enumerate(self.stored.matrices)
        }


@dataclass(frozen=True)
class Store:
    """A store's contents, by name; no weights are in memory.

    tensors: every tensor of the shards. kept: those that are as they were, with their hashes.
    """

    path: Path
    config: Mapping[str, Any]
    settings: Settings
    tensors: Mapping[str, TensorInfo]
    kept: Mapping[str, TensorRecord]
    shards: tuple[ShardRecord, ...]
    files: tuple[FileRecord, ...]
    _experts: Mapping[ExpertKey, StoredExpert]

    def experts(self) -> list[StoredExpert]:
        """The experts, in the order of the model."""
        return list(self._experts.values())

    def expert(self, key: ExpertKey) -> StoredExpert:
        """Raises KeyError if the store has no such expert."""
        return self._experts[key]

    def read_expert(self, key: ExpertKey) -> EncodedExpert:
        """An expert's compressed bytes, by one positional read. Safe from any thread.

        Raises KeyError for no such expert, CheckpointError or CorruptionError if the file is gone
        or has become shorter.
        """
        return read_stored(self._experts[key])

    def decode_expert(self, key: ExpertKey, *, threads: int | None = None) -> dict[Role, Array]:
        """Read and decode one expert: role -> [rows, cols]. Raises as read_expert and decode."""
        return self.read_expert(key).decode(threads=threads)


def read_stored(stored: StoredExpert) -> EncodedExpert:
    """As `Store.read_expert`."""
    buffer = memoryview(bytearray(stored.n_bytes))
    span = TensorInfo(
        str(stored.key), "U8", (stored.n_bytes,), stored.file, stored.offset, stored.n_bytes
    )
    read_into(span, buffer)
    return EncodedExpert(stored, buffer)


def open_store(path: Path | str) -> Store:
    """Open a store. Reads headers and certificates, and checks one against the other.

    Raises StoreError if this is no store or not a finished one, CheckpointError if a shard is
    missing or named by a path, FormatError for a newer version, CorruptionError if it contradicts
    itself.
    """
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"{path}: no such folder")
    if (path / JOURNAL_FILE).exists():
        raise StoreError(f"{path}: unfinished work of a killed run; run the same command again")
    if not (path / CONFIG_FILE).is_file():
        raise StoreError(f"{path}: no {CONFIG_FILE}; this is no store")
    config = read_json(path / CONFIG_FILE)
    settings = read_settings(config)
    if settings is None:
        raise StoreError(
            f"{path}: {CONFIG_FILE} has no quantization_config of moebound; this is no store"
        )
    tensors = read_tensors(path)
    records = read_certificates(path / CERTIFICATES_FILE)
    kept = {r.name: r for r in records if isinstance(r, TensorRecord)}
    experts = _place(path, tensors, [r for r in records if isinstance(r, ExpertRecord)])
    _check_complete(path, tensors, kept, experts)
    return Store(
        path,
        MappingProxyType(config),
        settings,
        MappingProxyType(tensors),
        MappingProxyType(kept),
        tuple(r for r in records if isinstance(r, ShardRecord)),
        tuple(r for r in records if isinstance(r, FileRecord)),
        MappingProxyType(experts),
    )


def _place(
    path: Path, tensors: Mapping[str, TensorInfo], records: list[ExpertRecord]
) -> dict[ExpertKey, StoredExpert]:
    experts = dict[ExpertKey, StoredExpert]()
    for record in sorted(records, key=lambda record: record.key):
        where = f"{path}: {record.key}"
        if record.key in experts:
            raise CorruptionError(f"{where}: certified twice")
        matrices = []
        for matrix in record.matrices:
            tensor = tensors.get(matrix.stored_name)
            if tensor is None:
                raise CorruptionError(f"{where}: tensor {matrix.stored_name!r} is in no shard")
            certified = matrix.certificate.n_bytes
            if tensor.dtype != "U8" or tensor.shape != (certified,):
                raise CorruptionError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected {certified} bytes of U8, "
                    f"found {tensor.dtype} {list(tensor.shape)}"
                )
            if len(matrix.certificate.shape) != 2:
                raise CorruptionError(f"{where}: {matrix.stored_name!r} is no matrix")
            matrices.append(StoredMatrix(tensor, matrix))
        first, at = matrices[0].tensor, matrices[0].tensor.offset
        for stored in matrices:
            if stored.tensor.file != first.file or stored.tensor.offset != at:
                raise CorruptionError(
                    f"{where}: tensor {stored.tensor.name!r} does not stand right behind the "
                    "expert's others"
                )
            at += stored.tensor.n_bytes
        experts[record.key] = StoredExpert(
            record.key, record.exact, first.file, first.offset, at - first.offset, tuple(matrices)
        )
    return experts


def _check_complete(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    kept: Mapping[str, TensorRecord],
    experts: Mapping[ExpertKey, StoredExpert],
) -> None:
    slices: dict[str, list[MatrixRecord]] = defaultdict(list)
    named = set(kept)
    for expert in experts.values():
        for matrix in expert.matrices:
            named.add(matrix.tensor.name)
            if matrix.record.index is not None:
                slices[matrix.record.name].append(matrix.record)
    for name, records in slices.items():
        named.add(name)
        if name not in tensors or tensors[name].n_bytes:
            raise CorruptionError(f"{path}: tensor {name!r}: expected an empty stand-in")
        if sorted(r.index for r in records if r.index is not None) != list(range(len(records))):
            raise CorruptionError(f"{path}: tensor {name!r}: slices are missing or there twice")
        if len({(r.certificate.shape, r.certificate.dtype) for r in records}) > 1:
            raise CorruptionError(f"{path}: tensor {name!r}: slices of unequal shape or dtype")
    for name in sorted(named ^ tensors.keys()):
        what = "has no record" if name in tensors else "is in no shard"
        raise CorruptionError(f"{path}: tensor {name!r} {what}")


def compressed_tensors(files: list[Path]) -> list[TensorInfo]:
    """The compressed tensors in these shards, found without certificates or config.

    For loaders that are handed shards only. Empty stand-ins of 3-D tensors are among them.
    Raises as `read_header`; FormatError for shards of a newer version.
    """
    found = list[TensorInfo]()
    for file in files:
        tensors, metadata = read_header(file)
        mark = metadata.get(SHARD_MARK)
        if mark is None:
            continue
        if mark != "1":
            raise FormatError(f"{file}: store version {mark}: this moebound reads version 1")
        found += (tensor for tensor in tensors.values() if tensor.dtype == "U8")
    return found
