"""QMoE (Frantar and Alistarh, 2310.16795): ternary weights, below one bit each: `qmoe_re`.

Section 3, on every expert, by GPTQ (2210.17323) with H + 0.1 mean(diag H) I:

    grid      of each row, before anything is rounded: its least weight (0 at most), zero, and its
              largest (0 at least), as bfloat16
    rounding  input channel by input channel: the largest above half of it, the least below half of
              it, else zero; those behind take up the error (`feedback.py`)

Most weights of a row that is about Gaussian are zero then, and section 4 codes runs of them, the
whole dictionary of which is fixed: `code_words.py`.

Stored: two bfloat16 for each row, where each row begins among the code words, as uint32, and code
words of 16 bits. With C code words that is

    2 C + 4 (O + 1) + 4 O bytes and a byte of flags,

at 0.885 zeros 0.74 + 64 / N bits a weight. `qmoe_re:coded` has the same weights; its symbols are
entropy-coded instead, as an array of codec `bound`.

Deviations. The dictionary is computed when it is needed, and no store has its 512 KiB. Among
equally likely runs the released one is ordered by the rounding of products of floats; here, by
rule, so it is another one with the same lengths. Decoding is NumPy's, to a whole matrix, where
theirs is a kernel that multiplies at once. H = Σ g² x xᵀ, with the router's weight in it, as
statistics have it; the paper's g is 1. H is shrunk toward the layer's (`shrinkage.py`), so an
expert that saw no token is rounded by what its layer saw, where the paper has the identity; one
that is not positive definite is damped more, where the paper has the identity too. Where the layer
saw none, or only the diagonal of H is known, this is rounding to the nearest. Of the text, padding
alone is left out: special tokens, which the paper masks, count, and experts with many tokens are
not cut to four times the mean, which saves memory that sums do not take. H of the down projection
is that of the unquantized gate and up. No bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np

from moebound.codec.bound import BoundCodec
from moebound.codec.fields import FieldReader
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import MatrixSpec
from moebound.methods.packing import code, uncode
from moebound.methods.quantizing import code_words
from moebound.methods.quantizing.code_words import MOST_WEIGHTS, Symbols
from moebound.methods.quantizing.upright import Upright
from moebound.types import Array

DAMPING = 0.1
_CODED, _TURNED = 1, 2
_HALF = 0.25
_MOST_WORDS = (1 << 32) - 1


@dataclass(frozen=True)
class Qmoe(Upright):
    """A payload: flags, the ends of each row's grid, begins of rows, code words.

    coded: whether the symbols are entropy-coded, in the place of begins and code words.
    """

    id: ClassVar[str] = "qmoe_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden"})
    coded: bool = False

    @classmethod
    def from_options(cls, options: str) -> Self:
        if options not in ("", "coded"):
            raise MethodError(
                f"method '{cls.id}:{options}': expected {cls.id}, or {cls.id}:coded, if an entropy "
                "coder is to take the place of code words"
            )
        return cls(bool(options))

    @property
    def setting(self) -> str:
        return f"{self.id}:coded" if self.coded else self.id

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        return max(n_bytes // 2 * MOST_WEIGHTS, BoundCodec.most_weights(n_bytes))

    def payload(self, matrix: Array, moments: Array | None, flip: bool) -> bytes:
        ends, symbols = self.ternary(matrix, moments)
        out = bytes([_CODED * self.coded | _TURNED * flip]) + ends.tobytes()
        if self.coded:
            return out + code(symbols, _HALF)
        words, begins = code_words.encode(symbols)
        if len(words) > _MOST_WORDS:
            raise MethodError(f"{len(words)} code words in one matrix: at most {_MOST_WORDS}")
        return out + begins.astype("<u4").tobytes() + words.astype("<u2").tobytes()

    def ternary(self, matrix: Array, moments: Array | None) -> tuple[Array, Symbols]:
        """The ends of each row's grid, [O, 2] bfloat16, and symbols [O, N]."""
        import torch

        from moebound.methods.feedback import damped, round_by_turns, upper_factor

        if moments is None:
            raise MethodError(f"method {self.id!r}: expected second moments, found none")
        low = np.minimum(matrix.min(axis=1), 0)
        high = np.maximum(matrix.max(axis=1), 0)
        with np.errstate(over="ignore"):
            ends = np.stack([low, high], axis=1).astype(ml_dtypes.bfloat16)
        grid = torch.from_numpy(ends.astype(np.float32))
        if not grid.isfinite().all():
            raise MethodError("a weight is beyond bfloat16")
        least, most = grid.unbind(1)
        h = torch.from_numpy(np.ascontiguousarray(moments, np.float64))
        upper = upper_factor(damped(h.diag() if h.dim() == 1 else h, DAMPING))
        symbols = torch.empty(matrix.shape[::-1], dtype=torch.uint8)
        none = torch.zeros_like(least)

        def nearest(k: int, wanted: torch.Tensor) -> torch.Tensor:
            up, down = (wanted > most / 2) & (most > 0), (wanted < least / 2) & (least < 0)
            symbols[k] = down + 2 * up.byte()
            return torch.where(up, most, torch.where(down, least, none))

        round_by_turns(torch.from_numpy(matrix), upper, nearest)
        return ends, symbols.T.contiguous().numpy()

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        (flags,) = read.take(1)
        if flags > 3 or len(spec.shape) != 2:
            raise CorruptionError(f"flags {flags}, {len(spec.shape)} dimensions")
        flip = bool(flags & _TURNED)
        rows, cols = spec.shape[::-1] if flip else spec.shape
        ends = np.frombuffer(read.take(4 * rows), ml_dtypes.bfloat16).astype(np.float32)
        ends = ends.reshape(rows, 2)
        if not np.isfinite(ends).all() or (ends[:, 0] > 0).any() or (ends[:, 1] < 0).any():
            raise CorruptionError("a row's grid does not go from 0 or less to 0 or more")
        grid = np.zeros((rows, 3), np.float32)
        grid[:, 1:] = ends
        if flags & _CODED:
            symbols = uncode(read.take(read.left), (rows, cols))
            if symbols.size and not 0 <= symbols.min() <= symbols.max() <= 2:
                raise CorruptionError("a symbol that is none of 0, 1 and 2")
            weights = _looked_up(grid, symbols)
        else:
            begins = np.frombuffer(read.take(4 * (rows + 1)), "<u4").astype(np.int64)
            if read.left % 2:
                raise CorruptionError(f"code words of 2 bytes in {read.left} bytes")
            words = np.frombuffer(read.take(read.left), "<u2")
            weights = np.empty((0, cols), np.float32)
            for some, found in code_words.decode(words, begins, cols):
                if not len(weights):  # all code words have been counted by now
                    weights = np.empty((rows, cols), np.float32)
                weights[some] = _looked_up(grid[some], found)
        return np.ascontiguousarray(weights.T) if flip else weights


def _looked_up(grid: Array, symbols: Array) -> Array:
    """[O, N] of what symbols [O, N] stand for in the grid [O, 3] of each row."""
    places = symbols.astype(np.intp)
    places += 3 * np.arange(len(grid))[:, None]
    found: Array = grid.reshape(-1)[places]
    return found
