"""The record of what was promised for one tensor and what was found."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from moebound.types import DType, ErrorBound


@dataclass(frozen=True)
class Certificate:
    """The promise kept for one tensor. JSON in, JSON out.

    bound: as the user stated it. abs_bound: the same in weight units, what every weight kept
    (for an rmse bound: what the encoder worked with).
    max_abs_error, rmse: measured in float64 on the decoded values, in `dtype`, against the
    original. patched: weights stored verbatim. sha256_original: of the original values' bytes
    in their own dtype, little-endian; sha256_encoded: of the encoded bytes.
    """

    bound: ErrorBound
    abs_bound: float
    max_abs_error: float
    rmse: float
    codec: str
    codec_version: int
    dtype: DType
    source_dtype: DType
    shape: tuple[int, ...]
    patched: int
    n_bytes: int
    sha256_original: str
    sha256_encoded: str

    @property
    def bits_per_weight(self) -> float:
        n = 1
        for extent in self.shape:
            n *= extent
        return 8 * self.n_bytes / n if n else 0.0

    @property
    def kept(self) -> bool:
        """Whether what was measured is within what was promised."""
        return not self.bound.pointwise or self.max_abs_error <= self.abs_bound

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bound": self.bound.to_json(), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Certificate:
        fields = dict(data)
        fields["bound"] = ErrorBound.from_json(fields["bound"])
        fields["shape"] = tuple(fields["shape"])
        return cls(**fields)


def sha256(data: Any) -> str:
    """Hex digest of anything with a buffer."""
    return hashlib.sha256(data).hexdigest()
