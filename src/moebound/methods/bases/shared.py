"""What methods with shared bases have in common: bases lie along the model's width, down turned."""

from __future__ import annotations

import struct

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.arrays import dtype_name
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError
from moebound.methods.base import ExpertView, MatrixSpec
from moebound.methods.bases.approximation import Option, as_stored, is_transposed
from moebound.methods.bases.exact import WIDTHS, take_dense, write_dense
from moebound.types import Array

GATE_UP_ONLY = Option("gate_up_only", means="as published: down stays as it is")


def stays(role: Role, gate_up_only: bool) -> bool:
    """Whether a matrix has no basis."""
    return gate_up_only and role == "down"


def is_turned(expert: ExpertView, role: Role) -> bool:
    """Whether the model's width lies along the columns of what is stored: of gate and up it does
    where they are [in, out], of down where it is [out, in]."""
    return is_transposed(expert, role) != (role == "down")


def upright(expert: ExpertView, role: Role) -> Array:
    """[p, d] float64, d the model's width."""
    found = as_stored(expert, role)
    return found.T if is_turned(expert, role) else found


def as_is(expert: ExpertView, role: Role) -> bytes:
    """A payload of kind 0: the matrix."""
    matrix = expert.matrices[role]
    return b"\0" + write_dense(matrix.astype(np.float32), 16, dtype_name(matrix.dtype))


def take_as_is(read: FieldReader, spec: MatrixSpec) -> Array:
    return take_dense(read, spec.shape)


def write_head(out: bytearray, bits: int, n_groups: int, seed: int) -> None:
    """Of a part with bases."""
    out += struct.pack("<BQ", bits, seed)
    put_varint(out, n_groups)


def take_head(read: FieldReader) -> tuple[int, int, int]:
    """bits, groups, seed. Raises CorruptionError."""
    bits, seed = struct.unpack("<BQ", bytes(read.take(9)))
    n_groups = read.varint()
    if bits not in WIDTHS or n_groups > read.left:
        raise CorruptionError(f"{n_groups} bases of {bits} bits")
    return bits, n_groups, seed


# Neurons

HALVES, TURNS = 1, 2


def neurons(expert: ExpertView, role: Role) -> tuple[Array, int]:
    """[p, .] float64: a hidden neuron a row, with what it takes to put it back (`from_neurons`).

    Of gate and up in one, a row has both.
    """
    rows, turned = upright(expert, role), is_turned(expert, role)
    fold = 0
    if role == "gate_up":
        fold = TURNS if expert.interleaved else HALVES
        p = len(rows) // 2
        rows = (
            rows.reshape(p, -1) if fold == TURNS else np.concatenate((rows[:p], rows[p:]), axis=1)
        )
    return rows, int(turned) | fold << 1


def from_neurons(rows: Array, how: int, shape: tuple[int, ...]) -> Array:
    """A matrix as it is stored, of `shape`. Raises CorruptionError."""
    turned, fold = how & 1, how >> 1
    upright_shape = shape[::-1] if turned else shape
    if fold > TURNS or rows.size != np.prod(shape) or len(shape) != 2:
        raise CorruptionError(f"neurons of {how} for shape {shape}")
    if fold == HALVES:
        rows = np.concatenate(np.split(rows, 2, axis=1))
    rows = rows.reshape(upright_shape)
    return np.ascontiguousarray(rows.T if turned else rows)
