"""Read a store: which experts it has, one read per expert, and what was promised for each.

Opening reads headers and certificates only, and checks that they agree: every compressed tensor
has a certificate, every certificate a tensor, the matrices of an expert stand together, and names
say the same experts and roles as records (`checks.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moebound.checkpoint import Role, TensorInfo, read_header, read_into, read_tensors
from moebound.checkpoint.shards import read_json
from moebound.codec.arrays import ArrayLike
from moebound.codec.codes import Bits, CodeMatrix
from moebound.errors import CorruptionError, FormatError, MoeboundError, StoreError
from moebound.methods import FindPart, RouterEdit, Stored, router_name, shared_name
from moebound.methods.blob import PEEK_BYTES, blob_checksum, parse_router, peek_shared
from moebound.methods.reading import PartsFrom, no_parts
from moebound.store.checks import check_bytes, check_surface, check_tensor, hashes_are_checked
from moebound.store.folder import JOURNAL_FILE
from moebound.store.format import (
    CERTIFICATES_FILE,
    CONFIG_FILE,
    SHARD_MARK,
    VERSION,
    CodedRecord,
    ExpertRecord,
    FileRecord,
    MatrixRecord,
    PartRecord,
    Record,
    RouterRecord,
    Settings,
    ShardRecord,
    TensorRecord,
    read_certificates,
    read_settings,
)
from moebound.store.stored import (
    StoredTensor,
    certified_codes,
    decode_certified,
    naming,
    parse_certified,
    read_tensor_bytes,
)
from moebound.types import NUMPY_DTYPES, Array, ExpertKey
from moebound.wordmath.builtin import PREFIX


@dataclass(frozen=True)
class StoredPart:
    """A shared part: where its blob is, and its record."""

    tensor: TensorInfo
    record: PartRecord

    def read(self) -> memoryview:
        """Its bytes, by one positional read. Raises CorruptionError if they are not those that
        were certified."""
        data = read_tensor_bytes(self.tensor)
        check_bytes(self.tensor, self.record.sha256, data)
        return data


@dataclass(frozen=True)
class StoredMatrix:
    """One compressed matrix: where its bytes are, and its record with the certificate.

    needs: the shared parts that decoding takes, by group and number. find: gives them, open; it
    reads them from the store, and keeps the last ones. target: of an expert that is an alias, the
    matrix whose weights it has; they are read when they are asked for.
    """

    tensor: TensorInfo
    record: MatrixRecord
    needs: tuple[tuple[int, int], ...] = ()
    find: FindPart = no_parts
    target: StoredMatrix | None = None

    def decode(
        self, data: memoryview, *, parts: FindPart | None = None, threads: int | None = None
    ) -> Array:
        """The weights, [rows, cols], from this matrix's bytes.

        parts: where shared parts come from; None for the store itself. Raises FormatError or
        CorruptionError, naming file and tensor, for bytes that are damaged or hold another shape or
        dtype than certified, and for a shared part that is missing or another.
        """
        with naming(self.tensor):
            stored = self.parse(data)
            if self.target is None:
                given = parts or self.find
                return stored.decode(given, threads=threads, max_bytes=stored.spec.n_bytes)
        return self.target.decode(self.target.read(), parts=parts, threads=threads)

    def decode_into(
        self,
        data: memoryview,
        out: ArrayLike,
        *,
        parts: FindPart | None = None,
        threads: int | None = None,
    ) -> None:
        """As `decode`, into a contiguous array or tensor of that shape and dtype."""
        with naming(self.tensor):
            plain = self.target is None and not self.needs
            if plain and decode_certified(data, self.record.certificate, out, threads):
                return
            stored = self.parse(data)
            if self.target is None:
                stored.decode_into(out, parts or self.find, threads=threads)
                return
        self.target.decode_into(self.target.read(), out, parts=parts, threads=threads)

    def decode_codes(
        self, data: memoryview, out: Array, *, bits: Bits = 8, threads: int
    ) -> CodeMatrix:
        """As `decode_into`, into codes of so many bits, flat: of codec `bound`, with no shared
        parts. Raises CodecError, too, where there are none."""
        return certified_codes(self, data, out, bits, threads)

    def read(self) -> memoryview:
        """Its bytes, by one positional read. Raises as `read_tensor_bytes` and `check`."""
        data = read_tensor_bytes(self.tensor)
        self.check(data)
        return data

    def check(self, data: memoryview) -> None:
        """Are these the bytes that were certified? Raises CorruptionError, naming file and
        tensor."""
        check_bytes(self.tensor, self.record.certificate.sha256_encoded, data)

    def parse(self, data: memoryview) -> Stored:
        """Taken apart and checked against the certificate, not decoded."""
        return parse_certified(data, self.record.certificate, self.needs)


@dataclass(frozen=True)
class StoredExpert:
    """One expert: n_bytes from `offset` of one file are all its own bytes, in matrix order.

    exact: kept bit for bit instead of by the store's method. method: its setting. group: whose
    shared parts it uses.
    """

    key: ExpertKey
    exact: bool
    file: Path
    offset: int
    n_bytes: int
    matrices: tuple[StoredMatrix, ...]
    method: str
    group: int = 0

    @property
    def n_weights(self) -> int:
        return sum(matrix.record.certificate.n_weights for matrix in self.matrices)

    @property
    def decoded_bytes(self) -> int:
        """Of the weights, in the dtype they are decoded to."""
        found = [matrix.record.certificate for matrix in self.matrices]
        return sum(c.n_weights * NUMPY_DTYPES[c.dtype].itemsize for c in found)

    @property
    def needs(self) -> tuple[tuple[int, int], ...]:
        """The shared parts that decoding it takes, by group and number, each once."""
        return tuple(dict.fromkeys(need for matrix in self.matrices for need in matrix.needs))


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
        """The weights by role. Raises as `StoredMatrix.check` and `decode`."""
        for index, stored in enumerate(self.stored.matrices):
            stored.check(self.matrix(index))
        return {
            stored.record.role: stored.decode(self.matrix(index), threads=threads)
            for index, stored in enumerate(self.stored.matrices)
        }


@dataclass(frozen=True)
class Store:
    """A store's contents, by name; no weights are in memory.

    tensors: every tensor of the shards. kept: those that are as they were, with their hashes.
    coded: those of no expert that are coded; `decoded_weights` gives both, decoded.
    parts: shared parts, by group and number. routers: router edits' tensors and records.
    """

    path: Path
    config: Mapping[str, Any]
    settings: Settings
    tensors: Mapping[str, TensorInfo]
    kept: Mapping[str, TensorRecord]
    coded: Mapping[str, StoredTensor]
    shards: tuple[ShardRecord, ...]
    files: tuple[FileRecord, ...]
    parts: Mapping[tuple[int, int], StoredPart]
    routers: tuple[tuple[TensorInfo, RouterRecord], ...]
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

    def router_edits(self) -> dict[int, RouterEdit]:
        """What becomes of the routing, by layer. Raises CorruptionError, naming the tensor, for an
        edit that is damaged or another's."""
        return read_router_edits([tensor for tensor, _ in self.routers])

    def records(self) -> Iterator[Record]:
        """Of its experts, other coded tensors, shared parts and router edits."""
        for expert in self.experts():
            matrices = tuple(matrix.record for matrix in expert.matrices)
            yield ExpertRecord(expert.key, expert.exact, matrices, expert.method, expert.group)
        yield from (stored.record for stored in self.coded.values())
        yield from (part.record for part in self.parts.values())
        yield from (record for _, record in self.routers)

    def hashes(self) -> dict[str, str]:
        """The certified SHA-256 of every tensor's bytes, by name, in the order of the files. Empty
        stand-ins have none."""
        found = {name: record.sha256 for name, record in self.kept.items()}
        found |= {name: s.record.certificate.sha256_encoded for name, s in self.coded.items()}
        found |= {part.tensor.name: part.record.sha256 for part in self.parts.values()}
        found |= {tensor.name: record.sha256 for tensor, record in self.routers}
        for expert in self.experts():
            for matrix in expert.matrices:
                found[matrix.tensor.name] = matrix.record.certificate.sha256_encoded
        return {name: found[name] for name in self.tensors if name in found}

    def decode_expert(self, key: ExpertKey, *, threads: int | None = None) -> dict[Role, Array]:
        """Read and decode one expert: role -> [rows, cols]. Raises as read_expert and decode."""
        return self.read_expert(key).decode(threads=threads)


