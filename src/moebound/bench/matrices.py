"""What codecs are measured on: synthetic experts of full size, and real weights.

Synthetic matrices are [2048, 1408] (an expert of Moonlight-16B-A3B, one projection), standard
deviation about 0.02, seeds fixed: the same values in every run and on every machine.

    gaussian             independent N(0, 1): no codec can do better than its entropy
    gaussian-rows        each row times a log-normal scale, σ = 0.3: what trained weights look like
    student5, -rows      heavy tails, Student's t with 5 degrees of freedom
    gaussian-rows-cols   rows and columns scaled
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebound.checkpoint import TensorInfo, open_checkpoint, read_header, read_tensor
from moebound.errors import CheckpointError
from moebound.types import NUMPY_DTYPES, Array, DType

FULL_SIZE = (2048, 1408)
SCALE = 0.02
ROW_SPREAD = 0.3
MAX_WEIGHTS = 8 << 20
MIN_WEIGHTS = 1 << 12


@dataclass(frozen=True)
class Matrix:
    """One input. array: [rows, cols], contiguous. source: where it comes from, in words."""

    name: str
    array: Array
    source: str


SYNTHETIC = ("gaussian", "gaussian-rows", "student5", "student5-rows", "gaussian-rows-cols")


def synthetic(
    names: Sequence[str] = SYNTHETIC,
    *,
    shape: tuple[int, int] = FULL_SIZE,
    dtypes: Sequence[DType] = ("BF16",),
    seed: int = 0,
) -> list[Matrix]:
    """Synthetic matrices by name, each in each dtype. Raises CheckpointError for other names."""
    return [
        Matrix(
            name if dtype == "BF16" else f"{name}-{dtype.lower()}",
            (SCALE * _unit(name, shape, seed)).astype(NUMPY_DTYPES[dtype]),
            f"synthetic, seed {seed}",
        )
        for dtype in dtypes
        for name in names
    ]


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    limit: int = 6,
    pattern: str = "",
    max_weights: int = MAX_WEIGHTS,
) -> list[Matrix]:
    """The matrices of a source: the synthetic ones (None), a .safetensors file, or a checkpoint.

    limit: at most this many of a file or checkpoint, spread evenly. pattern: a regular expression
    that tensor names must contain. max_weights: of larger matrices only the first rows are taken.

    Raises as `open_checkpoint`; CheckpointError too if no matrix is left.
    """
    if source is None:
        return synthetic()
    path = Path(source).expanduser()
    found = _of_file(path, pattern) if path.is_file() else _of_experts(source, pattern)
    if not found:
        raise CheckpointError(
            f"{source}: no matrix of BF16, F16 or F32 (in a file: of {MIN_WEIGHTS} weights or "
            f"more) has a name that matches {pattern!r}"
        )
    step = max(1.0, len(found) / max(1, limit))
    chosen = [found[int(i * step)] for i in range(min(limit, len(found)))]
    return [_read(name, tensor, index, max_weights) for name, tensor, index in chosen]


_Found = list[tuple[str, TensorInfo, int | None]]


def _of_file(path: Path, pattern: str) -> _Found:
    tensors, _ = read_header(path)
    return [
        (name, tensor, None)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
        and tensor.dtype in NUMPY_DTYPES
        and np.prod(tensor.shape) >= MIN_WEIGHTS
        and re.search(pattern, name)
    ]


def _of_experts(source: str | os.PathLike[str], pattern: str) -> _Found:
    return [
        (matrix.name if matrix.index is None else f"{matrix.name}[{matrix.index}]", *where)
        for expert in open_checkpoint(source).experts()
        for matrix in expert.matrices
        if re.search(pattern, matrix.name)
        for where in [(matrix.source, matrix.index)]
    ]


def _read(name: str, tensor: TensorInfo, index: int | None, max_weights: int) -> Matrix:
    array = read_tensor(tensor, index)
    rows = max(1, min(array.shape[0], max_weights // array.shape[1]))
    if rows < array.shape[0]:
        name = f"{name}[:{rows}]"
    return Matrix(name, np.ascontiguousarray(array[:rows]), tensor.file.name)


def _unit(name: str, shape: tuple[int, int], seed: int) -> npt.NDArray[np.float64]:
    """Values of about unit variance."""
    if name not in SYNTHETIC:
        raise CheckpointError(f"synthetic matrix {name!r}: expected one of {', '.join(SYNTHETIC)}")
    rng = np.random.default_rng([seed, SYNTHETIC.index(name)])
    values: npt.NDArray[np.float64]
    if name.startswith("student5"):
        values = rng.standard_t(5, shape) / np.sqrt(5 / 3)
    else:
        values = rng.standard_normal(shape)
    if "-rows" in name:
        values *= np.exp(ROW_SPREAD * rng.standard_normal((shape[0], 1)))
    if "-cols" in name:
        values *= np.exp(ROW_SPREAD * rng.standard_normal((1, shape[1])))
    return values
