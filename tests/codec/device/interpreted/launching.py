"""Decode on the CPU through the kernels, many segments a program: the interpreter is slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.device import DecodeBatch, Schedule

MANY = Schedule(together=32)


def decoded(
    data: Sequence[bytes],
    *,
    offsets: Sequence[int] | None = None,
    schedule: Schedule = MANY,
) -> list[npt.NDArray[Any]]:
    """The bit patterns of each array, flat. Raises what `check` raises.

    What is written outside an array's own memory fails here.
    """
    batch = DecodeBatch.of(data, offsets=offsets)
    compressed = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    batch.pack(data, compressed)
    blocks = [
        torch.full((stream.spec.size + 128,), -7.0, dtype=torch_dtype(stream.spec.dtype))
        for stream in batch.streams
    ]
    batch.launch(compressed, [block[64:-64] for block in blocks], schedule).check()
    patterns = [block.view(_INTEGERS[block.element_size()]).numpy() for block in blocks]
    for guarded in patterns:
        assert len(set(guarded[:64].tolist() + guarded[-64:].tolist())) == 1
    return [p[64:-64].view(f"u{p.itemsize}") for p in patterns]


_INTEGERS = {2: torch.int16, 4: torch.int32}


def patterns(array: object) -> npt.NDArray[Any]:
    """Of a NumPy array or a tensor, flat."""
    if isinstance(array, torch.Tensor):
        flat = array.reshape(-1).view(_INTEGERS[array.element_size()]).numpy()
    else:
        flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{flat.itemsize}")
