"""AWQ (Lin et al., 2306.00978), with scales for each expert: `awq_re:int4:g128`.

Section 3.2, as the released search has it. Input channels are multiplied by t before rounding, and
divided by it again; of t = x̄^a / (w̄^(1-a) + 1e-4), divided by sqrt(max t · min t), that with the
least error of outputs is taken, a from 0 to 0.95 by 0.05. w̄ is the mean of |w| / max|w| of its
group. Then each group's extremes are clipped to shares of 1 to 0.55 of the largest magnitude, to
that with the least error of the group's part of the outputs. Asymmetric grids.

Stored: float16 scales, zero points of b bits, a float16 c = 1/t for each input channel, integers
(`grid.py`). t is what the stored c says.

Deviations. Released code folds one t for all experts' gate and up into the norm before them, and so
into the router, and that of down into up's rows; here each matrix has its own, in 2 N bytes, and
router and norm stay. x̄ is sqrt(Σ g² x² / tokens) up to a factor that cancels out, in the place of
mean|x|, and errors are tr((W - Ŵ) H (W - Ŵ)ᵀ) of each matrix, in the place of the block's output on
samples: statistics have H, with the router's weight in it, and no inputs. H is shrunk toward the
layer's (`shrinkage.py`): an expert that saw no token has its layer's t. Where the layer saw none
either, t is 1 and the grid is that of the weights. No bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moebound.errors import MethodError
from moebound.methods.outputs import output_power
from moebound.methods.quantizing.grid import Grid, Quantized
from moebound.methods.rtn import asymmetric
from moebound.types import Array

_TURNS = 20
_CLIPS = 10
_LEAST, _MOST = 2.0**-14, 2.0**15


@dataclass(frozen=True)
class Awq(Grid):
    """A payload: `grid.py`, asymmetric, with c."""

    id: ClassVar[str] = "awq_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden"})
    group: int = 128

    def fitted(self, matrix: Array, moments: Array | None) -> Quantized:
        if moments is None:
            raise MethodError(f"method {self.id!r}: expected second moments, found none")
        power = moments if moments.ndim == 1 else moments.diagonal()
        if not power.any():
            return self._rounded(matrix, np.ones(matrix.shape[1], np.float16), None)
        x, w = np.sqrt(power / power.mean()), self._sizes(matrix)
        best: tuple[float, Array] | None = None
        for turn in range(_TURNS):
            a = turn / _TURNS
            t = np.maximum(x**a / (w ** (1 - a) + 1e-4), 1e-4)
            t /= np.sqrt(t.max() * t.min())
            columns = (1 / t).clip(_LEAST, _MOST).astype(np.float16)
            found = self._rounded(matrix, columns, None)
            error = output_power(matrix - self._weights(found), moments, exact=False)
            if best is None or error < best[0]:
                best = error, columns
        assert best is not None
        return self._rounded(matrix, best[1], moments)

    def _sizes(self, matrix: Array) -> Array:
        """w̄ [N] float64."""
        total = np.zeros(matrix.shape[1])
        for at in range(0, matrix.shape[1], self.group):
            part = np.abs(matrix[:, at : at + self.group]).astype(np.float64)
            largest = part.max(axis=1, keepdims=True)
            total[at : at + self.group] = (part / np.where(largest > 0, largest, 1)).mean(axis=0)
        return total

    def _rounded(self, matrix: Array, columns: Array, moments: Array | None) -> Quantized:
        """With groups clipped, if moments say by what."""
        c = columns.astype(np.float32)
        scaled = matrix / c
        codes = np.empty(matrix.shape, np.uint8)
        scales, zeros = [], []
        for at in range(0, matrix.shape[1], self.group):
            own = slice(at, at + self.group)
            part = scaled[:, own]
            q, scale, zero = _grid(part, self.bits)
            if moments is not None:
                h = np.diag(moments[own]) if moments.ndim == 1 else moments[own, own]
                h = h * np.outer(c[own], c[own])  # of the scaled inputs
                least = _error(part, q, scale, zero, h)
                largest = np.abs(part).max(axis=1, keepdims=True)
                for clip in range(1, _CLIPS):
                    most = largest * np.float32(1 - clip / _TURNS)
                    other = _grid(part.clip(-most, most), self.bits)
                    error = _error(part, *other, h)
                    better = (error < least)[:, None]
                    q, scale, zero = (
                        np.where(better, b, a) for a, b in zip((q, scale, zero), other, strict=True)
                    )
                    least = np.minimum(least, error)
            codes[:, own] = q
            scales.append(scale)
            zeros.append(zero)
        return Quantized(codes, np.hstack(scales), np.hstack(zeros).astype(np.uint8), columns)

    def _weights(self, found: Quantized) -> Array:
        """As they decode, float32."""
        assert found.zero is not None
        assert found.columns is not None
        weights = found.codes.astype(np.float32)
        for g, at in enumerate(range(0, weights.shape[1], self.group)):
            part = weights[:, at : at + self.group]
            part -= found.zero[:, g : g + 1]
            part *= _steps(found.scale[:, g : g + 1])
        weights *= found.columns.astype(np.float32)
        return weights


def _steps(scale: Array) -> Array:
    found: Array = np.where(scale > 0, scale, 1).astype(np.float32)
    return found


def _grid(part: Array, bits: int) -> tuple[Array, Array, Array]:
    """q, scale and zero of a group [O, g]."""
    scale, step, zero = asymmetric(part, bits)
    return np.clip(np.rint(part / step + zero), 0, 2**bits - 1), scale, zero


def _error(part: Array, q: Array, scale: Array, zero: Array, h: Array) -> Array:
    """[O], of the group's part of the outputs."""
    import torch  # whose threads are one here

    off = torch.from_numpy((part - (q - zero) * _steps(scale)).astype(np.float64))
    found: Array = (off @ torch.from_numpy(h)).mul_(off).sum(1).numpy()
    return found
