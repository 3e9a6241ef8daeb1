"""An expert as it lies on disk: which bytes to read, and what they are.

One `DiskEntry` an expert, whatever the source: the compressed experts of a store (one read each),
and ordinary tensors, of a checkpoint or of experts that a store left as they were (a read for each
stretch of bytes). A part that several experts share is an entry of its own, with a number of its
own behind the layer's experts, so that the cache holds it as one of them. `open_entries` finds all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moebound.checkpoint import Checkpoint, Role, open_checkpoint
from moebound.checkpoint.experts import Expert, ExpertMatrix, find_experts
from moebound.checkpoint.families import Family, Layout, find_family
from moebound.checkpoint.shards import Stored, TensorInfo, read_into, read_json
from moebound.errors import StoreError
from moebound.methods import RouterEdit
from moebound.store import Store, open_store
from moebound.store.checks import check_bytes, check_tensor
from moebound.store.format import read_settings
from moebound.store.reader import StoredExpert, StoredMatrix, StoredPart
from moebound.store.stored import StoredTensor
from moebound.types import Array, DType, ExpertKey

FIRST_SHARED = 1 << 30
"""Numbers of a layer's shared parts begin here, far behind those of its experts."""


@dataclass(frozen=True, slots=True)
class DiskMatrix:
    """One matrix of an entry.

    shape: as on disk, of dtype. transposed: [in, out] instead of [out, in]. interleaved: rows of
    gate and up alternate (role "gate_up"). start, stop: its bytes in the entry. stored: how to
    decode them; None where they are the weights themselves.
    """

    name: str
    role: Role
    dtype: DType
    shape: tuple[int, int]
    layout: Layout
    start: int
    stop: int
    stored: StoredMatrix | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """All bytes of one expert, or of a shared part. spans: where they are, in order. needs: the
    shared parts that decoding takes. shared: the part that this is; None for an expert. certified:
    a store's tensors that these bytes are from as they are, with their SHA-256."""

    key: ExpertKey
    spans: tuple[TensorInfo, ...]
    matrices: tuple[DiskMatrix, ...]
    needs: tuple[ExpertKey, ...] = ()
    shared: StoredPart | None = None
    certified: tuple[tuple[TensorInfo, str], ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(span.n_bytes for span in self.spans)

    @property
    def n_weights(self) -> int:
        return sum(part.size for part in self.matrices)

    @property
    def encoded(self) -> bool:
        """Whether there is anything to decode."""
        return any(part.stored is not None for part in self.matrices)

    @property
    def enveloped(self) -> bool:
        """Whether all of it are codecs' envelopes, which devices may decode."""
        return all(p.stored is None or p.stored.record.certificate.codec for p in self.matrices)

    @property
    def stretch(self) -> tuple[Path, int, int] | None:
        """File, first byte and number of bytes, if all spans stand one behind the other there."""
        first, at = self.spans[0], self.spans[0].offset
        for span in self.spans:
            if span.stored is not None or span.file != first.file or span.offset != at:
                return None
            at += span.n_bytes
        return first.file, first.offset, at - first.offset

    def check(self, data: memoryview) -> None:
        """Are these bytes the ones that a store's certificates say? A tensor that was left as it
        was has one hash, and is read whole for it. Raises CorruptionError, naming file and tensor.
        """
        if self.shared is not None:
            check_bytes(self.shared.tensor, self.shared.record.sha256, data)
        for part in self.matrices:
            if part.stored is not None:
                part.stored.check(data[part.start : part.stop])
        for tensor, sha256 in self.certified:
            check_tensor(tensor, sha256)

    def read(self, buffer: memoryview, *, drop_cache: bool = False) -> None:
        """Fill `buffer` (n_bytes long). Raises CheckpointError if a file is gone, CorruptionError
        if it has become shorter."""
        at = 0
        for span in self.spans:
            read_into(span, buffer[at : at + span.n_bytes], drop_cache=drop_cache)
            at += span.n_bytes


@dataclass(frozen=True)
class DiskEntries:
    """The routed experts of a source, in the order of the model. tensors: their names in it.
    compressed: whether this is a store. shared: parts that several experts need, by key.
    edits: what becomes of the routing, by layer. others: the other tensors of a quantized
    checkpoint, which transformers would not read as they are; None for any other source. coded: a
    store's coded tensors that no routed expert has, by name."""

    path: Path
    compressed: bool
    config: Mapping[str, Any]
    by_key: Mapping[ExpertKey, DiskEntry]
    tensors: frozenset[str]
    shared: Mapping[ExpertKey, DiskEntry] = field(default_factory=dict)
    edits: Mapping[int, RouterEdit] = field(default_factory=dict)
    others: Mapping[str, TensorInfo] | None = None
    coded: Mapping[str, StoredTensor | StoredMatrix] = field(default_factory=dict)

    def __iter__(self) -> Iterator[DiskEntry]:
        return iter(self.by_key.values())

    @property
    def n_bytes(self) -> int:
        """Of all of them together, with what they share."""
        return sum(entry.n_bytes for entry in self.everything)

    @property
    def everything(self) -> list[DiskEntry]:
        """Experts and shared parts."""
        return [*self.by_key.values(), *self.shared.values()]

    @property
    def asked_for(self) -> list[DiskEntry]:
        """Experts that a model may need: those that are chosen, and compute."""

        def computes(key: ExpertKey) -> bool:
            edit = self.edits.get(key.layer)
            if edit is None:
                return True
            chosen = edit.keep is None or key.expert in edit.keep
            return chosen and key.expert not in edit.alias and key.expert not in edit.constants

        return [entry for entry in self if computes(entry.key)]

    @property
    def most_shared(self) -> int:
        """The most shared parts that a layer has."""
        return max(Counter(key.layer for key in self.shared).values(), default=0)

    @property
    def n_weights(self) -> int:
        return sum(entry.n_weights for entry in self)


def open_entries(path: str | os.PathLike[str]) -> DiskEntries:
    """The experts of a store or of a checkpoint, which may be quantized: its experts are
    dequantized each time they are read. Reads headers only.

    Raises as `open_store` and `open_checkpoint`; StoreError if a store has no routed experts.
    """
    path = Path(path)
    is_store = (path / "config.json").is_file() and read_settings(
        read_json(path / "config.json")
    ) is not None
    found = _of_store(open_store(path)) if is_store else _of_checkpoint(open_checkpoint(path))
    if not found.by_key:
        raise StoreError(f"{path}: no routed experts in it")
    return found


def _of_checkpoint(checkpoint: Checkpoint) -> DiskEntries:
    assert checkpoint.family is not None  # a folder has a config
    experts = checkpoint.experts()
    return DiskEntries(
        checkpoint.path,
        False,
        checkpoint.config,
        {expert.key: _plain(expert, checkpoint.family) for expert in experts},
        frozenset(matrix.name for expert in experts for matrix in expert.matrices),
        others=None
        if checkpoint.stored_as is None
        else {tensor.name: tensor for tensor in checkpoint.passthrough()},
    )


def _of_store(store: Store) -> DiskEntries:
    family = find_family(store.config)
    entries, names = dict[ExpertKey, DiskEntry](), set[str]()
    shared = _shared(store)
    keys = {
        (part.record.group, part.record.number): key
        for key, part in ((entry.key, entry.shared) for entry in shared.values())
        if part is not None
    }
    coded: dict[str, StoredTensor | StoredMatrix] = dict(store.coded)
    for stored in store.experts():
        if stored.key.shared:
            coded |= {m.record.name: m for m in stored.matrices if m.record.index is None}
        else:
            needs = tuple(keys[need] for need in stored.needs)
            entries[stored.key] = replace(_compressed(stored, family), needs=needs)
            names |= {m.tensor.name for m in stored.matrices}
            names |= {m.record.name for m in stored.matrices}  # the empty stand-ins of 3-D tensors
    # Experts that were not chosen are ordinary tensors.
    kept = {name: store.tensors[name] for name in store.kept}
    for expert in find_experts(kept, family, store.config, complete=False):
        if expert.key not in entries:
            certified = dict.fromkeys(
                (matrix.source, store.kept[matrix.name].sha256) for matrix in expert.matrices
            )
            entries[expert.key] = replace(_plain(expert, family), certified=tuple(certified))
            names |= {matrix.name for matrix in expert.matrices}
    return DiskEntries(
        store.path, True, store.config, dict(sorted(entries.items())), frozenset(names), shared,
        store.router_edits(), coded=coded,
    )  # fmt: skip


def _shared(store: Store) -> dict[ExpertKey, DiskEntry]:
    """Parts that routed experts need, numbered within each layer."""
    found: dict[tuple[int, int], int] = {}
    for stored in store.experts():
        if not stored.key.shared:
            found |= dict.fromkeys(stored.needs, stored.key.layer)
    count: dict[int, int] = Counter()
    entries = dict[ExpertKey, DiskEntry]()
    for need, layer in sorted(found.items()):
        part = store.parts[need]
        key = ExpertKey(layer, FIRST_SHARED + count[layer])
        count[layer] += 1
        entries[key] = DiskEntry(key, (part.tensor,), (), shared=part)
    return entries


def _compressed(stored: StoredExpert, family: Family) -> DiskEntry:
    span = TensorInfo(
        str(stored.key), "U8", (stored.n_bytes,), stored.file, stored.offset, stored.n_bytes
    )
    parts = []
    for matrix in stored.matrices:
        record, start = matrix.record, matrix.tensor.offset - stored.offset
        shape = (record.certificate.shape[0], record.certificate.shape[1])
        parts.append(
            DiskMatrix(record.name, record.role, record.certificate.dtype, shape,
                 _layout(family, record.name), start, start + matrix.tensor.n_bytes, matrix)
        )  # fmt: skip
    return DiskEntry(stored.key, (span,), tuple(parts))


def _plain(expert: Expert, family: Family) -> DiskEntry:
    parts, spans, at = [], list[TensorInfo](), 0
    for matrix in expert.matrices:
        parts.append(
            DiskMatrix(matrix.name, matrix.role, matrix.dtype, matrix.shape,
                 _layout(family, matrix.name), at, at + matrix.n_bytes, None)
        )  # fmt: skip
        spans.append(_span(matrix))
        at += matrix.n_bytes
    return DiskEntry(expert.key, tuple(spans), tuple(parts))


def _span(matrix: ExpertMatrix) -> TensorInfo:
    source, n_bytes = matrix.source, matrix.n_bytes
    if source.stored is not None:
        whole = (1, *matrix.shape)
        stored = _Whole(source.stored, source.shape[0], matrix.index)
        return TensorInfo(
            source.name, source.dtype, whole, source.file, source.offset, n_bytes, stored
        )
    offset = source.offset + (matrix.index or 0) * n_bytes
    return TensorInfo(source.name, "U8", (n_bytes,), source.file, offset, n_bytes)


@dataclass(frozen=True, slots=True)
class _Whole:
    """A matrix that is computed, as one row: `Stored` of shards.py. height: rows of the tensor.
    index: which of them it is, None for all."""

    stored: Stored
    height: int
    index: int | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.stored.parts

    def rows(self, first: int, last: int, *, drop_cache: bool = False) -> Array:
        at, end = (0, self.height) if self.index is None else (self.index, self.index + 1)
        return self.stored.rows(at, end, drop_cache=drop_cache)


def _layout(family: Family, name: str) -> Layout:
    match = family.match(name)
    if match is None:
        raise StoreError(f"tensor {name!r} is named as no expert of family {family.name!r} is")
    return match.layout
