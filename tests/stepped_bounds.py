"""What an envelope with steps says of each weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec import Envelope, steps_in


def bounds_by_step(parsed: Envelope) -> npt.NDArray[np.float64] | None:
    """How far from the original a weight may be, [1, cols] or [rows, 1]; None without steps."""
    found = steps_in(parsed)
    if found is None:
        return None
    sizes, kappa, by_row = found
    own = sizes * (kappa / 2)
    return own[:, None] if by_row else own[None, :]
