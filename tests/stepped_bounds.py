"""What an envelope with steps says of each weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec import Envelope, steps_in


def bounds_by_step(parsed: Envelope) -> npt.NDArray[np.float64] | None:
    """How far from the original a weight may be, [1, cols], [rows, 1] or [rows, cols]; None
    without steps."""
    found = steps_in(parsed)
    if found is None:
        return None
    return found.of_weights().astype(np.float64) * (found.kappa / 2)
