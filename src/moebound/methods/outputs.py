"""What an approximation does to a matrix's outputs, by the second moments of its inputs: measured,
and promised (`geometry.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.certificate import Columns, Outputs
from moebound.files.formats.statistics import Side
from moebound.methods.base import ColumnBounds
from moebound.methods.geometry import Geometry
from moebound.methods.one_thread import one_thread
from moebound.types import Array

_BLOCK = 256
_ROOM = 1 + 1e-9
"""Sums of float64, for an error that is all that its bound allows."""
_ROUNDED = 1 + 2.0**-22
"""The square of a step that is a rounded product of float32, over that of the product."""


def side_of(role: Role) -> Side:
    """Which of an expert's second moments are of the inputs of this matrix."""
    return "hidden" if role == "down" else "inputs"


def turned(array: Array, n: int, transposed: bool) -> bool:
    """Whether a matrix whose inputs have n channels is [in, out]. transposed: whether the
    checkpoint says so; of families that have both, only the shape does."""
    return transposed or (array.shape[1] != n and array.shape[0] == n)


def output_error(original: Array, decoded: Array, second_moments: Array) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ), the squared error of W x summed over the text that H is of.

    original, decoded: W and Ŵ, [out, in], of any float dtype. second_moments: H = Σ g² x xᵀ of the
    inputs [in, in], or its diagonal [in]. Computed in float64. Differences of weights that are not
    finite count as 0: they are stored as they are.
    """
    with np.errstate(invalid="ignore"):
        error = original.astype(np.float64) - decoded.astype(np.float64)
    return output_power(error, second_moments)


def output_power(weights: Array, second_moments: Array, *, exact: bool = True) -> float:
    """tr(W H Wᵀ), the squares of W x summed over the text that H is of. As `output_error`; unless
    exact, products are of float32, half the work: of weights, little cancels out."""
    import torch

    kind = np.float64 if exact else np.float32
    h = torch.from_numpy(np.ascontiguousarray(second_moments, kind))
    w = torch.from_numpy(np.array(weights, kind, order="C")).nan_to_num_(0, 0, 0)
    if h.dim() == 1:
        return float(w.square().sum(0, dtype=torch.float64) @ h.double())
    total = 0.0
    for start in range(0, len(h), _BLOCK):  # H is symmetric: half of it, and the blocks on it
        stop = min(start + _BLOCK, len(h))
        own = w[:, start:stop]
        products = own @ h[start:stop, start:stop]
        if start:
            products += 2 * (w[:, :start] @ h[:start, start:stop])
        total += float(products.mul_(own).sum(dtype=torch.float64))
    return max(total, 0.0)  # sums of next to nothing may fall below


def promises(
    moments: Array, geometry: Geometry, bounds: ColumnBounds, rows: int
) -> tuple[float, float]:
    """What `output_error` is at most: by the lattice that weights were rounded to, unless clamps
    and casts spoil it; and by their bounds alone, always (`geometry.py`).

    moments: H, as it was summed up. geometry: of what was rounded by. rows: of [out, in].
    """
    h, epsilon = np.abs(moments), bounds.epsilon
    box = h @ np.square(epsilon) if h.ndim == 1 else epsilon @ h @ epsilon
    n_rows = float(rows)
    if bounds.factors is not None:
        n_rows = float(np.square(bounds.factors, dtype=np.float64).sum()) * _ROUNDED
    return geometry.lattice(bounds.steps.astype(np.float64), n_rows), n_rows * float(box) * _ROOM


def columns_kept(original: Array, decoded: Array, bounds: ColumnBounds) -> Columns:
    """The largest error over its channel's bound, in float64, and the bounds' range. Weights that
    are not finite are stored as they are."""
    epsilon = np.broadcast_to(bounds.of_weights(), original.shape)
    worst = 0.0
    for rows in range(0, len(original), _BLOCK):
        with np.errstate(invalid="ignore"):
            error = original[rows : rows + _BLOCK].astype(np.float64)
            error -= decoded[rows : rows + _BLOCK]
        np.abs(error, out=error)
        error /= epsilon[rows : rows + _BLOCK]
        worst = max(worst, float(np.nanmax(error, initial=0.0)))
    return Columns(*bounds.ends, worst)


def outputs_kept(
    original: Array, decoded: Array, bounds: ColumnBounds, moments: Array, tokens: int,
    geometry: Geometry,
) -> Outputs:  # fmt: skip
    """What became of a matrix's outputs on the text that `moments` is of, and what was promised."""
    w, approximated = (a.T if bounds.transposed else a for a in (original, decoded))
    with one_thread():
        error, power = output_error(w, approximated, moments), output_power(w, moments, exact=False)
    lattice, box = promises(moments, geometry, bounds, len(w))
    return Outputs(tokens, error, lattice if error <= lattice else box, power)


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
        return arrays[role].T if turned(arrays[role], n, role in transposed) else arrays[role]

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


def _rows(original: Array, decoded: Array, second_moments: Array) -> Array:
    """[out] of each row."""
    with np.errstate(invalid="ignore"):
        error = original.astype(np.float64) - decoded.astype(np.float64)
    error = np.where(np.isfinite(error), error, 0.0)
    h = second_moments.astype(np.float64)
    found: Array = np.square(error) @ h if h.ndim == 1 else ((error @ h) * error).sum(1)
    return np.maximum(found, 0.0)
