"""Which experts can be held as codes, half or a quarter of what bfloat16 takes: known at load.

Those whose matrices are all of codec `bound`, with alphabets of a byte and few patches, and laid
out as the model computes. The others stay values, one by one. Of these, codes of four bits are for
those of whose weights nearly all have one of sixteen codes. The others stay codes of a byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from typing import Literal, get_args

import numpy as np
import torch

from moebound.codec import Certificate
from moebound.codec.arrays import torch_dtype
from moebound.codec.bound import FACTORS_VERSION, BoundCodec
from moebound.codec.codes import (
    MOST_CODED,
    Bits,
    CodeMatrix,
    Read,
    code_bytes,
    has_codes,
    most_outside,
)
from moebound.errors import FormatError
from moebound.offload.entries import DiskEntry
from moebound.offload.slots import CodeSlot, SlotKind
from moebound.store.reader import StoredMatrix
from moebound.store.stored import StoredTensor
from moebound.types import Array, ExpertKey

SlotsName = Literal["values", "codes", "codes4"]
SLOTS: tuple[SlotsName, ...] = get_args(SlotsName)

MOST_PATCHED = 1 / 256
"""Of a matrix's weights. A patch costs a product as much as tens of weights, and 8 bytes."""
MOST_OUTSIDE = 1 / 64
"""The same of codes of four bits, whose product reads half as much, and which save half a byte."""
PATCH_BYTES = 8
TOO_MANY_OUTSIDE = "codes of a byte: too many weights have none of the sixteen of four bits"


@dataclass(frozen=True)
class CodeKinds:
    """kinds: of every expert, of codes where that is possible. refused: how many experts are not,
    and stay values, or codes of a byte, by why."""

    kinds: Mapping[ExpertKey, SlotKind]
    refused: Mapping[str, int]

    @property
    def any_codes(self) -> bool:
        return any(kind.aside_bytes is not None for kind in self.kinds.values())

    @property
    def any_of_four_bits(self) -> bool:
        return any(kind.bits == 4 for kind in self.kinds.values())


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
            aside[kind] = max(aside[kind], _aside(entry))
        else:
            why[f"values: {reason}"] += 1
    of = {kind: replace(kind, aside_bytes=n_bytes) for kind, n_bytes in aside.items()}
    found |= {key: of[kinds[key]] for key in able}
    return CodeKinds(found, dict(why))


def in_four_bits(entries: Iterable[DiskEntry], codes: CodeKinds) -> CodeKinds:
    """The same, with codes of four bits where few weights have none of them. Reads the tables of
    all matrices in codes, and decodes those whose tables do not say."""
    found, why = dict(codes.kinds), Counter(codes.refused)
    aside, able = Counter[SlotKind](), dict[ExpertKey, SlotKind]()
    for entry in entries:
        kind = found[entry.key]
        if kind.aside_bytes is None:
            continue
        outside = [stored_outside(part.stored) for part in entry.matrices if part.stored]
        if None in outside:
            why[TOO_MANY_OUTSIDE] += 1
            continue
        able[entry.key] = of_values = replace(kind, aside_bytes=None)
        n_outside = sum(n for n in outside if n is not None)
        aside[of_values] = max(aside[of_values], _aside(entry) + PATCH_BYTES * n_outside)
    found |= {key: replace(kind, aside_bytes=aside[kind], bits=4) for key, kind in able.items()}
    return CodeKinds(found, dict(why))


def stored_outside(stored: StoredMatrix | StoredTensor) -> int | None:
    """`few_outside` of a stored matrix; None, too, for one that cannot be read."""

    def decode(room: Array) -> CodeMatrix:
        return stored.decode_codes(stored.read(), room, bits=4, threads=1)

    try:
        with open(stored.tensor.file, "rb", buffering=0) as file:
            return few_outside(_reader(file, stored), stored.record.certificate, decode)
    except (OSError, FormatError):
        return None  # whoever loads it says what is wrong


def few_outside(
    read: Read, certificate: Certificate, decode: Callable[[Array], CodeMatrix]
) -> int | None:
    """How many of a matrix's weights have none of the sixteen codes, at most; None where they and
    the patches are more than MOST_OUTSIDE. decode: the matrix to codes of four bits, in memory of
    `code_bytes`; called where the tables in front do not say."""
    size, (rows, columns) = certificate.n_weights, certificate.shape
    limit = int(MOST_OUTSIDE * size) - certificate.patched
    n = most_outside(read, size)
    if n is None or (n > limit >= 0 and size <= _SMALL):
        n = len(decode(np.empty(code_bytes((rows, columns), 4), np.uint8)).patched)
    return n if n <= limit else None


_SMALL = 1 << 18
"""So few weights are decoded at load rather than left in codes of a byte: a table's rounding may
say of more than there are."""


def _aside(entry: DiskEntry) -> int:
    """`most_aside` of all its matrices."""
    return sum(
        most_aside(part.stored.record.certificate)
        for part in entry.matrices
        if part.stored is not None
    )


def most_held(certificate: Certificate, bits: Bits, outside: int) -> int:
    """Bytes that a matrix takes as codes, at most. outside: weights that have none of the codes."""
    rows, columns = certificate.shape
    return code_bytes((rows, columns), bits) + most_aside(certificate) + PATCH_BYTES * outside


def most_aside(certificate: Certificate) -> int:
    """Bytes that a matrix takes beside its codes of a byte, at most: a table, or steps, those of
    both sides from version 3 on, and patches."""
    of_both = (certificate.codec_version or 0) >= FACTORS_VERSION
    steps = sum(certificate.shape) if of_both else max(certificate.shape)
    return 4 * max(steps, 256) + PATCH_BYTES * certificate.patched


def _refused(entry: DiskEntry, kind: SlotKind) -> str | None:
    """Why an expert cannot be held as codes; None if it can."""
    for part in entry.matrices:
        stored = part.stored
        if stored is None:
            return "not compressed"
        if stored.target is not None or stored.needs or entry.needs:
            return "made of another expert's or shared parts"
        reason = uncoded(stored.record.certificate)
        if reason is not None:
            return reason
        dtype = torch_dtype(part.dtype)
        if dtype != kind.dtype and kind.dtype != torch.float32:
            return f"of {part.dtype}, which is cast"
        as_codes = CodeSlot(kind, kind.room(torch.device("meta")))
        if kind.transposed or as_codes.place(part) is None:
            return "laid out otherwise than the model computes"
    reasons = (unreadable(part.stored) for part in entry.matrices if part.stored)
    return next(filter(None, reasons), None)


def uncoded(certificate: Certificate) -> str | None:
    """Why a matrix cannot be held as codes, by its certificate; None if that does not say."""
    if certificate.codec != BoundCodec.id:
        return f"compressed by {certificate.codec or certificate.method}"
    if certificate.n_weights >= MOST_CODED:
        return f"a matrix of {MOST_CODED} weights or more"
    if certificate.patched > MOST_PATCHED * certificate.n_weights:
        return "too many patches"
    return None


def unreadable(stored: StoredMatrix | StoredTensor) -> str | None:
    """The same by its head, which is read."""
    try:
        with open(stored.tensor.file, "rb", buffering=0) as file:
            return has_codes(_reader(file, stored))
    except OSError:
        return "its head cannot be read"


def _reader(file: FileIO, stored: StoredMatrix | StoredTensor) -> Read:
    """Bytes of a matrix that is stored there."""
    tensor = stored.tensor

    def read(at: int, n: int) -> bytes:
        n = max(0, min(n, tensor.n_bytes - at))
        return os.pread(file.fileno(), n, tensor.offset + at)

    return read
