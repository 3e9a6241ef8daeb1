"""How an array of any shape is laid out as the matrix that the kernel sees."""

from __future__ import annotations

from math import prod

FLAT_COLUMNS = 2048
_NARROWEST, _WIDEST = 32, 1 << 16


def columns_of(shape: tuple[int, ...]) -> int:
    """Columns of the row-major matrix that stands for an array of this shape.

    The last axis where it is a sensible row, so that scale classes follow the real rows and
    columns; else rows of FLAT_COLUMNS, the last one maybe shorter.
    """
    if len(shape) >= 2 and _NARROWEST <= shape[-1] <= _WIDEST:
        return shape[-1]
    return max(1, min(FLAT_COLUMNS, prod(shape)))
