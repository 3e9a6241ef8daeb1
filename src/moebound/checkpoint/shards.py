"""Tensors in safetensors files, read with a hard bound on memory.

A safetensors file is 8 bytes with the header's length (little endian), the header (JSON: name ->
dtype, shape, data_offsets), and the tensors' bytes one after the other, without holes. The stock
reader maps the file, which makes resident memory grow to the size of the shard; here every read is
a positional read of exactly the bytes asked for. Nothing stays open between two reads, so a
`TensorInfo` can be used from any thread and sent to any process.

The rules checked are those of the stock library (github.com/huggingface/safetensors, `tensor.rs`),
and duplicate names besides: what is accepted here, the stock library accepts too.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from moebound.checkpoint.leftovers import HEAD_BYTES, leftover, why_missing
from moebound.errors import CheckpointError, CorruptionError, FormatError
from moebound.files.regular import read_whole, regular_file
from moebound.types import NUMPY_DTYPES, Array

MAX_HEADER_BYTES = 100_000_000
"""Longest header read, the limit of the stock library; also the limit for an index file."""

MAX_JSON_BYTES = 16_000_000
"""Longest other JSON file read; a config.json has some kilobytes."""

_SMALL_JSON = 1_000_000

_COMPUTED_BYTES = 32 << 20
"""Of rows that are computed at a time, as they come out; a row can be an expert."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "BF16": 16, "F16": 16, "I16": 16, "U16": 16,
    "BOOL": 8, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype that a safetensors header may name."""

# Those that NumPy can hold, for `read_tensor`. The bytes of the others can still be copied.
_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": NUMPY_DTYPES["BF16"], "F16": NUMPY_DTYPES["F16"], "F32": NUMPY_DTYPES["F32"],
    "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip


class Stored(Protocol):
    """How values are kept of which the file has something else; see `quantized.py`.

    parts: the tensors of the file that they are computed from, the largest first.
    """

    @property
    def parts(self) -> tuple[TensorInfo, ...]: ...

    def rows(self, first: int, last: int, *, drop_cache: bool = False) -> Array:
        """Rows first to last - 1 of the leading axis, in the tensor's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes are.

    dtype: in the spelling of the header ("BF16", "U8", ...). offset: of the first byte, counted
    from the start of the file. n_bytes: exactly shape x dtype, checked against the file's size.
    stored: None where these are the file's own bytes; else they are computed as they are read, and
    file and offset are of the largest part that they are computed from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int
    stored: Stored | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What the files have of it: itself, if nothing is computed."""
        return (self,) if self.stored is None else self.stored.parts

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.n_bytes for part in self.parts)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises FormatError for an unknown dtype or a size of no whole byte."""
    if dtype not in DTYPE_BITS:
        raise FormatError(f"dtype {dtype!r}: expected one of {', '.join(sorted(DTYPE_BITS))}")
    n_bytes, rest = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    if rest:
        raise FormatError(f"shape {list(shape)} of dtype {dtype} does not end on a whole byte")
    return n_bytes


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file, in the order of their bytes, and its metadata.

    Raises CheckpointError if the file cannot be read, FormatError if it is not safetensors or
    names an unknown dtype, CorruptionError if it contradicts itself.
    """
    try:
        with regular_file(file) as (fd, file_size):
            text = _header_text(file, fd, file_size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error

    _check_density(file, text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{file}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptionError(f"{file}: header: expected an object, found {type(header).__name__}")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptionError(f"{file}: __metadata__: expected an object of strings")

    data_start = 8 + len(text)
    tensors = [_tensor_info(file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    expected = data_start
    for tensor in tensors:
        if tensor.offset != expected:
            relation = (
                "overlaps the tensor before it"
                if tensor.offset < expected
                else "has a hole before it"
            )
            raise CorruptionError(
                f"{file}: tensor {tensor.name!r} {relation}: starts at byte "
                f"{tensor.offset - data_start} of the data, expected {expected - data_start}"
            )
        expected += tensor.n_bytes
    if expected != file_size:
        raise CorruptionError(
            f"{file}: header describes {expected} bytes, the file has {file_size}"
            + ("; it is cut short, download it again" if file_size < expected else "")
        )
    return {tensor.name: tensor for tensor in tensors}, metadata


def _header_text(file: Path, fd: int, file_size: int) -> bytes:
    instead = leftover(os.pread(fd, HEAD_BYTES, 0))
    if instead:
        raise FormatError(
            f"{file}: not a safetensors file: {instead} ({file_size} bytes, expected at least 8)"
        )
    if file_size < 8:
        raise FormatError(f"{file}: not a safetensors file: {file_size} bytes, expected at least 8")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{file}: not a safetensors file: header of {length} bytes, "
            f"expected at most {MAX_HEADER_BYTES}"
        )
    if length > file_size - 8:
        raise CorruptionError(
            f"{file}: header of {length} bytes in a file of {file_size}; "
            "it is cut short, download it again"
        )
    text = bytearray(length)
    _read_exactly(file, fd, memoryview(text), 8)
    if not text.startswith(b"{"):
        raise FormatError(f"{file}: not a safetensors file: header does not start with '{{'")
    return bytes(text)


def _check_density(file: Path, text: bytes) -> None:
    """Raises CorruptionError for long JSON of little but brackets: 3 bytes of it take 64 of memory.
    A tensor's entry has 3 in 46 bytes or more."""
    brackets = text.count(b"[") + text.count(b"{")
    if len(text) > _SMALL_JSON and 8 * brackets > len(text):
        raise CorruptionError(
            f"{file}: {len(text)} bytes of JSON with {brackets} lists and objects in them, "
            "expected at most one in 8 bytes"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


def _is_size(value: object) -> bool:
    # bool is an int, and JSON's true is no size.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptionError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CorruptionError(f"{where}: dtype: expected a string, found {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CorruptionError(f"{where}: shape: expected a list of sizes, found {shape!r}")
    if not all(map(_is_size, accumulate(shape, operator.mul))):  # before a 0 hides it
        raise CorruptionError(f"{where}: shape {shape} has more than 2**63 elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CorruptionError(f"{where}: data_offsets: expected two offsets, found {offsets!r}")
    try:
        name.encode()  # JSON can spell halves of surrogate pairs, which are no text
        n_bytes = tensor_bytes(dtype, tuple(shape))
    except UnicodeEncodeError:
        raise CorruptionError(f"{where}: name is not valid Unicode") from None
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    begin, end = offsets
    if end - begin != n_bytes:
        raise CorruptionError(
            f"{where}: {dtype} {shape} takes {n_bytes} bytes, "
            f"data_offsets {offsets} span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, n_bytes)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint folder, shard after shard, each in the order of its bytes.

    Reads `model.safetensors`, and every shard that `model.safetensors.index.json` names. Takes all
    tensors of them; the index decides where one stands twice. Like transformers, prefers
    `model.safetensors`: shards that repeat it are passed over, and one that is missing beside it is
    no error.
    Raises CheckpointError if a shard is missing, is named by a path, lacks a tensor that the index
    promises, or repeats `model.safetensors` in part; FormatError and CorruptionError as
    `read_header`.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    tensors: dict[str, TensorInfo] = {}
    if single.is_file():
        tensors = read_header(single)[0]
        weight_map = read_weight_map(index) if index.is_file() else {}
    elif index.is_file():
        weight_map = read_weight_map(index)
    else:
        raise CheckpointError(f"{folder}: {_no_weights(folder)}")
    first = frozenset(tensors)
    for shard in sorted(set(weight_map.values()) - {SINGLE_FILE if first else ""}):
        if not (folder / shard).exists():
            if first:
                continue
            raise CheckpointError(
                f"{folder}: shard {shard} {why_missing(folder / shard)}; {INDEX_FILE} names it"
            )
        header = read_header(folder / shard)[0]
        repeated = first & header.keys()
        if repeated and len(repeated) < len(header):
            raise CheckpointError(
                f"{folder}: {shard} shares {len(repeated)} of its {len(header)} tensors with "
                f"{SINGLE_FILE}, as {min(repeated)!r}, so which of both counts is not known; "
                "remove the other"
            )
        for name, tensor in header.items():
            home = weight_map.get(name, shard)
            if name in tensors and name not in weight_map:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {tensors[name].file.name} and in {shard}, "
                    f"and {INDEX_FILE} does not say which one counts"
                )
            if home == shard and name not in first:
                tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors and not first:
            raise CheckpointError(
                f"{folder}: tensor {name!r} is not in {shard}, where {INDEX_FILE} has it"
            )
    return tensors


def _no_weights(folder: Path) -> str:
    """Why there are none to be read."""
    for name in (SINGLE_FILE, INDEX_FILE):
        if (why := why_missing(folder / name)) != "is missing":
            return f"{name} {why}"
    names = sorted(entry.name for entry in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if any(name.startswith("adapter_model") for name in names):
        why = "an adapter is there, and no model; merge it into its model, and save that"
    elif shards:
        why = f"{shards[0]} is there, and {INDEX_FILE} has to say what belongs to the model"
    else:
        why = "only safetensors weights are read, save the model again with save_pretrained"
        others = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
        why += f" (found {others[0]})" if others else ""
    return f"no {SINGLE_FILE} and no {INDEX_FILE}; {why}"


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, as an index file has it. Raises CorruptionError and as `read_json`."""
    content = read_json(index, most=MAX_HEADER_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptionError(f"{index}: weight_map: expected an object of tensor -> shard")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_file_name(shard):
            raise CorruptionError(
                f"{index}: tensor {name!r}: expected the name of a file beside the index, "
                f"found {shard!r}"
            )
    return weight_map


def is_file_name(name: str) -> bool:
    """Whether name is one plain file name, and text: no separators, no parent, no drive."""
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        return False
    return is_text(name)


def is_text(name: str) -> bool:
    """Whether a name can be written down as UTF-8. One from the file system may hold other bytes,
    one from JSON half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(name: str) -> str:
    """The same name; bytes in it that are no text are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_json(file: Path, *, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of at most `most` bytes.

    Raises CheckpointError if unreadable, CorruptionError if too long or not an object.
    """
    try:
        data = read_whole(file, most)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if data is None:
        raise CorruptionError(f"{file}: expected at most {most} bytes, found more")
    _check_density(file, data)
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        why = leftover(data[:HEAD_BYTES]) or error
        raise CorruptionError(f"{file}: not valid JSON: {why}") from error
    if not isinstance(content, dict):
        raise CorruptionError(f"{file}: expected an object, found {type(content).__name__}")
    return content


def read_into(
    tensor: TensorInfo, buffer: memoryview, *, start: int = 0, drop_cache: bool = False
) -> None:
    """Fill buffer with the tensor's bytes from byte `start` on.

    drop_cache tells the operating system that these pages will not be needed again, so that one
    pass over a large checkpoint does not push everything else out of the page cache.
    Raises CheckpointError if the file is gone, CorruptionError if it has become shorter.
    """
    view = buffer.cast("B")
    if start < 0 or start + len(view) > tensor.n_bytes:
        raise ValueError(
            f"tensor {tensor.name!r}: bytes {start} to {start + len(view)} asked, "
            f"it has {tensor.n_bytes}"
        )
    if tensor.stored is not None:
        _compute_into(tensor, tensor.stored, view, start, drop_cache)
        return
    try:
        with regular_file(tensor.file) as (fd, _):
            _read_exactly(tensor.file, fd, view, tensor.offset + start)
            if drop_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, tensor.offset + start, len(view), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} cannot be read: {error.strerror or error}"
        ) from error


def _compute_into(
    tensor: TensorInfo, stored: Stored, view: memoryview, start: int, drop_cache: bool
) -> None:
    """As `read_into`, of rows that are computed, some at a time."""
    row = tensor.n_bytes // tensor.shape[0]
    at, end = start, start + len(view)
    while at < end:
        first = at // row
        last = min(-(-end // row), first + max(1, _COMPUTED_BYTES // row))
        found = np.ascontiguousarray(stored.rows(first, last, drop_cache=drop_cache))
        rows = found.reshape(-1).view(np.uint8).data[at - first * row :][: end - at]
        view[at - start : at - start + len(rows)] = rows
        at += len(rows)


def _read_exactly(file: Path, fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):  # one call reads at most 2 GiB
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise CorruptionError(
                f"{file}: ends at byte {offset + done}, expected {len(view) - done} bytes more"
            )
        done += n


def read_tensor(tensor: TensorInfo, index: int | None = None, *, drop_cache: bool = False) -> Array:
    """A tensor, or slice `index` of its leading axis, as a new array that owns its memory.

    dtype and shape as stored (bfloat16 through ml_dtypes). Allocates the bytes asked for and no
    more. Raises FormatError for a dtype that NumPy cannot hold, IndexError for no such slice, and
    as `read_into`.
    """
    if tensor.dtype not in _ARRAY_DTYPES:
        raise FormatError(
            f"{tensor.file}: tensor {tensor.name!r}: dtype {tensor.dtype} has no NumPy equivalent"
        )
    shape, start = tensor.shape, 0
    if index is not None:
        if not shape or not 0 <= index < shape[0]:
            raise IndexError(f"tensor {tensor.name!r} {list(shape)} has no slice {index}")
        start = index * (tensor.n_bytes // shape[0])
        shape = shape[1:]
    array = np.empty(shape, _ARRAY_DTYPES[tensor.dtype])
    if array.size:
        # ml_dtypes have no buffer protocol: fill through the bytes.
        read_into(tensor, array.reshape(-1).view(np.uint8).data, start=start, drop_cache=drop_cache)
    return array


def read_raw(tensor: TensorInfo, *, drop_cache: bool = False) -> Array:
    """As `read_tensor`, but of a dtype that NumPy lacks the bytes, as integers without a sign."""
    if tensor.dtype in _ARRAY_DTYPES:
        return read_tensor(tensor, drop_cache=drop_cache)
    return read_tensor(replace(tensor, dtype="U8"), drop_cache=drop_cache)


def read_chunks(
    tensor: TensorInfo, *, chunk_bytes: int = 8 << 20, drop_cache: bool = False
) -> Iterator[bytearray]:
    """The tensor's bytes in order, in pieces of at most chunk_bytes, for copying.

    Raises as `read_into`.
    """
    for start in range(0, tensor.n_bytes, chunk_bytes):
        piece = bytearray(min(chunk_bytes, tensor.n_bytes - start))
        read_into(tensor, memoryview(piece), start=start, drop_cache=drop_cache)
        yield piece


def total_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all these tensors, headers not counted."""
    return sum(tensor.n_bytes for tensor in tensors.values())
