"""Matrices as codes: a byte a weight, what the bytes stand for, and the exact patches beside them.

`decode_codes` does all that decoding does but for the last step: a weight stays the number of its
bin. What it stands for is an entry of a table, or (code + first) · step cast to the dtype, the step
being that of its column or row, or its column's times its row's factor; all are to the bit what
`decode` gives. So a product of codes (native/product/) multiplies by the weights that the
certificate is about. docs/format.md, sections 4.3, 4.7 and 4.8, has every way.

A patched place has the code of 0, and its weight stands beside, exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moebound import _native
from moebound.codec import envelope
from moebound.codec.base import Positions
from moebound.codec.bound import DTYPE_CODES, EXACT, SCALED, BoundCodec
from moebound.codec.envelope import Envelope
from moebound.codec.fields import FieldReader
from moebound.errors import CodecError, CorruptionError, FormatError
from moebound.types import Array, DType

MOST_CODES = 256
"""What a byte has."""

_HEAD_BYTES = 512
_LAYOUT_BYTES = 48  # the payload's length, and its layout as far as the alphabet

Read = Callable[[int, int], bytes]
"""Bytes of an envelope from an offset on, so many or as many as there are."""


def _none() -> Array:
    return np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class CodeMatrix:
    """codes: [rows · cols] uint8, memory of whoever asked. shape: [rows, cols], of dtype.

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
    patched: Positions
    patch_weights: Array
    factors: Array = field(default_factory=_none)

    def __post_init__(self) -> None:
        kernel = _native.Codes(
            self.codes, *self.shape, DTYPE_CODES[self.dtype], self.table, self.steps, self.by_row,
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

    def weights(self) -> Array:
        """[rows, cols] as `decode` gives them, patterns: bfloat16 as uint16 bits."""
        out = np.empty(len(self.codes), _PATTERNS[self.dtype])
        self._kernel.weights(out)  # type: ignore[attr-defined]
        return out.reshape(self.shape)

    def copy(self, codes: Array) -> CodeMatrix:
        """The same with its codes elsewhere."""
        return CodeMatrix(
            codes, self.shape, self.dtype, self.table, self.steps, self.by_row, self.first,
            self.patched, self.patch_weights, self.factors,
        )  # fmt: skip


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
        [(job.matrix._kernel, *job[1:]) for job in jobs],  # type: ignore[attr-defined]
        x,
        out,
        threads,
    )


_PATTERNS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def decode_codes(parsed: Envelope, out: Array, *, threads: int = 1) -> CodeMatrix:
    """Decode a parsed envelope of codec `bound` into codes. out: flat uint8, of its size.

    Raises CodecError for what has no codes of a byte (another codec, an exact copy, wide
    alphabets; `has_codes` tells before), CorruptionError for damaged bytes.
    """
    spec = parsed.spec
    if len(spec.shape) != 2 or out.shape != (spec.size,) or out.dtype != np.uint8:
        raise CodecError(
            f"codes of shape {spec.shape}: expected a matrix, and {spec.size} bytes for it"
        )
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
        out, (spec.shape[0], spec.shape[1]), spec.dtype, table, steps, by_row, first,
        parsed.misses.astype(np.uint64), parsed.values.astype(np.float32), factors,
    )  # fmt: skip


def _values(patterns: Array, dtype: DType) -> Array:
    """Patterns in 32-bit words as float32."""
    if dtype == "BF16":
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return patterns.astype(np.uint16).view(np.float16).astype(np.float32)
    return patterns.astype(np.uint32).view(np.float32)


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
