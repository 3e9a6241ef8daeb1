"""From stored bytes to weights, whoever wrote them: a codec's envelope or a method's blob."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moebound.codec import Envelope, decode_array, parse
from moebound.codec.api import check_unasked, decode_into
from moebound.codec.arrays import ArrayLike, writable_view
from moebound.errors import CorruptionError, FormatError
from moebound.methods.artifact import decode_payload, named
from moebound.methods.base import MatrixSpec
from moebound.methods.blob import (
    MatrixBlob,
    SharedBlob,
    Use,
    blob_checksum,
    is_blob,
    parse_matrix,
    parse_shared,
)
from moebound.methods.registry import method_class
from moebound.types import Array

SHARED_NAME = "moebound.shared."
"""A store's tensor `moebound.shared.12.0` is part 0 of group 12."""

ROUTER_NAME = "moebound.router."
"""A store's tensor `moebound.router.12` is the router edit of group 12."""

OPEN_PARTS = 16
"""So many shared parts stay open where no cache holds them."""


def shared_name(group: int, number: int) -> str:
    """The tensor that holds a shared part."""
    return f"{SHARED_NAME}{group}.{number}"


def router_name(group: int) -> str:
    """The tensor that holds a group's router edit."""
    return f"{ROUTER_NAME}{group}"


@dataclass(frozen=True, eq=False)
class OpenPart:
    """A shared part, ready to decode with. checksum: of its blob. content: the method's own."""

    group: int
    number: int
    checksum: int
    held_bytes: int
    content: Any

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, group: int, number: int) -> OpenPart:
        """Parse and open. Raises FormatError or CorruptionError, naming the part, for bytes that
        are damaged or are another part."""
        with named(shared_name(group, number), CorruptionError):
            blob = parse_shared(data)
            if (blob.group, blob.number) != (group, number):
                raise CorruptionError(f"is part {blob.number} of group {blob.group}")
            cls_ = _decoder(blob)
            content = cls_.open_shared(blob.payload)
            return cls(group, number, blob_checksum(memoryview(data)), blob.held_bytes, content)

    def check(self, use: Use) -> OpenPart:
        """Itself. Raises CorruptionError if it is not the part that was encoded with."""
        if use.checksum != self.checksum:
            raise CorruptionError(
                f"{shared_name(self.group, self.number)} is another than this matrix was encoded "
                f"with: expected checksum {use.checksum:08x}, found {self.checksum:08x}"
            )
        return self


FindPart = Callable[[int, int], OpenPart]
"""Group and number -> the part, open. Raises FormatError or CorruptionError, with its name."""


class PartsFrom:
    """A `FindPart` that reads parts when they are asked for, and keeps the last ones open.

    read: group and number -> the blob's bytes. From any thread.
    """

    def __init__(self, read: Callable[[int, int], bytes | bytearray | memoryview]) -> None:
        self._read = read
        self._open: OrderedDict[tuple[int, int], OpenPart] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> PartsFrom:
        return self  # transformers copies conversions; one memory serves them all

    def __call__(self, group: int, number: int) -> OpenPart:
        with self._lock:
            found = self._open.pop((group, number), None)
            if found is None:
                found = OpenPart.of(self._read(group, number), group, number)
            self._open[group, number] = found
            while len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)
        return found


def no_parts(group: int, number: int) -> OpenPart:
    """A `FindPart` where there are none. Raises CorruptionError."""
    raise CorruptionError(f"{shared_name(group, number)} is missing")


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix's bytes, taken apart and checked: an envelope or a blob."""

    found: Envelope | MatrixBlob

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Stored:
        """Raises FormatError (no or unknown format), CorruptionError (damaged)."""
        return cls(parse_matrix(data) if is_blob(data) else parse(data))

    @property
    def spec(self) -> MatrixSpec:
        if isinstance(self.found, MatrixBlob):
            return MatrixSpec(self.found.shape, self.found.dtype)
        return MatrixSpec(self.found.spec.shape, self.found.spec.dtype)

    @property
    def envelope(self) -> Envelope:
        """Raises CorruptionError for a blob."""
        if not isinstance(self.found, Envelope):
            raise CorruptionError("expected an envelope")
        return self.found

    @property
    def needs(self) -> tuple[tuple[int, int], ...]:
        """Group and number of the shared parts that decoding takes."""
        blob = self.found
        return (
            tuple((blob.group, u.number) for u in blob.uses) if isinstance(blob, MatrixBlob) else ()
        )

    def decode(
        self,
        parts: FindPart = no_parts,
        *,
        threads: int | None = None,
        max_bytes: int | None = None,
    ) -> Array:
        """The weights, as a new array. max_bytes: as of `moebound.decode`; who has compared the
        shape gives its bytes. Raises FormatError or CorruptionError."""
        if isinstance(self.found, Envelope):
            return decode_array(self.found, threads=threads, max_bytes=max_bytes)
        return _decode_blob(self.found, parts, max_bytes)

    def decode_into(
        self, out: ArrayLike, parts: FindPart = no_parts, *, threads: int | None = None
    ) -> None:
        """As `decode`, into a contiguous array or tensor of that shape and dtype."""
        view = writable_view(out, self.spec.shape, self.spec.dtype)
        if isinstance(self.found, Envelope):
            decode_into(self.found, view, threads=threads)
        else:
            view[...] = _decode_blob(self.found, parts, view.nbytes).reshape(view.shape)


def _decode_blob(blob: MatrixBlob, parts: FindPart, max_bytes: int | None) -> Array:
    cls, spec = _decoder(blob), MatrixSpec(blob.shape, blob.dtype)
    most = cls.most_weights(len(blob.payload))
    if spec.size > most:
        raise CorruptionError(
            f"shape {spec.shape}: {len(blob.payload)} bytes of method {blob.method!r} stand for at "
            f"most {most} weights"
        )
    check_unasked(blob.shape, blob.dtype, len(blob.payload), max_bytes)
    shared: Sequence[Any] = [parts(blob.group, use.number).check(use).content for use in blob.uses]
    with named(f"method {blob.method!r}", CorruptionError):
        return decode_payload(cls, blob.payload, spec, shared)


def _decoder(blob: MatrixBlob | SharedBlob) -> Any:
    """The method's class. Raises FormatError for a payload that is newer than it."""
    cls = method_class(blob.method)
    if blob.method_version > cls.version:
        raise FormatError(
            f"method {blob.method!r} version {blob.method_version}: here it is at version "
            f"{cls.version}; install a newer one"
        )
    return cls
