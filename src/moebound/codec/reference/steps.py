"""4.7, 4.8: the steps of versions 2 and 3, and tables that follow from a scale."""

from __future__ import annotations

from math import ldexp

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.formats import Patterns
from moebound.errors import CorruptionError
from moebound.types import NUMPY_DTYPES, DType

MOST_LEVEL = 255
MOST_STRETCH = 255
STRETCH_OF_LEVEL = 2
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
_EIGHTHS = (
    1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096,
    1.4142135623730951, 1.5422108254079407, 1.681792830507429, 1.8340080864093424,
)  # fmt: skip
_DOWN = np.array([ldexp(_QUARTERS[-level % 4], -level // 4) for level in range(MOST_LEVEL + 1)])
"""2^(-level / 4)."""
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)
WITHIN = (
    0, 1668938, 3312035, 4904643, 6424414, 7852223, 9172864, 10375468,
    11453629, 12405257, 13232198, 13939661, 14535538, 15029658, 15433054, 15757283,
    16013848, 16213726, 16367031, 16482793, 16568854, 16631843, 16677232, 16709431,
    16731921, 16747385, 16757854, 16764832, 16769410, 16772368, 16774249, 16775427,
    16776153, 16776594, 16776857, 16777012, 16777102, 16777153, 16777182, 16777198,
    16777206, 16777211, 16777213, 16777215, 16777215, 16777216, 16777216, 16777216,
)  # fmt: skip
"""round(2^24 · erf(i / (8 √2))): how much of a Gaussian is within i/8 standard deviations."""


def step_sizes(
    levels: list[int], kappa: float, bound: float, *, least: float = 1.0
) -> npt.NDArray[np.float32]:
    """The step of each level. least: of the factors that they are multiplied by. Raises
    CorruptionError for κ out of range, and for steps that are no normal float32."""
    if not 1 <= kappa <= 16:
        raise CorruptionError(f"{kappa} half steps: expected 1 to 16")
    widest = np.float32(min(2 * bound / kappa, _LARGEST))
    while widest > 0 and float(widest) * kappa / 2 > bound:
        widest = np.nextafter(widest, np.float32(0))
    found = (float(widest) * _DOWN[levels]).astype(np.float32)
    if not found.min() * np.float32(least) >= _SMALLEST:
        raise CorruptionError(f"a step of {found.min():g} is below the normal float32")
    return found


def step_factors(levels: list[int] | None) -> npt.NDArray[np.float32]:
    """What steps of the other side are multiplied by; of version 2, a single 1."""
    return _DOWN[levels or [0]].astype(np.float32)


def scaled_values(
    bins: npt.NDArray[np.int64], steps: npt.NDArray[np.float32], output: DType
) -> Patterns:
    """Bins times their steps, as patterns of the output dtype."""
    with np.errstate(over="ignore"):
        values = (bins.astype(np.float32) * steps).astype(NUMPY_DTYPES[output])
    return values.view(f"u{values.itemsize}")


def stretched_table(
    stretch: int, symbol_low: int, n_symbols: int, low_bits: int, table_log: int
) -> list[int]:
    """A table's frequencies: a Gaussian's, its standard deviation 2^((stretch - 32) / 8) bins."""
    eighths = min(stretch, MOST_STRETCH) - 32
    deviation = ldexp(_EIGHTHS[eighths % 8], eighths // 8)
    whole, cumulative = 1 << table_log, [0]
    for s in range(1, n_symbols):
        edge = ((symbol_low + s) << (low_bits + 1)) - 1  # twice the lower edge of symbol s
        at = min(int(abs(edge) * 1024.0 / deviation), 47 * 256 - 1)  # in 1/2048 deviations
        i, between = divmod(at, 256)
        within = WITHIN[i] + ((WITHIN[i + 1] - WITHIN[i]) * between >> 8)
        below = (1 << 24) + (within if edge > 0 else -within)
        cumulative.append(s + ((whole - n_symbols) * below >> 25))
    return [b - a for a, b in zip(cumulative, [*cumulative[1:], whole], strict=True)]
