"""Which experts can be held as codes, half of what bfloat16 takes: known at load.

Those whose matrices are all of codec `bound`, with alphabets of a byte and few patches, and laid
out as the model computes. The others stay values, one by one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.bound import FACTORS_VERSION, BoundCodec
from moebound.codec.codes import has_codes
from moebound.offload.entries import DiskEntry, DiskMatrix
from moebound.offload.slots import CodeSlot, SlotKind
from moebound.types import ExpertKey

SlotsName = Literal["values", "codes"]

MOST_PATCHED = 1 / 256
"""Of a matrix's weights. A patch costs a product as much as tens of weights, and 12 bytes."""


@dataclass(frozen=True)
class CodeKinds:
    """kinds: of every expert, of codes where that is possible. refused: how many experts stay
    values, by why."""

    kinds: Mapping[ExpertKey, SlotKind]
    refused: Mapping[str, int]

    @property
    def any_codes(self) -> bool:
        return any(kind.aside_bytes is not None for kind in self.kinds.values())


def code_kinds(
    entries: Iterable[DiskEntry], kinds: Mapping[ExpertKey, SlotKind], device: torch.device
) -> CodeKinds:
    """Which of these experts can be held as codes. kinds: of slots of values. Reads the heads of
    all matrices that may be."""
    found, why = dict(kinds), Counter[str]()
    aside = Counter[SlotKind]()
    able = list[ExpertKey]()
    for entry in entries:
        kind = kinds[entry.key]
        reason = "on another device than the CPU" if device.type != "cpu" else _refused(entry, kind)
        if reason is None:
            able.append(entry.key)
            aside[kind] = max(aside[kind], sum(map(_most_aside, entry.matrices)))
        else:
            why[reason] += 1
    of = {kind: replace(kind, aside_bytes=n_bytes) for kind, n_bytes in aside.items()}
    found |= {key: of[kinds[key]] for key in able}
    return CodeKinds(found, dict(why))


def _most_aside(part: DiskMatrix) -> int:
    """Bytes that a matrix takes beside its codes, at most: a table, or steps, those of both sides
    from version 3 on, and patches."""
    assert part.stored is not None
    certificate = part.stored.record.certificate
    of_both = (certificate.codec_version or 0) >= FACTORS_VERSION
    steps = sum(part.shape) if of_both else max(part.shape)
    return 4 * max(steps, 256) + 12 * certificate.patched


def _refused(entry: DiskEntry, kind: SlotKind) -> str | None:
    """Why an expert cannot be held as codes; None if it can."""
    for part in entry.matrices:
        stored = part.stored
        if stored is None:
            return "not compressed"
        if stored.target is not None or stored.needs or entry.needs:
            return "made of another expert's or shared parts"
        certificate = stored.record.certificate
        if certificate.codec != BoundCodec.id:
            return f"compressed by {certificate.codec or certificate.method}"
        dtype = torch_dtype(part.dtype)
        if dtype != kind.dtype and kind.dtype != torch.float32:
            return f"of {part.dtype}, which is cast"
        as_codes = CodeSlot(kind, kind.room(torch.device("meta")))
        if kind.transposed or as_codes.place(part) is None:
            return "laid out otherwise than the model computes"
        if certificate.patched > MOST_PATCHED * part.size:
            return "too many patches"
    for part in entry.matrices:
        reason = _unreadable(entry, part)
        if reason is not None:
            return reason
    return None


def _unreadable(entry: DiskEntry, part: DiskMatrix) -> str | None:
    assert part.stored is not None
    tensor = part.stored.tensor
    try:
        with open(tensor.file, "rb", buffering=0) as file:

            def read(at: int, n: int) -> bytes:
                n = max(0, min(n, tensor.n_bytes - at))
                return os.pread(file.fileno(), n, tensor.offset + at)

            return has_codes(read)
    except OSError:
        return "its head cannot be read"
