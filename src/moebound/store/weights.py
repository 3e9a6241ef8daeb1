"""All weights of a store, decoded, one tensor at a time: what loaders of engines ask for.

    for name, tensor in decoded_weights(open_store("a/store")): ...

Names, shapes and dtypes are those of the source's checkpoint, so whoever loads that can load this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

from moebound.codec import thread_count
from moebound.codec.arrays import to_torch
from moebound.codec.certificate import sha256
from moebound.errors import StoreError
from moebound.jobs.ordered import in_order
from moebound.store.checks import check_hash, check_parts, hashes_are_checked
from moebound.store.decompress import check_plain
from moebound.store.reader import Store, StoredMatrix
from moebound.store.stored import read_tensor_bytes

if TYPE_CHECKING:
    import torch

_Part: TypeAlias = "tuple[str, StoredMatrix | None]"
"""The tensor that it is (a slice of), and which matrix; None for one that belongs to no expert."""

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""How torch calls what safetensors calls so."""


def decoded_weights(
    store: Store, *, experts: Collection[int] | None = None, jobs: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in the store, by name: `model.layers.2` before
    `model.layers.10`, so that what belongs to one module comes together.

    experts: numbers of the routed experts that are wanted, where they have tensors of their own;
    None for all. jobs: tensors at a time, as for `compress`. Memory is that of jobs + 1 matrices or
    tensors, and of one 3-D tensor where a layer's experts are one.

    Raises StoreError for edited routing, which no list of weights can say; and as reading and
    decoding do, CorruptionError where hashes differ.
    """
    check_plain(store)
    check_parts(store)
    parts = _parts(store, experts)
    checked = hashes_are_checked()
    jobs = thread_count() if jobs is None else jobs

    def read(part: _Part) -> torch.Tensor:
        name, matrix = part
        if matrix is None:
            return read_other(store, name, checked=checked)
        # Few at a time share the threads as `decompress` does.
        return to_torch(matrix.decode(matrix.read(), threads=1 if jobs > 1 else None))

    slices = Counter(name for name, matrix in parts if matrix is not None)
    with closing(in_order(read, parts, jobs=jobs)) as tensors:
        stack: torch.Tensor | None = None
        for (name, matrix), tensor in zip(parts, tensors, strict=True):
            index = None if matrix is None else matrix.record.index
            if index is None:
                yield name, tensor
                continue
            # Opening has seen that slices are there, each once, from 0.
            if stack is None:
                stack = tensor.new_empty((slices[name], *tensor.shape))
            stack[index] = tensor
            if index == slices[name] - 1:
                whole, stack = stack, None
                yield name, whole
                del whole  # the receiver may be done with it; the next is as large


def read_other(store: Store, name: str, *, checked: bool) -> torch.Tensor:
    """A tensor that belongs to no expert. checked: compare its hash. The one place where they are
    read."""
    import torch

    if name in store.coded:
        stored = store.coded[name]
        return to_torch(stored.decode(stored.read()))
    tensor, record = store.tensors[name], store.kept[name]
    data = read_tensor_bytes(tensor)
    if checked:
        check_hash(tensor, record.sha256, sha256(data))
    if tensor.dtype not in _TORCH:
        raise StoreError(
            f"{tensor.file}: tensor {name!r} is {tensor.dtype}, expected one of {', '.join(_TORCH)}"
        )
    dtype: torch.dtype = getattr(torch, _TORCH[tensor.dtype])
    flat = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
    return flat.reshape(tensor.shape)


def _parts(store: Store, experts: Collection[int] | None) -> list[_Part]:
    found: list[_Part] = [(name, None) for name in (*store.kept, *store.coded)]
    for expert in store.experts():
        for matrix in expert.matrices:
            apart = matrix.record.index is None and not expert.key.shared
            if experts is None or not apart or expert.key.expert in experts:
                found.append((matrix.record.name, matrix))
    return sorted(found, key=lambda part: (_natural(part[0]), _index(part[1])))


def _index(matrix: StoredMatrix | None) -> int:
    return 0 if matrix is None or matrix.record.index is None else matrix.record.index


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by value: layer 2 is before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"\.", name)]
