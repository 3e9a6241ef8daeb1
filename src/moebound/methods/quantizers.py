"""What else is used: low-bit quantizers, as error sources, with every byte they need counted.

  rtn:int4:g64         round to nearest in groups of 64 consecutive weights, each group with a
                       float16 scale and a zero point of 4 bits between its extremes (asymmetric,
                       as in AutoAWQ and GPTQ's baseline): 4 + 20/64 bits a weight
  rtn:int4:g64:coded   the same weights; the integers entropy-coded as an array of codec `bound`
  hqq:int4:g64         Half-Quadratic Quantization (Badri and Shaji, 2023) by its own library, as
                       `hqq` quantizes by default (axis 1): 4 + 32/64 bits a weight

None of them knows a bound: what they leave is measured, not promised. A group runs over the end of
a row where rows are shorter, as in hqq. A matrix that groups do not divide ends with a shorter one
(hqq refuses it). Integers of 3 bits are counted as 3 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moebound.checkpoint.families import Role
from moebound.codec import encode_certified
from moebound.errors import MoeboundError
from moebound.extras import need
from moebound.sensitivity.noise import Changed, ErrorSource, Generators
from moebound.types import Array, DType, ErrorBound, TensorStats

_ID = re.compile(r"(rtn|hqq):int([2-8]):g(\d+)(:coded)?")
_SCALE_BITS = 16


@dataclass(frozen=True)
class Quantized:
    """weights: float32, as decoded. codes: the integers, one a weight, in the matrix's shape.
    side_bits: of scales and zero points, all groups."""

    weights: torch.Tensor
    codes: Array
    side_bits: int


@dataclass(frozen=True)
class Quantizer(ErrorSource):
    """method: "rtn" or "hqq". bits: of each integer. group: weights that share a scale. coded:
    whether the integers are entropy-coded."""

    method: str
    bits: int
    group: int
    coded: bool = False
    seeded: ClassVar[bool] = False
    simulated: ClassVar[bool] = False

    @property
    def id(self) -> str:
        return f"{self.method}:int{self.bits}:g{self.group}" + (":coded" if self.coded else "")

    @property
    def needs_bound(self) -> bool:
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hqq",) if self.method == "hqq" else ()

    def _apply(
        self,
        weights: Mapping[Role, torch.Tensor],
        bound: ErrorBound | None,
        expert_stats: TensorStats,
        epsilons: Mapping[Role, float] | None,
        generators: Generators,
        dtype: DType | None,
    ) -> Changed:
        quantize = _rtn if self.method == "rtn" else _hqq
        changed: dict[Role, torch.Tensor] = {}
        n_bits = 0
        for role, matrix in weights.items():
            found = quantize(matrix.float().cpu(), self.bits, self.group)
            changed[role] = found.weights
            n_bits += found.side_bits + self._code_bits(found.codes)
        return Changed(changed, None, (n_bits + 7) // 8)

    def _code_bits(self, codes: Array) -> int:
        if not self.coded:
            return int(codes.size * self.bits)
        # Integers that differ by one are farther apart than 2ε: nothing is lost.
        half = ErrorBound(0.25)
        return 8 * len(encode_certified(codes.astype(np.float32), half, codec="bound").data)


def parse_quantizer(text: str) -> Quantizer | None:
    """The quantizer of an id, None if it is not one's. Raises MoeboundError for sizes that make no
    sense."""
    found = _ID.fullmatch(text)
    if not found:
        return None
    group = int(found[3])
    if group < 2:
        raise MoeboundError(f"error source {text!r}: expected groups of 2 weights or more")
    return Quantizer(found[1], int(found[2]), group, bool(found[4]))


def _rtn(matrix: torch.Tensor, bits: int, group: int) -> Quantized:
    flat = matrix.flatten()
    rest = -len(flat) % group
    # Padding repeats the last weight: the last group's extremes stay its own.
    groups = torch.cat([flat, flat[-1:].expand(rest)]).reshape(-1, group)
    # Zero is in every group's range, so a zero point of so many bits can name it.
    low = groups.amin(dim=1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    weights = ((codes - zero) * scale).flatten()[: len(flat)].reshape(matrix.shape)
    integers = codes.flatten()[: len(flat)].reshape(matrix.shape).to(torch.uint8).numpy()
    return Quantized(weights, integers, len(groups) * (_SCALE_BITS + bits))


def _hqq(matrix: torch.Tensor, bits: int, group: int) -> Quantized:
    quantizer = _hqq_quantizer()
    if matrix.numel() % group:
        raise MoeboundError(
            f"hqq:int{bits}:g{group}: a matrix of {matrix.numel()} weights is not a whole number "
            "of groups, which hqq asks for"
        )
    codes, meta = quantizer.quantize(
        matrix, nbits=bits, group_size=group, axis=1, device="cpu", bitpack=False,
        compute_dtype=torch.float16,
    )  # fmt: skip
    scale, zero = meta["scale"].float(), meta["zero"].float()
    weights = ((codes.float() - zero) * scale).reshape(matrix.shape)
    integers = codes.reshape(matrix.shape).to(torch.uint8).numpy()
    return Quantized(weights, integers, 2 * _SCALE_BITS * scale.numel())


def _hqq_quantizer() -> Any:
    return need("hqq.core.quantize", "quantizer hqq").Quantizer
