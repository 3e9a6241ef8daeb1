"""What is asked of callers' numbers: a whole number is a whole number, and True is none."""

from __future__ import annotations

from typing import Any

import numpy as np

from moebound.errors import CodecError


def whole(value: Any, what: str, least: int, most: int) -> int:
    """The value as an int. Raises CodecError, naming `what`, for bools, floats, strings and
    numbers that are not between `least` and `most`."""
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        long = type(value) is int and value.bit_length() > 64  # Python refuses to print some
        shown = f"of {value.bit_length()} bits" if long else repr(value)
        raise CodecError(f"{what} {shown}: expected a whole number from {least} to {most}")
    return int(value)
