"""Write safetensors files tensor by tensor: whole or not at all, in bounded memory.

The header stands first in the file, so names, dtypes and shapes must be known up front; the bytes
may then come in any order and in pieces. Everything goes to `<name>.partial`, which is synced to
disk and renamed when the last byte is there: a killed process leaves no file that passes for a
whole one, and the next run writes over what it left.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from moebound.checkpoint.shards import (
    DTYPE_BITS,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    is_file_name,
    tensor_bytes,
)
from moebound.errors import FormatError, StoreError
from moebound.files.durable import PartialFile


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. Raises StoreError for a name, dtype or shape that cannot be."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.name.encode(errors="replace").decode() != self.name:
            raise StoreError(f"tensor name {self.name!r} is not valid Unicode")
        if self.name == "__metadata__":
            raise StoreError("tensor name '__metadata__' is taken by the format")
        if any(size < 0 for size in self.shape):
            raise StoreError(f"tensor {self.name!r}: shape {list(self.shape)} has a negative size")
        try:
            tensor_bytes(self.dtype, self.shape)
        except FormatError as error:
            raise StoreError(f"tensor {self.name!r}: {error}") from None

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


class ShardWriter:
    """One safetensors file, written piece by piece.

        with ShardWriter(folder / "model.safetensors", specs) as shard:
            shard.write("a", first_half)
            shard.write("b", everything)
            shard.write("a", second_half)

    In the file, wider dtypes come first (so that every tensor is aligned for the stock reader),
    in the order of `specs` among equals. `write` may be called from several threads, but for one
    tensor only from one at a time.

    Leaving the block finishes the file; leaving it by an exception removes what was written.
    Raises StoreError if a tensor is named twice, gets too many or too few bytes, or if the disk is
    full or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        ordered = sorted(specs, key=lambda spec: -DTYPE_BITS[spec.dtype])
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._specs: dict[str, TensorSpec] = {}
        self._next: dict[str, int] = {}
        self._lock = threading.Lock()
        position = 0
        for spec in ordered:
            if spec.name in self._specs:
                raise StoreError(f"{path}: tensor {spec.name!r} is to be written twice")
            end = position + spec.n_bytes
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            self._specs[spec.name] = spec
            self._next[spec.name] = position
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the data starts aligned
        if len(text) > MAX_HEADER_BYTES:
            raise StoreError(
                f"{path}: header of {len(text)} bytes, the format allows {MAX_HEADER_BYTES}; "
                "write fewer tensors per shard"
            )
        self._data_start = 8 + len(text)
        self._ends = {name: self._next[name] + spec.n_bytes for name, spec in self._specs.items()}
        self.n_bytes = self._data_start + position
        self._file = PartialFile(path)
        try:
            self._file.write(len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append data to the tensor's bytes, right after what was written of it before."""
        view = memoryview(data).cast("B")
        if not self._file.is_open:
            raise StoreError(f"{self.path}: already finished")
        with self._lock:
            if name not in self._specs:
                raise StoreError(f"{self.path}: tensor {name!r} was not announced")
            start = self._next[name]
            if start + len(view) > self._ends[name]:
                spec = self._specs[name]
                written = start + spec.n_bytes - self._ends[name]
                raise StoreError(
                    f"{self.path}: tensor {name!r} takes {spec.n_bytes} bytes, "
                    f"found {written + len(view)}"
                )
            self._next[name] = start + len(view)
        self._file.write(view, self._data_start + start)

    def finish(self) -> None:
        """Check that every byte is there, sync, and put the file in its place."""
        if not self._file.is_open:
            raise StoreError(f"{self.path}: already finished")
        for name, spec in self._specs.items():
            missing = self._ends[name] - self._next[name]
            if missing:
                self.discard()
                raise StoreError(
                    f"{self.path}: tensor {name!r} takes {spec.n_bytes} bytes, "
                    f"{missing} were never written"
                )
        try:
            self._file.finish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written. Does nothing to a finished file."""
        self._file.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all. Raises StoreError if the disk refuses."""
    file = PartialFile(path)
    try:
        file.write(data, 0)
        file.finish()
    except BaseException:
        file.discard()
        raise


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write `model.safetensors.index.json`: which shard has which tensor.

    total_size: bytes of all tensors. Raises StoreError if a shard is no plain file name.
    """
    for name, shard in weight_map.items():
        if not is_file_name(shard):
            raise StoreError(f"{folder}: tensor {name!r}: {shard!r} is not a plain file name")
    content = {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_file(folder / INDEX_FILE, (json.dumps(content, indent=2) + "\n").encode())
