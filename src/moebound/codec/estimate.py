"""How many bytes an array will take at many bounds, for less than encoding it at each of them.

A planner asks for the size of every matrix at dozens of bounds. Small arrays are encoded at each:
nothing is quicker, and the answer is exact. Of a large one, a sample of its rows is encoded at each
bound, and all of it at a few; how much larger the whole is than the sample changes slowly from
size to size, so that a line between those few does for the rest.

Encoding is what makes this hold for every codec and dtype, for values that stand on a lattice, and
at both ends of the scale (docs/plan.md has the figures and the command).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moebound.codec.api import encode
from moebound.codec.arrays import ArrayLike, to_numpy
from moebound.codec.base import Codec
from moebound.codec.shape import columns_of
from moebound.errors import BoundError
from moebound.types import Array, as_float

SAMPLE_WEIGHTS = 1 << 19
"""Weights of the rows that stand for a larger array, or a sixteenth of it, if that is more."""

ANCHORS = 6
"""Bounds at which all of a large array is encoded: at equal ratios of size, not of bound, because
where little is left to code the sample and the whole differ most."""


def estimate_bytes(
    array: ArrayLike, bounds: Sequence[float], *, codec: str | Codec = "bound"
) -> npt.NDArray[np.int64]:
    """About len(moebound.encode(array, bound)) for each bound, in the order of the bounds.

    array: as `encode` takes it. bounds: absolute, in weight units; 0 asks for an exact copy.

    Exact up to 2 · SAMPLE_WEIGHTS weights, for 0, and for the narrowest and widest bound; else
    within 1 % of what `encode` writes for weights like a network's, on average within 0.1 %.
    Raises BoundError for a bound that is negative or not finite, and what `encode` raises.
    """
    for bound in bounds:
        if not 0 <= as_float(bound) < math.inf:
            raise BoundError(f"bound {bound!r}: expected a finite number, 0 or more")
    x = to_numpy(array)
    asked = np.asarray(bounds, np.float64)
    distinct = np.unique(asked)
    if x.size <= 2 * SAMPLE_WEIGHTS or len(distinct) <= ANCHORS:
        sizes = _encoded(x, distinct, codec)
    else:
        small = _encoded(_sample(x), distinct, codec)
        anchors = _anchors(small)
        growth = _encoded(x, distinct[anchors], codec) / small[anchors]
        position = -np.log(np.minimum.accumulate(small))
        between = np.interp(position, position[anchors], growth)
        sizes = np.rint(small * between).astype(np.int64)
    return sizes[np.searchsorted(distinct, asked)]


def _encoded(
    x: Array, bounds: npt.NDArray[np.float64], codec: str | Codec
) -> npt.NDArray[np.int64]:
    return np.array(
        [
            len(encode(x, b, codec=codec) if b else encode(x, math.ulp(0.0), codec="lossless"))
            for b in bounds.tolist()
        ],
        np.int64,
    )


def _anchors(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of about ANCHORS sizes: the first two (the first may be of an exact copy), the last,
    and between them those nearest to equal ratios."""
    ratios = np.geomspace(sizes[0], sizes[-1], ANCHORS)
    nearest = np.abs(sizes[:, None] / ratios - 1).argmin(axis=0)
    return np.unique([0, 1, *nearest, len(sizes) - 1])


def _sample(x: Array) -> Array:
    """Rows at equal distances."""
    columns = columns_of(x.shape)
    whole = x.reshape(-1)[: x.size // columns * columns].reshape(-1, columns)
    step = min(16, x.size // SAMPLE_WEIGHTS)
    return np.ascontiguousarray(whole[step // 2 :: step])
