"""Matrices as codes: a byte or four bits a weight, what they stand for, and exact patches beside.

`decode_codes` does all that decoding does but for the last step: a weight stays the number of its
bin. What it stands for is an entry of a table, or (code + first) · step cast to the dtype, the step
being that of its column or row, or its column's times its row's factor; all are to the bit what
`decode` gives. So a product of codes (native/product/) multiplies by the weights that the
certificate is about. docs/format.md, sections 4.3, 4.7 and 4.8, has every way.

A patched place has the code of 0, and its weight stands beside, exact.

Codes of four bits are the sixteen around that of 0. The few weights that have another one are
patches, too, and nothing else changes: the weights are to the bit the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moebound import _native
from moebound.codec import envelope
from moebound.codec.bound import DTYPE_CODES, EXACT, SCALED, BoundCodec
from moebound.codec.envelope import Envelope
from moebound.codec.fields import FieldReader
from moebound.errors import CodecError, CorruptionError, FormatError
from moebound.types import Array, DType

Bits = Literal[8, 4]
"""Of a code."""

MOST_CODES = 256
"""What a byte has."""

MOST_CODED = 1 << 32
"""Weights of a matrix: of places that are patched, which have 32 bits."""

_HEAD_BYTES = 512
_LAYOUT_BYTES = 48  # the payload's length, and its layout as far as the alphabet
_TABLES_BYTES = 16 << 10  # the layout as far as the frequencies, nearly always

Read = Callable[[int, int], bytes]
"""Bytes of an envelope from an offset on, so many or as many as there are."""


def _none() -> Array:
    return np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class CodeMatrix:
    """codes: flat uint8, memory of whoever asked: [rows · cols], or, of four bits each,
    [rows · ⌈cols / 2⌉], the even column's in the lower half. shape: [rows, cols], of dtype.

    table: what each code stands for; empty where there are steps, [cols] or by_row [rows].
    first: the bin of code 0. patched, patch_weights: flat places and what belongs there.
    factors: [rows], which steps of columns are multiplied by; empty for none.
    """

    codes: Array
    shape: tuple[int, int]
    dtype: DType
    table: Array
    steps: Array
    by_row: bool
    first: int
    patched: npt.NDArray[np.uint32]
    patch_weights: Array
    factors: Array = field(default_factory=_none)
    bits: Bits = 8

    def __post_init__(self) -> None:
        kernel = _native.Codes(
            self.codes, self.bits, *self.shape, DTYPE_CODES[self.dtype], self.table, self.steps,
            self.by_row,
            self.factors, self.first, -self.first, self.patched, self.patch_weights,
        )  # fmt: skip
        object.__setattr__(self, "_kernel", kernel)

    @property
    def aside_bytes(self) -> int:
        """Memory beside the codes."""
        arrays = self.table, self.steps, self.factors, self.patched, self.patch_weights
        return sum(array.nbytes for array in arrays)

    def product(self, x: Array, out: Array, *, stride: int, threads: int = 1) -> None:
        """Σ over columns, in float32, cast to x's dtype: native/product/product.h has the order.

        x: flat [T · cols], bfloat16 as uint16 bits. out: flat, of the same dtype, from the first
        value of the first token on; tokens are `stride` apart.
        """
        n_tokens, left = divmod(len(x), self.shape[1])
        if left:
            raise ValueError(f"x: {len(x)} values, expected {self.shape[1]} a token")
        products([Product(self, 0, n_tokens, 0, stride)], x, out, threads=threads)

    def weights(self, first: int = 0, end: int | None = None, *, threads: int = 1) -> Array:
        """Rows from `first` to `end`, [end - first, cols], as `decode` gives them, patterns:
        bfloat16 as uint16 bits."""
        n_rows = (self.shape[0] if end is None else end) - first
        out = np.empty(n_rows * self.shape[1], _PATTERNS[self.dtype])
        self._kernel.weights(out, first, threads)  # type: ignore[attr-defined]
        return out.reshape(n_rows, self.shape[1])

    def copy(self, codes: Array) -> CodeMatrix:
        """The same with its codes elsewhere."""
        return replace(self, codes=codes)


class Product(NamedTuple):
    """One of several: x from place x_first on, [tokens · cols]; the first token's result from place
    out_first on, tokens `stride` apart."""

    matrix: CodeMatrix
    x_first: int
    n_tokens: int
    out_first: int
    stride: int


def products(jobs: Iterable[Product], x: Array, out: Array, *, threads: int = 1) -> None:
    """As many `CodeMatrix.product`, to the bit, whose rows the threads share: one call keeps them
    busy where each product by itself would be too small. No two may write to one place."""
    _native.products(
        [(_kernel(job.matrix), *job[1:]) for job in jobs],
        x,
        out,
        threads,
    )


class GatedExpert(NamedTuple):
    """An expert with a gate: x from place x_first on, [tokens · gate's cols]; its result from place
    out_first on, [tokens · down's rows]. up: None where its rows stand behind gate's in one
    matrix."""

    gate: CodeMatrix
    up: CodeMatrix | None
    down: CodeMatrix
    x_first: int
    n_tokens: int
    out_first: int


def gated_experts(
    experts: Iterable[GatedExpert], x: Array, out: Array, *, threads: int = 1
) -> None:
    """down · (silu(gate · x) · (up · x)) of each, every step rounded to x's dtype.

    Products are those of `CodeMatrix.product`; x, out: flat, as there. A token's result depends on
    nothing but the token and the expert. No two may write to one place.
    """
    jobs = [(_kernel(one.gate), one.up and _kernel(one.up), _kernel(one.down), *one[3:])
            for one in experts]  # fmt: skip
    _native.gated_experts(jobs, x, out, threads)


def _kernel(matrix: CodeMatrix) -> Any:
    return matrix._kernel  # type: ignore[attr-defined]


_PATTERNS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def code_bytes(shape: tuple[int, int], bits: Bits) -> int:
    """What the codes of a matrix take."""
    return shape[0] * -(-shape[1] * bits // 8)


def decode_codes(parsed: Envelope, out: Array, *, bits: Bits = 8, threads: int = 1) -> CodeMatrix:
    """Decode a parsed envelope of codec `bound` into codes. out: flat uint8, of `code_bytes`.

    Raises CodecError for what has no codes of a byte (another codec, an exact copy, wide
    alphabets; `has_codes` tells before), CorruptionError for damaged bytes.
    """
    spec = parsed.spec
    if len(spec.shape) != 2:
        raise CodecError(f"codes of shape {spec.shape}: expected a matrix")
    shape = spec.shape[0], spec.shape[1]
    if spec.size >= MOST_CODED:
        raise CodecError(f"codes of shape {shape}: expected fewer than {MOST_CODED} weights")
    if out.shape != (code_bytes(shape, bits),) or out.dtype != np.uint8:
        raise CodecError(f"codes of shape {shape}: expected {code_bytes(shape, bits)} bytes")
    if bits == 4:
        return packed(decode_codes(parsed, np.empty(spec.size, np.uint8), threads=threads), out)
    if parsed.codec != BoundCodec.id or not len(parsed.payload) or parsed.payload[0] == EXACT:
        raise CodecError(f"codec {parsed.codec!r}: its weights are no codes")
    if parsed.codec_version > BoundCodec.newest():
        raise FormatError(
            f"codec {parsed.codec!r} version {parsed.codec_version}: "
            f"this moebound reads up to version {BoundCodec.newest()}"
        )
    dtypes = DTYPE_CODES[spec.source_dtype], DTYPE_CODES[spec.dtype]
    if spec.abs_bound <= 0:
        raise CorruptionError("bound: a bound of 0 in a payload that is no exact copy")
    try:
        found = _native.bound_codes(parsed.payload, out, *dtypes, spec.abs_bound, threads)
    except _native.Corrupt as error:
        raise CorruptionError(f"bound: {error}") from None
    n_codes, first, patterns, by_row, steps, factors = found
    if not -MOST_CODES < first <= 0:
        raise CodecError(f"bound: bins from {first} on: a byte has no code of 0")
    if len(steps) and len(steps) != spec.shape[0 if by_row else 1]:
        raise CorruptionError(f"bound: {len(steps)} steps of a matrix {spec.shape}")
    table = np.empty(0, np.float32)
    if not len(steps):
        table = np.zeros(max(n_codes, 1 - first), np.float32)
        table[:n_codes] = _values(patterns, spec.dtype)
    if len(parsed.misses):
        out[parsed.misses.astype(np.int64)] = -first
    return CodeMatrix(
        out, shape, spec.dtype, table, steps, by_row, first,
        parsed.misses.astype(np.uint32), parsed.values.astype(np.float32), factors,
    )  # fmt: skip


def packed(matrix: CodeMatrix, out: Array) -> CodeMatrix:
    """The same matrix in codes of four bits. out: flat uint8, of `code_bytes`.
    native/bound/packed.h is the quick way."""
    zero, (rows, cols) = -matrix.first, matrix.shape
    start = max(zero - _WINDOW // 2, 0)
    codes = matrix.codes.astype(np.int64) - start
    outside = np.flatnonzero((codes < 0) | (codes >= _WINDOW))
    outside = np.setdiff1d(outside, matrix.patched.astype(np.int64))
    weights = matrix.weights().reshape(-1)[outside]
    codes[outside] = zero - start
    codes = np.pad(codes.reshape(rows, cols), ((0, 0), (0, cols % 2)), constant_values=zero - start)
    out[:] = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1)
    places = np.concatenate([matrix.patched.astype(np.int64), outside])
    order = np.argsort(places)
    table = matrix.table[start : start + _WINDOW]
    return replace(
        matrix,
        codes=out,
        bits=4,
        table=np.pad(table, (0, _WINDOW - len(table))) if len(table) else table,
        first=matrix.first + start,
        patched=places[order].astype(np.uint32),
        patch_weights=np.concatenate(
            [matrix.patch_weights, _values(weights.view(f"u{weights.itemsize}"), matrix.dtype)]
        )[order],
    )


_WINDOW = 16


def _values(patterns: Array, dtype: DType) -> Array:
    """Patterns, in words of their own size or of 32 bits, as float32."""
    if dtype == "BF16":
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return patterns.astype(np.uint16).view(np.float16).astype(np.float32)
    return patterns.astype(np.uint32).view(np.float32)


def most_outside(read: Read, size: int) -> int | None:
    """At most so many of a matrix's weights have none of the sixteen codes that four bits hold, by
    the tables in front of the payload; None where they do not say. Reads as `has_codes`."""
    try:
        _, at = envelope.find_payload(read(0, _HEAD_BYTES))
        fields = FieldReader(memoryview(read(at, _TABLES_BYTES)), 0)
        n_bytes = fields.varint()
        head = fields.take(min(n_bytes, fields.left))
    except FormatError:
        return None
    most: int | None = _native.bound_most_outside(head, size, n_bytes)
    return most


def has_codes(read: Read) -> str | None:
    """Why an envelope cannot be decoded to codes of a byte; None if it can.

    Reads its head, and that of its payload, and checks no checksum: bytes that turn out to be
    damaged are found when they are decoded.
    """
    try:
        head = read(0, _HEAD_BYTES)
        codec, at = envelope.find_payload(head)
        if codec != BoundCodec.id:
            return f"codec {codec!r} has no codes"
        rest = head[at:] if at + _LAYOUT_BYTES <= len(head) else read(at, _LAYOUT_BYTES)
        fields = FieldReader(memoryview(rest), 0)
        layout = bytes(fields.take(min(fields.varint(), fields.left)))
        if not layout or layout[0] == EXACT:
            return "an exact copy has no codes"
        scaled = layout[0] >= SCALED
        low_bits = layout[4] & 15 if scaled else layout[2]
        stretched = scaled and layout[0] & 4
        fields = FieldReader(memoryview(layout), 5 if stretched or not scaled else 6)
        fields.varint()  # columns
        fields.varint()  # rows of a segment
        zigzag, n_symbols = fields.varint(), fields.varint()
    except (FormatError, IndexError):
        return "its head is damaged"
    first = ((zigzag >> 1) ^ -(zigzag & 1)) << low_bits
    if n_symbols << low_bits > MOST_CODES or not -MOST_CODES < first <= 0:
        return f"{n_symbols << low_bits} codes from {first} on: a byte has {MOST_CODES}"
    return None
