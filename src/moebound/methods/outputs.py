"""What an approximation does to a matrix's outputs, by the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from moebound.checkpoint import Role
from moebound.types import Array


def output_error(original: Array, decoded: Array, second_moments: Array) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ), the squared error of W x summed over the text that H is of.

    original, decoded: W and Ŵ, [out, in], of any float dtype. second_moments: H = Σ g² x xᵀ of the
    inputs [in, in], or its diagonal [in]. Computed in float64. Differences of weights that are not
    finite count as 0: they are stored as they are.
    """
    return float(_rows(original, decoded, second_moments).sum())


def _rows(original: Array, decoded: Array, second_moments: Array) -> Array:
    """[out] of each row."""
    with np.errstate(invalid="ignore"):
        error = original.astype(np.float64) - decoded.astype(np.float64)
    error = np.where(np.isfinite(error), error, 0.0)
    h = second_moments.astype(np.float64)
    found: Array = np.square(error) @ h if h.ndim == 1 else ((error @ h) * error).sum(1)
    return np.maximum(found, 0.0)


def residual_errors(
    original: Mapping[Role, Array],
    decoded: Mapping[Role, Array],
    inputs: Array,
    hidden: Array,
    transposed: Collection[Role] = (),
) -> dict[Role, float]:
    """What each matrix's error alone does to the expert's share of the residual stream: its square,
    summed over the text.

    original, decoded: by role, as a checkpoint has them. inputs, hidden: second moments of what the
    expert gets and of what its down projection gets, with the routing weight in them
    (`files/formats/statistics.py`). Of down this is `output_error`. What gate and up give reaches
    the stream by way of the hidden units: a relative error of one of their rows is taken for the
    same relative error of its unit, and the unit's power for what down makes of it. Of a matrix
    that is both in one, all rows are taken together, whichever way they lie.
    """

    def straight(arrays: Mapping[Role, Array], role: Role) -> Array:
        n = len(hidden if role == "down" else inputs)
        array = arrays[role]
        by_shape = array.shape[1] != n and array.shape[0] == n
        return array.T if role in transposed or by_shape else array

    down = np.nan_to_num(straight(original, "down").astype(np.float64), posinf=0.0, neginf=0.0)
    units = np.diagonal(hidden) if hidden.ndim == 2 else hidden
    reach = np.square(down).sum(0) * units.astype(np.float64)
    found: dict[Role, float] = {}
    for role in original:
        before, after = straight(original, role), straight(decoded, role)
        if role == "down":
            found[role] = output_error(before, after, hidden)
            continue
        lost = _rows(before, after, inputs)
        power = _rows(before, np.zeros_like(before), inputs)
        if len(lost) == len(reach):
            share = np.divide(lost, power, out=np.zeros_like(lost), where=power > 0)
            found[role] = float((share * reach).sum())
        else:
            found[role] = float(lost.sum() / power.sum() * reach.sum()) if power.any() else 0.0
    return found
