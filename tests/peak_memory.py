"""How much memory something takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

from moebound.errors import MoeboundError


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that Python and NumPy held at a time for it, whether it raises or not."""
    tracemalloc.start()
    try:
        action()
    except MoeboundError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak
