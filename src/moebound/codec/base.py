"""What a codec is: an array and an absolute bound go in, bytes come out, and back.

A codec sees a contiguous array, an absolute bound and nothing else. Relative bounds are resolved
before it (`types.ErrorBound`), framing, patches and the checksum come after it (`envelope.py`).
One codec is one file, one class and one id; two codecs share an id only if each can decode what
the other wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from moebound.errors import CodecError
from moebound.extras import check
from moebound.types import NUMPY_DTYPES, Array, DType

Positions = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ArraySpec:
    """What both ends know about one array.

    dtype: of the decoded values, the dtype the model will use; the bound holds in it.
    source_dtype: of the values that were encoded.
    abs_bound: ε in weight units. 0.0 asks for an exact copy.
    """

    shape: tuple[int, ...]
    dtype: DType
    source_dtype: DType
    abs_bound: float

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Of the decoded values."""
        return self.size * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        return NUMPY_DTYPES[self.dtype]


def _no_positions() -> Positions:
    return np.empty(0, np.uint64)


@dataclass(frozen=True)
class Payload:
    """A codec's bytes, and the flat positions of the values that those bytes do not carry.

    The values at `misses` (ascending) are kept verbatim in the envelope's patch.
    """

    data: bytes
    misses: Positions = field(default_factory=_no_positions)


class Codec(ABC):
    """One way to turn an array into bytes under an absolute bound.

    id: names the byte format, for ever. [a-z0-9_]+
    version: of the payloads that `compress` writes; the decoder takes all up to `newest`.
    keeps_bound: whether `compress` itself guarantees the bound on the decoded dtype, for every
        value it does not list as a miss. Where it is False, `encode` decodes, looks for weights
        that break the bound, and patches them (`strict.py`).
    lossy: False for a codec that ignores the bound and returns the same bits.
    needs: modules of `extras.PACKAGES` that it cannot do without.
    """

    id: ClassVar[str]
    version: ClassVar[int] = 1
    keeps_bound: ClassVar[bool] = False
    lossy: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_options(cls, options: str) -> Self:
        """The codec set up from what follows its id and a colon, as in ``sz3:interp``.

        Options steer the encoder only: bytes decode without them. Raises CodecError if unknown.
        """
        if options:
            raise CodecError(f"codec {cls.id!r} takes no options, found {options!r}")
        return cls()

    @classmethod
    def newest(cls) -> int:
        """The last version of the payload that `decompress` takes, and every one before it."""
        return cls.version

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """How many values a payload of n_bytes can hold at most, whoever made it.

        Checked before memory for a forged shape is asked for. The default says 2^20 a byte; a codec
        of which a constant array of any size is a few bytes says 2^40, and leaves the rest to the
        limit of whoever decodes.
        """
        return n_bytes << 20

    @classmethod
    def check_installed(cls) -> None:
        """Make sure that the library behind it is there, before long work that will need it.

        Raises BackendUnavailable with the command that installs it.
        """
        check(f"codec {cls.id}", *cls.needs)

    @abstractmethod
    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        """Bytes for x (C-contiguous, of spec.source_dtype, not empty).

        Raises CodecError if the codec cannot take this dtype or shape, BackendUnavailable if the
        library behind it is not installed.
        """

    @abstractmethod
    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        """Write the decoded values to out (C-contiguous, flat, of spec.dtype, not empty).

        Values at misses may be anything. Raises CorruptionError on bytes that `compress` cannot
        have made; never reads or writes out of bounds. Takes memory in proportion to data and
        out, whatever the data says.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
