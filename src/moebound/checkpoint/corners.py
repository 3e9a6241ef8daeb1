"""A checkpoint's routed experts, named by a few of their weights: the first of the first matrix,
the first and the last of the down projection of each.

They stand in the same place whether a matrix is transposed, fused, or interleaved, and are the same
numbers in float32 once a model is loaded: so a loaded model and its checkpoint have one name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from moebound.checkpoint.experts import ExpertMatrix
from moebound.checkpoint.shards import read_into
from moebound.checkpoint.source import Checkpoint
from moebound.types import NUMPY_DTYPES


def name_of(values: Iterable[float]) -> str:
    """Three weights of every routed expert, in the order of the model -> their name."""
    return hashlib.sha256(np.fromiter(values, "<f4").tobytes()).hexdigest()[:16]


def experts_name(checkpoint: Checkpoint) -> str:
    """Reads a few bytes of each expert. Raises as `read_into`."""
    values: list[float] = []
    for expert in checkpoint.experts():
        first, last = expert.matrices[0], expert.matrices[-1]
        values += [_weight(first, 0), _weight(last, 0), _weight(last, last.size - 1)]
    return name_of(values)


def _weight(matrix: ExpertMatrix, at: int) -> float:
    dtype = NUMPY_DTYPES[matrix.dtype]
    found = bytearray(dtype.itemsize)
    start = (matrix.index or 0) * matrix.n_bytes + at * dtype.itemsize
    read_into(matrix.source, memoryview(found), start=start)
    return float(np.frombuffer(found, dtype)[0])
