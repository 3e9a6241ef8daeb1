"""The words every folder shares: which expert, which dtype, which bound.

Axes, everywhere: E experts, H hidden, I intermediate, T tokens, K experts chosen per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from moebound.errors import BoundError

Array = npt.NDArray[Any]

DType = Literal["BF16", "F16", "F32"]
"""Weight dtypes, in the spelling of the safetensors header."""

NUMPY_DTYPES: dict[DType, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

Guarantee = Literal["max_abs", "lossless", "rmse", "none"]
"""What is promised of a matrix, after the cast to the dtype the model will use.

max_abs: no weight moves by more than a bound. lossless: every weight has the bits it had. rmse: the
root mean square error is within a bound. none: nothing; the error was measured, once.
"""

BoundMode = Literal["abs", "rate", "range", "rmse"]
BoundScope = Literal["matrix", "expert"]


class ExpertKey(NamedTuple):
    """One expert of one MoE layer. Sorts in the order of the model.

    layer: index of the decoder layer, counted from 0, dense layers included.
    expert: index within the layer; shared experts are counted apart, from 0 too.
    """

    layer: int
    expert: int
    shared: bool = False

    def __str__(self) -> str:
        return f"layer {self.layer} {'shared expert' if self.shared else 'expert'} {self.expert}"


@dataclass(frozen=True)
class TensorStats:
    """What a relative bound is relative to. Non-finite values are left out.

    count: finite values; abs_sum: sum of |x|; square_sum: sum of x²; lowest, highest: extremes.
    """

    count: int = 0
    abs_sum: float = 0.0
    square_sum: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    def __add__(self, other: TensorStats) -> TensorStats:
        return TensorStats(
            self.count + other.count,
            self.abs_sum + other.abs_sum,
            self.square_sum + other.square_sum,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )

    @property
    def mean_abs(self) -> float:
        return self.abs_sum / self.count if self.count else 0.0

    @property
    def rms(self) -> float:
        return math.sqrt(self.square_sum / self.count) if self.count else 0.0

    @property
    def range(self) -> float:
        return self.highest - self.lowest if self.count else 0.0


def as_float(bound: Any) -> float:
    """A bound as a float64 number, ±inf for what is beyond them.

    Raises BoundError for what is no number of Python or NumPy; a bool is none.
    """
    if isinstance(bound, bool) or not isinstance(bound, (int, float, np.floating, np.integer)):
        raise BoundError(f"bound {bound!r}: expected a number, found {type(bound).__name__}")
    try:
        return float(bound)
    except OverflowError:
        return math.inf if bound > 0 else -math.inf


@dataclass(frozen=True)
class ErrorBound:
    """A promise about the error of each weight, in one of four ways of stating it.

    mode:
      abs     max |W - Ŵ| <= value
      rate    max |W - Ŵ| <= value · mean|θ|, the α of MoE-Compression (2509.07727, section 3.1);
              θ is the whole expert (scope "expert") or the one matrix (scope "matrix")
      range   max |W - Ŵ| <= value · (max W - min W), SZ3's REL, per matrix
      rmse    sqrt(mean (W - Ŵ)²) <= value · sqrt(mean W²), per matrix. An average promise: single
              weights may err more (by about √3 times that).

    Raises BoundError unless value is finite and positive.
    """

    value: float
    mode: BoundMode = "abs"
    scope: BoundScope = "matrix"

    def __post_init__(self) -> None:
        if self.mode not in get_args(BoundMode):
            raise BoundError(f"bound mode {self.mode!r}: expected one of {get_args(BoundMode)}")
        if self.scope not in get_args(BoundScope):
            raise BoundError(f"bound scope {self.scope!r}: expected one of {get_args(BoundScope)}")
        if self.scope == "expert" and self.mode != "rate":
            raise BoundError(f"bound scope 'expert' goes with mode 'rate', not {self.mode!r}")
        value = as_float(self.value)
        if not 0 < value < math.inf:
            shown = self.value if math.isfinite(value) else value  # not thousands of digits
            raise BoundError(f"bound {shown!r}: expected a finite number above 0")
        object.__setattr__(self, "value", value)

    @classmethod
    def of(cls, bound: float | ErrorBound) -> ErrorBound:
        """A float is an absolute bound."""
        return bound if isinstance(bound, ErrorBound) else cls(bound)

    @property
    def pointwise(self) -> bool:
        """Whether every single weight is promised, or only the average."""
        return self.mode != "rmse"

    def absolute(self, stats: TensorStats) -> float:
        """The bound in weight units, for a tensor (or expert) with these statistics.

        0.0 where the reference is 0 (an all-zero tensor under a relative bound): only an exact
        copy keeps such a promise. For "rmse" this is the largest ε at which uniform errors
        would have the RMSE asked, √3 · value · rms; the encoder measures and lowers it if needed.
        """
        if self.mode == "abs":
            return self.value
        if self.mode == "rate":
            return self.value * stats.mean_abs
        if self.mode == "range":
            return self.value * stats.range
        return self.value * stats.rms * math.sqrt(3.0)

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "value": self.value, "scope": self.scope}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ErrorBound:
        return cls(data["value"], data["mode"], data.get("scope", "matrix"))

    def __str__(self) -> str:
        scope = f" per {self.scope}" if self.mode == "rate" else ""
        return f"{self.mode} {self.value:g}{scope}"


NO_LOSS = ErrorBound(math.ulp(0.0))
"""The smallest bound there is; what exact codecs are given when none is asked for."""
