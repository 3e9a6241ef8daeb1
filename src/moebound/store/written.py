"""A group of experts as it goes into a shard: its bytes, and the records that certify them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moebound.codec.certificate import sha256
from moebound.methods import Artifact, ExpertView
from moebound.methods.blob import blob_checksum, parse_shared
from moebound.store.format import (
    ExpertRecord,
    MatrixRecord,
    PartRecord,
    Record,
    RouterRecord,
    stored_name,
)
from moebound.store.layout import Group
from moebound.store.ratio import kept_ratio


@dataclass(frozen=True)
class Written:
    """A group as it goes into a shard. own: shared parts, then the router edit. experts: in the
    order of the group, with the bytes of their matrices."""

    own: tuple[bytes, ...]
    own_records: tuple[Record, ...]
    experts: tuple[tuple[ExpertRecord, tuple[bytes, ...]], ...]

    @property
    def records(self) -> list[Record]:
        return [*self.own_records, *(record for record, _ in self.experts)]


def written(group: Group, views: Sequence[ExpertView], artifact: Artifact) -> Written:
    method, number = group.method, group.number
    names = iter(group.own_names)
    own_records: list[Record] = [
        PartRecord(
            next(names),
            number,
            part,
            method.setting,
            len(blob),
            parse_shared(blob).held_bytes,
            blob_checksum(blob),
            sha256(blob),
        )
        for part, blob in enumerate(artifact.shared)
    ]
    own = list(artifact.shared)
    if artifact.router_blob is not None and artifact.router is not None:
        blob = artifact.router_blob
        own.append(blob)
        own_records.append(
            RouterRecord(
                next(names), number, **artifact.router.describe(), n_bytes=len(blob),
                sha256=sha256(blob),
            )
        )  # fmt: skip
    experts = []
    for task, view in zip(group.tasks, views, strict=True):
        found = artifact.experts[view.key]
        records = tuple(
            MatrixRecord(
                m.name, m.index, m.role, m.source.file.name,
                kept_ratio(found[m.role].certificate, view.matrices[m.role]),
                found[m.role].certificate, found[m.role].uses,
            )
            for m in task.expert.matrices
        )  # fmt: skip
        record = ExpertRecord(view.key, task.exact, records, method.setting, number)
        experts.append((record, tuple(found[m.role].data for m in task.expert.matrices)))
    return Written(tuple(own), tuple(own_records), tuple(experts))


def tensor_names(group: Group) -> Iterator[str]:
    """Names in the order of the bytes; a 3-D tensor's own name right before its first slice."""
    yield from group.own_names
    for task in group.tasks:
        for matrix in task.expert.matrices:
            if matrix.index == 0:
                yield matrix.name
            yield stored_name(matrix.name, matrix.index)
