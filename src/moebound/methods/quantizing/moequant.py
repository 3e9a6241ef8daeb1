"""MoEQuant's AGQ (Hu et al., 2505.03804): `moequant_re:int4`, `moequant_re:int4:g128:affinity`.

Section 3.3, affinity-guided quantization: GPTQ (2210.17323) with H = Σ g x xᵀ over the tokens sent
to an expert, g the router's weight, so that tokens count by their affinity, and 0.01 mean(diag H)
added to H's diagonal. As in the released code:

    grid      symmetric, -2^(b-1) .. 2^(b-1) - 1 steps, one step for each output channel, or for
              each of its groups when its turn comes; of 100% to 21% of max|w| / (2^(b-1) - 1), by
              1%, that with the least Σ |w - ŵ|^2.4
    rounding  input channel by input channel; those behind take up the error (`feedback.py`)

The paper's other half, EBSS, makes the text: `moebound calibrate --self-sample`
(`calibrate/self_sampling.py`).

Stored: float16 steps, integers (`grid.py`): b + 16/N bits a weight, or b + 16/g in groups.

Deviations. Statistics have H = Σ g² x xᵀ, which is what is used here unless `:affinity` asks for
the paper's, which `moebound calibrate --affinity` gathers beside it: the squared error of what the
layer adds to the residual stream has g², since g multiplies the output that is squared, so the
paper's is between that and GPTQ's own. H is shrunk toward the layer's (`shrinkage.py`), so an
expert that saw no token is rounded by what its layer saw; released code sets all of its weights to
zero. Where the layer saw none either, or only the diagonal of H is known, this is rounding to the
nearest. Left out: Hadamard rotation (MoEQuant++), since it would change what stands around the
experts; quantizing the router, and its weights again after that; shared experts' sigmoid gates,
for statistics are of routed ones. H of the down projection is that of the unquantized gate and up.
No bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moebound.codec.envelope import MAX_SIZE
from moebound.errors import MethodError
from moebound.methods.quantizing.gptq import DAMPING
from moebound.methods.quantizing.grid import Grid, Quantized
from moebound.types import Array

_OPTIONS = re.compile(r"int([2-8])(?::g([0-9]{1,13}))?(:affinity)?(:coded)?")
_SHRINKS, _STEPS, _NORM = 80, 100, 2.4
_LEAST = 1e-5
"""Of max|w|."""
_PIECE = 1 << 16
"""Weights that are looked at together: few enough to stay in a cache."""


@dataclass(frozen=True)
class MoeQuant(Grid):
    """A payload: `grid.py`, symmetric, one group a row unless said otherwise."""

    id: ClassVar[str] = "moequant_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden"})
    group: int = MAX_SIZE

    @classmethod
    def from_options(cls, options: str) -> Self:
        found = _OPTIONS.fullmatch(options)
        group = int(found[2]) if found and found[2] else MAX_SIZE
        if not found or not 2 <= group <= MAX_SIZE:
            raise MethodError(
                f"method '{cls.id}:{options}': expected integers of int2 to int8, as in "
                f"{cls.id}:int4, and :g128 for groups of 128 weights (2 or more) in the place of "
                "whole output channels; then :affinity for the paper's second moments, and :coded, "
                "if the integers are to be entropy-coded"
            )
        kind = _ByAffinity if found[3] else MoeQuant
        return kind(int(found[1]), group, bool(found[4]))  # type: ignore[return-value]

    @property
    def setting(self) -> str:
        group = "" if self.group == MAX_SIZE else f":g{self.group}"
        return f"{self.id}:int{self.bits}{group}{self.of.replace('_', ':')}" + (
            ":coded" if self.coded else ""
        )

    def fitted(self, matrix: Array, moments: Array | None) -> Quantized:
        import torch

        from moebound.methods.feedback import damped, quantize_with_feedback, upper_factor

        if moments is None:
            raise MethodError(f"method {self.id!r}: expected second moments, found none")
        h = torch.from_numpy(np.ascontiguousarray(moments, np.float64))
        upper = upper_factor(damped(h.diag() if h.dim() == 1 else h, DAMPING))
        scales: list[Array] = []

        def grid(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = steps(weights.numpy(), self.bits)
            scales.append(scale)
            step = torch.from_numpy(np.where(scale > 0, scale, 1).astype(np.float32)[:, 0])
            return step, torch.full_like(step, 1 << (self.bits - 1))

        group = min(self.group, matrix.shape[1])
        codes = quantize_with_feedback(
            torch.from_numpy(matrix), upper, group, 2**self.bits - 1, grid
        )
        return Quantized(codes.numpy().astype(np.uint8), np.hstack(scales))


@dataclass(frozen=True)
class _ByAffinity(MoeQuant):
    """With the paper's H."""

    statistics: ClassVar[frozenset[str]] = frozenset({"inputs_affinity", "hidden_affinity"})
    of: ClassVar[str] = "_affinity"


def steps(weights: Array, bits: int) -> Array:
    """[O, 1] float16, the step of each row of a group [O, g] float32. Raises MethodError for one
    that float16 does not hold."""
    import torch

    top = 2 ** (bits - 1) - 1
    found = np.empty((len(weights), 1), np.float16)
    rows = max(1, _PIECE // weights.shape[1])
    for first in range(0, len(weights), rows):
        w = torch.from_numpy(np.ascontiguousarray(weights[first : first + rows]))
        widest = w.abs().amax(1, keepdim=True).clamp_min_(_LEAST) / top
        best, least = widest.clone(), torch.full_like(widest, torch.inf)
        for shrink in range(_SHRINKS):
            step = widest * (1 - shrink / _STEPS)
            off = (w / step).round_().clamp_(-top - 1, top).mul_(step).sub_(w).abs_().pow_(_NORM)
            error = off.sum(1, keepdim=True)
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
        with np.errstate(over="ignore"):
            found[first : first + rows] = best.numpy().astype(np.float16)
    if not np.isfinite(found).all():
        raise MethodError("a scale is beyond float16")
    return found
