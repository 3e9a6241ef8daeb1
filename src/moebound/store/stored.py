"""What a store has of one tensor that is no expert's: where its bytes are, and its record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from moebound.checkpoint import TensorInfo, read_into
from moebound.codec import Certificate, thread_count
from moebound.codec.arrays import ArrayLike, writable_view
from moebound.codec.at_once import codes_at_once, decode_at_once
from moebound.codec.bound import BoundCodec
from moebound.codec.codes import Bits, CodeMatrix, decode_codes
from moebound.errors import CorruptionError, FormatError
from moebound.methods import Stored
from moebound.store.checks import check_bytes
from moebound.store.format import CodedRecord, MatrixRecord
from moebound.types import NUMPY_DTYPES, Array


def read_tensor_bytes(tensor: TensorInfo) -> memoryview:
    """All bytes of a tensor, by one positional read. Raises CheckpointError or CorruptionError if
    the file is gone or has become shorter."""
    buffer = memoryview(bytearray(tensor.n_bytes))
    read_into(tensor, buffer)
    return buffer


def parse_certified(
    data: memoryview, certificate: Certificate, needs: tuple[tuple[int, int], ...] = ()
) -> Stored:
    """Taken apart and checked against the certificate, not decoded. needs: shared parts, by group
    and number. Raises FormatError or CorruptionError."""
    stored = Stored.of(data)
    found = stored.spec.shape, stored.spec.dtype
    if found != (certificate.shape, certificate.dtype):
        raise CorruptionError(
            f"expected shape {certificate.shape} of {certificate.dtype}, found {found[0]} "
            f"of {found[1]}"
        )
    if stored.needs != needs:
        raise CorruptionError(f"expected shared parts {needs}, found {stored.needs}")
    return stored


def decode_certified(
    data: memoryview, certificate: Certificate, out: ArrayLike, threads: int | None
) -> bool:
    """Decode an envelope into a contiguous array or tensor of the certified shape and dtype, by one
    native call. False, with anything in `out`, where it takes `parse_certified`, which says why."""
    if certificate.codec != BoundCodec.id:
        return False
    view = writable_view(out, certificate.shape, certificate.dtype)
    n_threads = thread_count() if threads is None else threads
    return decode_at_once(data, view, certificate.shape, threads=n_threads)


class Certified(Protocol):
    """A tensor of a store, an expert's or not."""

    @property
    def tensor(self) -> TensorInfo: ...
    @property
    def record(self) -> MatrixRecord | CodedRecord: ...
    def read(self) -> memoryview: ...
    def parse(self, data: memoryview) -> Stored: ...


def certified_codes(
    stored: Certified, data: memoryview, out: Array, bits: Bits, threads: int
) -> CodeMatrix:
    """As `decode_certified`, a matrix into codes of so many bits. Raises CodecError where there
    are none, FormatError or CorruptionError, naming file and tensor."""
    certificate = stored.record.certificate
    shape = certificate.shape[0], certificate.shape[1]
    with naming(stored.tensor):
        found = codes_at_once(data, out, shape, certificate.dtype, bits=bits, threads=threads)
        if found is not None:
            return found
        return decode_codes(stored.parse(data).envelope, out, bits=bits, threads=threads)


@contextmanager
def naming(tensor: TensorInfo) -> Iterator[None]:
    """Format errors say of which file and tensor."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error


@dataclass(frozen=True)
class StoredTensor:
    """One coded tensor of no expert."""

    tensor: TensorInfo
    record: CodedRecord

    @property
    def decoded_bytes(self) -> int:
        """Of the weights."""
        certificate = self.record.certificate
        return certificate.n_weights * NUMPY_DTYPES[certificate.dtype].itemsize

    def read(self) -> memoryview:
        """Its bytes, by one positional read. Raises CorruptionError if they are not those that
        were certified, and as `read_tensor_bytes`."""
        data = read_tensor_bytes(self.tensor)
        check_bytes(self.tensor, self.record.certificate.sha256_encoded, data)
        return data

    def parse(self, data: memoryview) -> Stored:
        """Taken apart and checked against the certificate. Raises as `parse_certified`."""
        return parse_certified(data, self.record.certificate)

    def decode(self, data: memoryview, *, threads: int | None = None) -> Array:
        """The weights, in their own shape, from this tensor's bytes. Raises FormatError or
        CorruptionError, naming file and tensor."""
        with naming(self.tensor):
            stored = self.parse(data)
            return stored.decode(threads=threads, max_bytes=stored.spec.n_bytes)

    def decode_codes(
        self, data: memoryview, out: Array, *, bits: Bits = 8, threads: int
    ) -> CodeMatrix:
        """As `decode`, a matrix into codes of so many bits, flat. Raises CodecError, too, where it
        has none."""
        return certified_codes(self, data, out, bits, threads)
