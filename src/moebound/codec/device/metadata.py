"""What the kernels read of arrays, laid out as one block of bytes.

It says nothing of where an array's bytes are, or where its weights are to go (`jobs.py` does): so
it may stay on the device. Sections stand behind one another, each aligned to 16 bytes. The columns
of `arrays` are those named in decode_kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebound.codec.device.stream import Coded, Numbers, Stream
from moebound.types import NUMPY_DTYPES, DType

DTYPES: dict[str, str] = {
    "arrays": "int64",
    "begins": "int64",
    "words": "int32",
    "positions": "int64",
    "patches": "uint32",
    "values32": "uint32",
    "symbols": "uint32",
    "steps": "float32",
    "values16": "uint16",
    "classes": "uint8",
}
"""Of the sections. begins, words: of each segment, its first byte counted from the envelope's, and
its number of words."""

ALIGNMENT = 16
_ARRAY_FIELDS = 23

# Columns of `Metadata.facts`.
ITEM, SEGMENTS, TABLES, SLOTS, PATCHES, LOW_BITS, EXACT, ODD, SCALED = range(9)

TO_HALF, TO_OTHER, BY_ROW, BOTH_SIDES = 1, 2, 4, 8
"""Of what is scaled: bits as in decode_kernel.py."""


@dataclass(frozen=True)
class Metadata:
    """block: uint8. sections: the first byte of each.

    facts: [n, 9] int64, what the host asks of each array to make jobs: bytes of a value (0: not
    decoded by kernels), segments, tables, slots of all its tables, patches, low bits, whether it is
    an exact copy, whether its segments begin at odd bytes of its envelope, and how it is scaled.
    names: of each array, for people.
    """

    block: Numbers
    sections: dict[str, int]
    facts: Numbers
    names: tuple[str, ...]


def build(streams: Sequence[Stream]) -> Metadata:
    """Lay out what the kernels read. Arrays that the host has decoded take no room in it."""
    rows: dict[str, list[Numbers]] = {name: [] for name in DTYPES}
    counts = dict.fromkeys(DTYPES, 0)
    arrays = np.zeros((len(streams), _ARRAY_FIELDS), np.int64)
    facts = np.zeros((len(streams), 9), np.int64)

    def put(name: str, numbers: Numbers) -> int:
        """Where it begins in its section."""
        begin = counts[name]
        rows[name].append(numbers)
        counts[name] += len(numbers)
        return begin

    for i, stream in enumerate(streams):
        if stream.coded is None:
            continue
        coded, item = stream.coded, NUMPY_DTYPES[stream.spec.dtype].itemsize
        steps, numbers = _steps(coded)
        put("words", coded.words)
        put("patches", stream.patches)
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
            put("begins", coded.segments),
            put("values16" if item == 2 else "values32", coded.values),
            coded.symbol_low if coded.exact else -1,
            coded.lower,
            coded.symbols.shape[1],
            put("symbols", coded.symbols.reshape(-1)),
            len(coded.segments),
            put("positions", stream.positions),
            len(stream.positions),
            scaled := _scaled(stream.spec.dtype, coded),
            put("steps", steps),
            coded.symbol_low << coded.low_bits,
            put("classes", numbers),
        )
        facts[i] = _facts(item, coded, len(stream.positions), scaled)
    put("arrays", arrays)
    block, sections = _joined(rows)
    names = tuple(f"codec {stream.codec!r}, shape {stream.spec.shape}" for stream in streams)
    return Metadata(block, sections, facts, names)


def _scaled(dtype: DType, coded: Coded) -> int:
    if not len(coded.steps):
        return 0
    rounded = TO_HALF if dtype == "F16" else TO_OTHER
    if len(coded.factors):
        return rounded | BOTH_SIDES
    return rounded | (BY_ROW if coded.by_row else 0)


def _steps(coded: Coded) -> tuple[Numbers, Numbers]:
    """What a matrix puts among the steps, and a uint8 for each row if it has factors.

    Products do not ask which of the two is the step: with factors, columns bring their numbers and
    rows theirs. A side has 256 levels at most, so rows name an entry of a list behind the columns'.
    """
    if not len(coded.factors):
        return coded.steps, np.empty(0, np.uint8)
    of_columns, of_rows = coded.steps, coded.factors
    if coded.by_row:
        of_columns, of_rows = of_rows, of_columns
    different, numbers = np.unique(of_rows, return_inverse=True)
    return np.concatenate((of_columns, different)), numbers.astype(np.uint8)


def _facts(item: int, coded: Coded, n_patches: int, scaled: int) -> tuple[int, ...]:
    return (
        item,
        len(coded.segments),
        coded.n_tables,
        coded.n_tables << coded.table_log,
        n_patches,
        coded.low_bits,
        coded.exact,
        int(coded.segments[0]) % 2,
        scaled,
    )


def _joined(rows: dict[str, list[Numbers]]) -> tuple[Numbers, dict[str, int]]:
    sections, at = {}, 0
    joined = {}
    for name, dtype in DTYPES.items():
        pieces = [piece.reshape(-1).astype(dtype, copy=False) for piece in rows[name]]
        joined[name] = np.concatenate(pieces) if pieces else np.empty(0, dtype)
        sections[name] = at
        at = -(-(at + joined[name].nbytes) // ALIGNMENT) * ALIGNMENT
    block = np.zeros(max(at, ALIGNMENT), np.uint8)
    for name, begin in sections.items():
        block[begin : begin + joined[name].nbytes] = joined[name].view(np.uint8)
    return block, sections
