"""A safetensors file whose tensors' sizes are known only when they come.

The format wants the header, which has every size, before the first byte of data. Names are known
beforehand, so the header's greatest length is too: that much room is left free, the data goes
behind it as it comes, and the header is written last, padded with the trailing spaces that the
format allows. The data is written once, and nothing but the current piece is in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from moebound.checkpoint.shards import MAX_HEADER_BYTES
from moebound.errors import StoreError
from moebound.files.durable import PartialFile, disk_errors
from moebound.store.format import EXPERTS_ONLY, SHARD_MARK

_LARGEST = 10**13  # stands for any offset when room is reserved


class BytesShard:
    """One file of uint8 tensors, appended in the order of `names`.

        with BytesShard(folder / "model-00002-of-00002.safetensors", names) as shard:
            for data in ...:
                shard.append(data)
            shard.finish()

    version: that reading it takes, see `format.SHARD_MARK`. Everything goes to
    `<name>.partial`; finish() syncs it and gives it its name. Leaving the block without finish()
    removes it. Raises StoreError if the disk refuses.
    """

    def __init__(self, path: Path, names: Sequence[str], *, version: int = EXPERTS_ONLY) -> None:
        self.path = path
        self._names, self._version = names, version
        self._sizes: list[int] = []
        self._room = len(_header(names, [_LARGEST] * len(names), 0, version))
        if self._room > MAX_HEADER_BYTES:
            raise StoreError(
                f"{path}: {len(names)} tensors need a header of {self._room} bytes, the format "
                f"allows {MAX_HEADER_BYTES}; use a smaller shard size"
            )
        self._at = 8 + self._room
        self._file = PartialFile(path)

    def append(self, data: bytes) -> None:
        """The bytes of the next tensor."""
        self._file.write(data, self._at)
        self._at += len(data)
        self._sizes.append(len(data))

    def header(self) -> bytes:
        """The length field and text, once every tensor is there."""
        if len(self._sizes) != len(self._names):
            raise StoreError(
                f"{self.path}: {len(self._names)} tensors announced, {len(self._sizes)} written"
            )
        text = _header(self._names, self._sizes, self._room, self._version)
        return self._room.to_bytes(8, "little") + text

    def finish(self) -> None:
        """Write the header, sync, and put the file in its place."""
        self._file.write(self.header(), 0)
        self._file.finish()

    def __enter__(self) -> BytesShard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file.is_open:
            self._file.discard()


def _header(names: Sequence[str], sizes: Sequence[int], room: int, version: int) -> bytes:
    """The header's text, padded to `room`, or to a multiple of 8."""
    content: dict[str, object] = {"__metadata__": {"format": "pt", SHARD_MARK: str(version)}}
    at = 0
    for name, size in zip(names, sizes, strict=True):
        content[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(room) if room else text + b" " * (-len(text) % 8)


def header_sha256(path: Path) -> str:
    """Hash of a safetensors file's length field and header text."""
    with disk_errors(path, "cannot be read"), open(path, "rb") as handle:
        length = handle.read(8)
        text = handle.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    return hashlib.sha256(length + text).hexdigest()
