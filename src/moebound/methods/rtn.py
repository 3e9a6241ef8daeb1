"""Round to nearest: `rtn:int4:g64`, what every low-bit quantizer is compared with.

Groups of 64 consecutive weights, each with a float16 scale and a zero point of 4 bits between its
extremes (asymmetric, as in AutoAWQ and GPTQ's baseline): 4 + 20/64 bits a weight, and a few bytes a
matrix. `rtn:int4:g64:coded` has the same weights; its integers are entropy-coded, as an array of
codec `bound`. No bound is known: what it leaves is measured, not promised.

`rtn:int1:g128` is the sign times the group's mean |weight|, 1 + 16/128 bits, as MC-MoE's PMQ has it
at 1 bit (2410.06270); on its own it is what CMoE's binary experts are without training.
`rtn:int2-3:g128` gives gate and up 2 bits and down 3: a plan's width for each linear block.

A group runs over the end of a row where rows are shorter. A matrix that groups do not divide ends
with a shorter one.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.bound import BoundCodec
from moebound.codec.envelope import MAX_SIZE
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import Encoding, GroupView, MatrixSpec, Method, Payload
from moebound.methods.packing import Codes, code, pack, packed_bytes, uncode, unpack
from moebound.types import Array

_OPTIONS = re.compile(r"int([1-8])(?:-([1-8]))?:g([0-9]{1,13})(:coded)?")
_HALF = 0.25
"""The bound that coded integers have had since version 1."""


@dataclass(frozen=True)
class Grouped(Method):
    """What quantizers of groups have in common: options, and how integers are written.

    bits: of each integer. group: weights that share a scale. coded: whether the integers are
    entropy-coded.
    """

    least_bits: ClassVar[int] = 2
    bits: int = 4
    group: int = 64
    coded: bool = False

    def __post_init__(self) -> None:
        """Raises MethodError for what no payload can say."""
        for name, value, least, most in (
            *(("bits", bits, self.least_bits, 8) for bits in self._bits()),
            ("group", self.group, 2, MAX_SIZE),
        ):
            if type(value) is not int or not least <= value <= most:
                raise MethodError(
                    f"method {self.id!r}: {name} {value!r}: expected a whole number from {least} "
                    f"to {most}"
                )
        if type(self.coded) is not bool:
            raise MethodError(f"method {self.id!r}: coded {self.coded!r}: expected True or False")

    def _bits(self) -> tuple[int, ...]:
        """Of all that it has integers for."""
        return (self.bits,)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """As many as an envelope of codec `bound`; integers without one take 2 bits each."""
        return BoundCodec.most_weights(n_bytes)

    @classmethod
    def from_options(cls, options: str) -> Self:
        found = _OPTIONS.fullmatch(options)
        widths = [int(width) for width in found.group(1, 2) if width] if found else []
        too_narrow = min(widths, default=0) < cls.least_bits
        if not found or too_narrow or not 2 <= int(found[3]) <= MAX_SIZE:
            raise cls._unknown(options)
        return cls._of(widths, int(found[3]), bool(found[4]))

    @classmethod
    def _of(cls, widths: Sequence[int], group: int, coded: bool) -> Self:
        """widths: one, or of gate and up, and of down."""
        if len(widths) > 1:
            raise cls._unknown(f"int{widths[0]}-{widths[1]}:g{group}")
        return cls(widths[0], group, coded)

    @classmethod
    def _unknown(cls, options: str) -> MethodError:
        return MethodError(
            f"method '{cls.id}:{options}': expected integers of int{cls.least_bits} to int8 and "
            f"groups of 2 weights or more, as in {cls.id}:int4:g64; then :coded, if the integers "
            "are to be entropy-coded"
        )

    @property
    def setting(self) -> str:
        return f"{self.id}:int{self.bits}:g{self.group}" + (":coded" if self.coded else "")

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        return Encoding(
            {
                expert.key: {
                    role: Payload(self.for_role(role).quantized(matrix.astype(np.float32)))
                    for role, matrix in expert.matrices.items()
                }
                for expert in group.experts
            }
        )

    def for_role(self, role: Role) -> Grouped:
        """What rounds the matrices of a role."""
        return self

    @abstractmethod
    def quantized(self, matrix: Array) -> bytes:
        """The payload of a matrix [rows, cols] float32."""

    def head(self) -> bytearray:
        """bits, flags, group."""
        out = bytearray([self.bits, int(self.coded)])
        put_varint(out, self.group)
        return out

    def write_codes(self, codes: Codes) -> bytes:
        """codes: [rows, cols]."""
        if not self.coded:
            return pack(codes, self.bits)
        return code(codes, _HALF)


@dataclass(frozen=True)
class Head:
    """A payload's beginning. group: weights of a group that the matrix has, so that one larger than
    the matrix takes no room. n_groups: of the matrix."""

    bits: int
    coded: bool
    group: int
    n_groups: int

    @classmethod
    def read(cls, read: FieldReader, spec: MatrixSpec) -> Head:
        bits, flags = read.take(2)
        group = read.varint()
        if not 1 <= bits <= 8 or flags > 1 or group < 2:
            raise CorruptionError(f"integers of {bits} bits, flags {flags}, groups of {group}")
        group = min(group, max(1, spec.size))
        return cls(bits, bool(flags), group, -(-spec.size // group))

    def weights(self, read: FieldReader, spec: MatrixSpec, zero: Array, step: Array) -> Array:
        """(q - zero) · step for the integers, which are all that is left, of spec's shape, float32.
        zero, step: [n_groups]."""
        groups = self._codes(read, spec)
        groups -= zero[:, None]
        groups *= step[:, None]
        weights: Array = groups.reshape(-1)[: spec.size].reshape(spec.shape)
        return weights

    def _codes(self, read: FieldReader, spec: MatrixSpec) -> Array:
        """[n_groups, group] float32; zeros behind the last weight."""
        data = read.take(read.left)
        if self.coded:
            codes = uncode(data, spec.shape).reshape(-1)
        else:
            codes = unpack(data, spec.size, self.bits).astype(np.float32)
        if behind := -len(codes) % self.group:
            codes = np.pad(codes, (0, behind))
        return codes.reshape(self.n_groups, self.group)


@dataclass(frozen=True)
class Rtn(Grouped):
    """A payload: head, scales (float16 each), zero points, integers. Of 1 bit there are no zero
    points, and an integer q is (2q - 1) times the scale. down: bits of down; None for `bits`."""

    id: ClassVar[str] = "rtn"
    least_bits: ClassVar[int] = 1
    down: int | None = None

    @classmethod
    def _of(cls, widths: Sequence[int], group: int, coded: bool) -> Self:
        one = len(set(widths)) == 1
        return cls(widths[0], group, coded, None if one else widths[1])

    @property
    def setting(self) -> str:
        widths = f"{self.bits}" if self.down is None else f"{self.bits}-{self.down}"
        return f"{self.id}:int{widths}:g{self.group}" + (":coded" if self.coded else "")

    def _bits(self) -> tuple[int, ...]:
        return (self.bits,) if self.down is None else (self.bits, self.down)

    def for_role(self, role: Role) -> Rtn:
        bits = self.bits if self.down is None or role != "down" else self.down
        return replace(self, bits=bits, down=None)

    def quantized(self, matrix: Array) -> bytes:
        flat, group = matrix.reshape(-1), min(self.group, max(1, matrix.size))
        # Padding repeats the last weight: the last group's extremes stay its own.
        groups = np.pad(flat, (0, -len(flat) % group), mode="edge").reshape(-1, group)
        if self.bits == 1:
            return self._signs(flat, groups, matrix.shape)
        scale, step, zero = asymmetric(groups, self.bits)
        codes = np.clip(np.rint(groups / step + zero), 0, 2**self.bits - 1).astype(np.uint8)
        own = codes.reshape(-1)[: len(flat)].reshape(matrix.shape)
        parts = scale.astype("<f2").tobytes(), pack(zero.astype(np.uint8), self.bits)
        return bytes(self.head()) + b"".join(parts) + self.write_codes(own)

    def _signs(self, flat: Array, groups: Array, shape: tuple[int, ...]) -> bytes:
        size = np.abs(groups)
        if behind := groups.size - len(flat):
            size[-1, len(size[-1]) - behind :] = np.nan  # what fills up the last group is no weight
        with np.errstate(over="ignore"):
            scale = np.nanmean(size, axis=1, dtype=np.float64).astype(np.float16)
        if not np.isfinite(scale).all() or not np.isfinite(flat).all():
            raise MethodError("a scale is beyond float16, or a weight is not finite")
        codes = (flat >= 0).astype(np.uint8).reshape(shape)
        return bytes(self.head()) + scale.astype("<f2").tobytes() + self.write_codes(codes)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        head = Head.read(read, spec)
        scale = np.frombuffer(read.take(2 * head.n_groups), "<f2").astype(np.float32)
        if not np.isfinite(scale).all():
            raise CorruptionError("a scale that is not finite")
        if head.bits == 1:
            return head.weights(read, spec, np.full_like(scale, 0.5), 2 * scale)
        zeros = read.take(packed_bytes(head.n_groups, head.bits))
        zero = unpack(zeros, head.n_groups, head.bits).astype(np.float32)
        return head.weights(read, spec, zero, np.where(scale > 0, scale, np.float32(1)))


def asymmetric(groups: Array, bits: int) -> tuple[Array, Array, Array]:
    """The grid between the extremes of each group [..., g] float32: scale as float16, the step that
    it stands for, and the zero point; [..., 1] each. Raises MethodError for no finite scale."""
    # Zero is in every group's range, so a zero point of so many bits can name it.
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    high = np.maximum(groups.max(axis=-1, keepdims=True), 0)
    top = np.float32(2**bits - 1)
    with np.errstate(over="ignore"):
        scale = ((high - low) / top).astype(np.float16)
    if not np.isfinite(scale).all():
        raise MethodError("a scale is beyond float16, or a weight is not finite")
    step = scale.astype(np.float32)
    step = np.where(step > 0, step, np.float32(1))
    zero: Array = np.clip(np.rint(-low / step), 0, top)
    return scale, step, zero


def take_groups(payload: memoryview, spec: MatrixSpec) -> Array:
    """Integers of groups with a float16 scale and zero point each: (q - z) · s, float32."""
    read = FieldReader(payload, 0)
    head = Head.read(read, spec)
    if head.bits < 2:
        raise CorruptionError(f"integers of {head.bits} bits")
    scale, zero = (
        np.frombuffer(read.take(2 * head.n_groups), "<f2").astype(np.float32) for _ in range(2)
    )
    return head.weights(read, spec, zero, scale)
