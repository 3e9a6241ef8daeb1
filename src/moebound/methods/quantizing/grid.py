"""Integers in groups along a matrix's inputs: what `gptq_re`, `moequant_re`, `awq_re` and
`moqe_re` store.

    W_ij ≈ (q_ij - z_ig) s_ig c_j       g = j // group

A matrix is looked at as [out, in], whichever way the checkpoint has it. Each row has groups of its
own, the last of them shorter where they do not divide: no group runs over the end of a row, as one
of `rtn` does. z is 2^(b-1) and not stored where the grid is symmetric; c is stored by AWQ alone. So
a matrix takes q(O, N, b, g) = ceil(O N b / 8) + 2 O ceil(N/g) bytes, ceil(O ceil(N/g) b / 8) more
with zero points and 2 N more with c, and a head of 3 to 8 bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import MatrixSpec
from moebound.methods.packing import Codes, code, pack, packed_bytes, uncode, unpack
from moebound.methods.quantizing.upright import Upright
from moebound.methods.rtn import Grouped
from moebound.types import Array

_CODED, _TURNED, _SYMMETRIC, _SCALED = 1, 2, 4, 8
_HALF = 0.25


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix [O, N]. codes: its integers. scale: [O, G] float16. zero: [O, G], None where it is
    2^(b-1) throughout. columns: c, [N] float16, None for ones."""

    codes: Codes
    scale: Array
    zero: Codes | None = None
    columns: Array | None = None


@dataclass(frozen=True)
class Grid(Upright, Grouped):
    """What quantizers of groups along the inputs have in common."""

    def payload(self, matrix: Array, moments: Array | None, flip: bool) -> bytes:
        return self._written(self.fitted(matrix, moments), flip)

    @abstractmethod
    def fitted(self, matrix: Array, moments: Array | None) -> Quantized:
        """Of a matrix [O, N] float32, finite. moments: H of its inputs, [N, N], or its diagonal."""

    def quantized(self, matrix: Array) -> bytes:
        return self._written(self.fitted(matrix, None), False)

    def _written(self, parts: Quantized, flip: bool) -> bytes:
        if not np.isfinite(parts.scale).all():
            raise MethodError("a scale is beyond float16")
        flags = _CODED * self.coded | _TURNED * flip
        flags |= _SYMMETRIC * (parts.zero is None) | _SCALED * (parts.columns is not None)
        out = bytearray([self.bits, flags])
        put_varint(out, min(self.group, max(1, parts.codes.shape[1])))
        out += parts.scale.astype("<f2").tobytes()
        if parts.zero is not None:
            out += pack(parts.zero, self.bits)
        if parts.columns is not None:
            out += parts.columns.astype("<f2").tobytes()
        out += code(parts.codes, _HALF) if self.coded else pack(parts.codes, self.bits)
        return bytes(out)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        bits, flags = read.take(2)
        group = read.varint()
        if not 2 <= bits <= 8 or flags > 15 or not group or len(spec.shape) != 2:
            raise CorruptionError(
                f"integers of {bits} bits, flags {flags}, groups of {group}, "
                f"{len(spec.shape)} dimensions"
            )
        flip = bool(flags & _TURNED)
        rows, cols = spec.shape[::-1] if flip else spec.shape
        if group > max(1, cols):
            raise CorruptionError(f"groups of {group} in rows of {cols}")
        groups = -(-cols // group)
        scale = _halves(read, rows * groups).reshape(rows, groups)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.full((rows, groups), 1 << (bits - 1), np.float32)
        if not flags & _SYMMETRIC:
            packed = read.take(packed_bytes(rows * groups, bits))
            zero[:] = unpack(packed, rows * groups, bits).reshape(rows, groups)
        columns = _halves(read, cols) if flags & _SCALED else None
        data = read.take(read.left)
        if flags & _CODED:
            weights = uncode(data, (rows, cols))
        else:
            weights = unpack(data, rows * cols, bits).astype(np.float32).reshape(rows, cols)
        for g, at in enumerate(range(0, cols, group)):
            part = weights[:, at : at + group]
            part -= zero[:, g : g + 1]
            part *= scale[:, g : g + 1]
        if columns is not None:
            weights *= columns
        return np.ascontiguousarray(weights.T) if flip else weights


def _halves(read: FieldReader, count: int) -> Array:
    found = np.frombuffer(read.take(2 * count), "<f2").astype(np.float32)
    if not np.isfinite(found).all():
        raise CorruptionError("a scale that is not finite")
    return found
