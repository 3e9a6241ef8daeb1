"""The numbers that the kernels read, laid out as one block of bytes.

Sections stand behind one another, each aligned to 16 bytes. Their columns are those named in
decode_kernel.py. Arrays are ordered by item size, so that one launch decodes those of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebound.codec.device.stream import Coded, Numbers, Stream
from moebound.types import NUMPY_DTYPES

DTYPES: dict[str, str] = {
    "segments": "int64",
    "arrays": "int64",
    "tables": "int64",
    "addresses": "int64",
    "positions": "int64",
    "owners": "int32",
    "patches": "uint32",
    "values32": "uint32",
    "symbols": "uint32",
    "values16": "uint16",
    "classes": "uint8",
}
_ALIGNMENT = 16
_ARRAY_FIELDS = 16


@dataclass(frozen=True)
class Part:
    """The arrays of one item size: one launch decodes them.

    item: bytes of a value. segments, patches: the first and behind the last, of all. low_bits: at
    least those of any array. classes, exact: whether any has classes, or is an exact copy.
    """

    item: int
    segments: tuple[int, int]
    patches: tuple[int, int]
    low_bits: int
    classes: bool
    exact: bool


@dataclass(frozen=True)
class Metadata:
    """block: uint8. sections: the first byte of each, and the one behind its last. The addresses
    are zeros, to be filled in where the arrays' memory is known. owners: each segment's array.
    """

    block: Numbers
    sections: dict[str, tuple[int, int]]
    parts: tuple[Part, ...]
    owners: Numbers
    n_tables: int
    n_slots: int


def build(streams: Sequence[Stream], offsets: Sequence[int]) -> Metadata:
    """Lay out what the kernels read. offsets: of each envelope in the compressed bytes."""
    rows: dict[str, list[Numbers]] = {name: [] for name in DTYPES}
    counts = dict.fromkeys(DTYPES, 0)
    arrays = np.zeros((len(streams), _ARRAY_FIELDS), np.int64)
    parts, owners, n_slots = [], [], 0

    def put(name: str, numbers: Numbers) -> int:
        """Where it begins in its section."""
        begin = counts[name]
        rows[name].append(numbers)
        counts[name] += len(numbers)
        return begin

    for item in (2, 4):
        chosen = [
            (i, stream, stream.coded)
            for i, stream in enumerate(streams)
            if stream.coded is not None and NUMPY_DTYPES[stream.spec.dtype].itemsize == item
        ]
        first_segment, first_patch = counts["segments"], counts["positions"]
        for i, stream, coded in chosen:
            put("segments", _segments(i, coded, offsets[i]))
            owners.append(np.full(len(coded.segments), i))
            n_tables, n_symbols = coded.symbols.shape
            symbols_begin, slots_begin = put("symbols", coded.symbols.reshape(-1)), n_slots
            tables = np.empty((n_tables, 4), np.int64)
            tables[:, 0] = symbols_begin + n_symbols * np.arange(n_tables)
            tables[:, 1], tables[:, 2] = n_symbols, coded.table_log
            tables[:, 3] = slots_begin + (np.arange(n_tables) << coded.table_log)
            put("tables", tables)
            n_slots += n_tables << coded.table_log
            arrays[i] = (
                stream.spec.size,
                coded.columns,
                coded.rows_per_segment,
                1 << coded.lanes_log,
                coded.low_bits,
                coded.table_log,
                coded.n_tables,
                coded.class_base,
                put("classes", coded.row_classes),
                put("classes", coded.column_classes),
                slots_begin,
                put("values16" if item == 2 else "values32", coded.values),
                coded.symbol_low if coded.exact else -1,
                offsets[i] + coded.lower if coded.lower >= 0 else -1,
                n_symbols,
                symbols_begin,
            )
            if len(stream.positions):
                put("positions", stream.positions)
                put("owners", np.full(len(stream.positions), i))
                put("patches", stream.patches)
        if chosen:
            parts.append(
                Part(
                    item,
                    (first_segment, counts["segments"]),
                    (first_patch, counts["positions"]),
                    _rounded_up(max(coded.low_bits for _, _, coded in chosen)),
                    any(coded.n_tables > 1 for _, _, coded in chosen),
                    any(coded.exact for _, _, coded in chosen),
                )
            )
    put("arrays", arrays)
    put("addresses", np.zeros(len(streams), np.int64))
    block, sections = _joined(rows)
    return Metadata(
        block,
        sections,
        tuple(parts),
        np.concatenate(owners) if owners else np.empty(0, np.int64),
        counts["tables"],
        n_slots,
    )


def _rounded_up(low_bits: int) -> int:
    """To one of few numbers: a kernel is compiled for each."""
    return next(n for n in (0, 1, 2, 4, 8) if n >= low_bits)


def _segments(i: int, coded: Coded, offset: int) -> Numbers:
    """[., 4]: array, first row, first byte, words."""
    found = np.empty((len(coded.segments), 4), np.int64)
    found[:, 0] = i
    found[:, 1] = np.arange(len(coded.segments)) * coded.rows_per_segment
    found[:, 2] = coded.segments + offset
    found[:, 3] = coded.words
    return found


def _joined(rows: dict[str, list[Numbers]]) -> tuple[Numbers, dict[str, tuple[int, int]]]:
    sections, at = {}, 0
    joined = {}
    for name, dtype in DTYPES.items():
        pieces = [piece.reshape(-1).astype(dtype, copy=False) for piece in rows[name]]
        joined[name] = np.concatenate(pieces) if pieces else np.empty(0, dtype)
        sections[name] = (at, at + joined[name].nbytes)
        at = -(-sections[name][1] // _ALIGNMENT) * _ALIGNMENT
    block = np.zeros(max(at, _ALIGNMENT), np.uint8)
    for name, (begin, end) in sections.items():
        block[begin:end] = joined[name].view(np.uint8)
    return block, sections