def read_stored(stored: StoredExpert) -> EncodedExpert:
    """As `Store.read_expert`."""
    span = TensorInfo(
        str(stored.key), "U8", (stored.n_bytes,), stored.file, stored.offset, stored.n_bytes
    )
    return EncodedExpert(stored, read_tensor_bytes(span))


def read_router_edits(tensors: Iterable[TensorInfo]) -> dict[int, RouterEdit]:
    """By layer. Raises CorruptionError, naming file and tensor, for one that is damaged, another's,
    or the second of its layer."""
    found: dict[int, RouterEdit] = {}
    for tensor in tensors:
        try:
            blob = parse_router(read_tensor_bytes(tensor))
            if router_name(blob.group) != tensor.name:
                raise CorruptionError(f"is that of group {blob.group}")
            edit = RouterEdit.from_bytes(blob.payload)
            if edit.is_empty:
                continue
            if edit.layer in found:
                raise CorruptionError(f"layer {edit.layer} has two router edits")
        except FormatError as error:
            raise type(error)(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error
        found[edit.layer] = edit
    return found


def existing_folder(path: Path | str) -> Path:
    """Raises StoreError where there is none, and for the name of a built-in model."""
    if (found := Path(path)).is_dir():
        return found
    if str(path).startswith(PREFIX):
        raise StoreError(
            f"{path}: a model and no store; `moebound compress {path} DST --rate 0.3` makes one"
        )
    raise StoreError(f"{path}: no such folder")


def open_store(path: Path | str, *, check: bool = True) -> Store:
    """Open a store. Reads headers and certificates, and checks one against the other.

    check: also names against records, and the hashes of headers, index and config; without, that
    is left to `checks.surface_problems`.
    Raises StoreError if this is no store or not a finished one, CheckpointError if a shard is
    missing or named by a path, FormatError for a newer version, CorruptionError if it contradicts
    itself.
    """
    path = existing_folder(path)
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
    records = read_certificates(path / CERTIFICATES_FILE, version=settings.version)
    _check_unique(path, records)
    kept = {r.name: r for r in records if isinstance(r, TensorRecord)}
    coded = {
        r.name: StoredTensor(_own_tensor(path, tensors, r.name, r.certificate.n_bytes), r)
        for r in records
        if isinstance(r, CodedRecord)
    }
    parts = _place_parts(path, tensors, [r for r in records if isinstance(r, PartRecord)])
    routers = tuple(
        (_own_tensor(path, tensors, r.name, r.n_bytes), r)
        for r in records
        if isinstance(r, RouterRecord)
    )
    find = PartsFrom(lambda group, number: parts[group, number].read())
    experts = _place(
        path, tensors, [r for r in records if isinstance(r, ExpertRecord)], parts, find
    )
    experts = _with_targets(path, experts, [tensor for tensor, _ in routers])
    own = {part.tensor.name for part in parts.values()} | {tensor.name for tensor, _ in routers}
    for name in kept.keys() & coded.keys():
        raise CorruptionError(f"{path}: tensor {name!r} has two records")
    _check_complete(path, tensors, kept.keys() | coded.keys() | own, experts)
    store = Store(
        path,
        MappingProxyType(config),
        settings,
        MappingProxyType(tensors),
        MappingProxyType(kept),
        MappingProxyType(coded),
        tuple(r for r in records if isinstance(r, ShardRecord)),
        tuple(r for r in records if isinstance(r, FileRecord)),
        MappingProxyType(parts),
        routers,
        MappingProxyType(experts),
    )
    if check and hashes_are_checked():
        check_surface(store)
        for tensor, router in routers:
            check_tensor(tensor, router.sha256)
    return store


def _check_unique(path: Path, records: list[Record]) -> None:
    """Tensors, files and shards have one record each; experts are counted when they are placed."""
    seen = set[tuple[type, str]]()
    for record in records:
        if isinstance(record, ExpertRecord):
            continue
        if (type(record), record.name) in seen:
            raise CorruptionError(f"{path}: {record.name!r} has two records")
        seen.add((type(record), record.name))


def _own_tensor(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, n_bytes: int
) -> TensorInfo:
    """The tensor with bytes of ours that a record certifies."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CorruptionError(f"{path}: tensor {name!r} is in no shard")
    if tensor.dtype != "U8" or tensor.shape != (n_bytes,):
        raise CorruptionError(
            f"{tensor.file}: tensor {name!r}: expected {n_bytes} bytes of U8, found "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def _place_parts(
    path: Path, tensors: Mapping[str, TensorInfo], records: list[PartRecord]
) -> dict[tuple[int, int], StoredPart]:
    """Shared parts. Of each, first and last bytes are read: they say which part it is."""
    parts = dict[tuple[int, int], StoredPart]()
    for record in records:
        tensor = _own_tensor(path, tensors, record.name, record.n_bytes)
        where = f"{tensor.file}: tensor {tensor.name!r}"
        if record.name != shared_name(record.group, record.number):
            raise CorruptionError(f"{where}: certified as part {record.number} of {record.group}")
        head, tail = (memoryview(bytearray(min(n, tensor.n_bytes))) for n in (PEEK_BYTES, 4))
        read_into(tensor, head)
        read_into(tensor, tail, start=tensor.n_bytes - len(tail))
        try:
            group, number = peek_shared(head)
        except FormatError as error:
            raise type(error)(f"{where}: {error}") from error
        if (group, number) != (record.group, record.number):
            raise CorruptionError(f"{where}: holds part {number} of group {group}")
        if blob_checksum(tail) != record.checksum:
            raise CorruptionError(f"{where}: is not the part that was written (checksums differ)")
        parts[record.group, record.number] = StoredPart(tensor, record)
    return parts


def _place(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    records: list[ExpertRecord],
    parts: Mapping[tuple[int, int], StoredPart],
    find: FindPart,
) -> dict[ExpertKey, StoredExpert]:
    experts = dict[ExpertKey, StoredExpert]()
    for record in sorted(records, key=lambda record: record.key):
        where = f"{path}: {record.key}"
        if record.key in experts:
            raise CorruptionError(f"{where}: certified twice")
        matrices = []
        for matrix in record.matrices:
            tensor = _own_tensor(path, tensors, matrix.stored_name, matrix.certificate.n_bytes)
            if len(matrix.certificate.shape) != 2:
                raise CorruptionError(f"{where}: {matrix.stored_name!r} is no matrix")
            needs = tuple((record.group, number) for number in matrix.uses)
            for group, number in needs:
                if (group, number) not in parts:
                    raise CorruptionError(
                        f"{where}: {matrix.stored_name!r} needs {shared_name(group, number)!r}, "
                        "which is missing"
                    )
            matrices.append(StoredMatrix(tensor, matrix, needs, find))
        first, at = matrices[0].tensor, matrices[0].tensor.offset
        for stored in matrices:
            if stored.tensor.file != first.file or stored.tensor.offset != at:
                raise CorruptionError(
                    f"{where}: tensor {stored.tensor.name!r} does not stand right behind the "
                    "expert's others"
                )
            at += stored.tensor.n_bytes
        experts[record.key] = StoredExpert(
            record.key, record.exact, first.file, first.offset, at - first.offset, tuple(matrices),
            record.method, record.group,
        )  # fmt: skip
    return experts


def _with_targets(
    path: Path, experts: dict[ExpertKey, StoredExpert], routers: list[TensorInfo]
) -> dict[ExpertKey, StoredExpert]:
    """The same, where aliases know whose weights they have. An edit that is damaged says nothing
    here: who applies it, and `verify`, refuse it."""
    try:
        edits = read_router_edits(routers)
    except MoeboundError:
        return experts
    found = dict(experts)
    for layer, edit in edits.items():
        for expert, number in edit.alias.items():
            alias, target = (experts.get(ExpertKey(layer, n)) for n in (expert, number))
            if alias is None:
                continue  # of another model; who applies it says so
            theirs = {m.record.role: m for m in (() if target is None else target.matrices)}
            matrices = []
            for matrix in alias.matrices:
                there = theirs.get(matrix.record.role)
                ours = matrix.record.certificate
                if there is None or (there.record.certificate.shape, there.record.certificate.dtype
                                     ) != (ours.shape, ours.dtype):  # fmt: skip
                    raise CorruptionError(
                        f"{path}: tensor {matrix.tensor.name!r}: expert {number}, which stands for "
                        f"expert {expert} of layer {layer}, has no such matrix"
                    )
                matrices.append(replace(matrix, target=there))
            found[alias.key] = replace(alias, matrices=tuple(matrices))
    return found


def _check_complete(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    named: set[str],
    experts: Mapping[ExpertKey, StoredExpert],
) -> None:
    """named: tensors that are accounted for, beside those of experts."""
    slices: dict[str, list[MatrixRecord]] = defaultdict(list)
    named = set(named)
    for expert in experts.values():
        for matrix in expert.matrices:
            if matrix.tensor.name in named:
                raise CorruptionError(f"{path}: tensor {matrix.tensor.name!r} has two records")
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
    """The tensors with bytes of ours in these shards, found without certificates or config.

    For loaders that are handed shards only. Empty stand-ins of 3-D tensors are among them, and
    shared parts and router edits, whose names begin with OWN_PREFIX. Raises as `read_header`;
    FormatError for shards of a newer version.
    """
    found = list[TensorInfo]()
    for file in files:
        tensors, metadata = read_header(file)
        mark = metadata.get(SHARD_MARK)
        if mark is None:
            continue
        if not mark.isdigit() or not 1 <= int(mark) <= VERSION:
            raise FormatError(
                f"{file}: store version {mark}: this moebound reads versions up to {VERSION}; "
                "install a newer one"
            )
        found += (tensor for tensor in tensors.values() if tensor.dtype == "U8")
    return found
