"""GPTQ (Frantar et al., 2210.17323), on every expert: `gptq_re:int4:g128`.

Section 3, algorithm 1, with H the second moments of a matrix's inputs, H + 0.01 mean(diag H) I:

  grid      of each row and group of input channels, between the extremes of the weights as they are
            when the group's turn comes, asymmetric, zero in it
  rounding  input channel by input channel, to the nearest, q within b bits; those behind take up
            the error (`feedback.py`, the same points as the paper's)

Stored: float16 scales, zero points of b bits, integers (`grid.py`).

Deviations. H = Σ g² x xᵀ, with the router's weight in it, as statistics have it; the paper has no
experts, and g = 1. H is shrunk toward the layer's (`shrinkage.py`), with the extra damping that few
tokens get there, so an expert that saw no token is rounded by what its layer saw. Released code for
experts (MC-MoE, MoEQuant, MxMoE) sets all of its weights to zero. Where the layer saw none either,
or only the diagonal of H is known, this is rounding to the nearest. Input channels keep their order
(no `desc_act`). H of the down projection is that of the unquantized gate and up. No bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moebound.errors import MethodError
from moebound.methods.quantizing.grid import Grid, Quantized
from moebound.methods.rtn import asymmetric
from moebound.types import Array

DAMPING = 0.01


@dataclass(frozen=True)
class Gptq(Grid):
    """A payload: `grid.py`, asymmetric."""

    id: ClassVar[str] = "gptq_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden"})
    group: int = 128

    def fitted(self, matrix: Array, moments: Array | None) -> Quantized:
        import torch

        from moebound.methods.feedback import damped, quantize_with_feedback, upper_factor

        if moments is None:
            raise MethodError(f"method {self.id!r}: expected second moments, found none")
        h = torch.from_numpy(np.ascontiguousarray(moments, np.float64))
        upper = upper_factor(damped(h.diag() if h.dim() == 1 else h, DAMPING))
        scales, zeros = [], []

        def grid(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale, step, zero = asymmetric(weights.numpy(), self.bits)
            scales.append(scale)
            zeros.append(zero)
            return torch.from_numpy(step[:, 0]), torch.from_numpy(zero[:, 0])

        codes = quantize_with_feedback(
            torch.from_numpy(matrix), upper, self.group, 2**self.bits - 1, grid
        )
        return Quantized(
            codes.numpy().astype(np.uint8), np.hstack(scales), np.hstack(zeros).astype(np.uint8)
        )
