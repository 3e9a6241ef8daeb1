"""How a layer's experts lie in the parameters of a transformers module: duck types, no class names.

transformers 5 keeps all experts of a layer in one module. A `Stack` says where in it each matrix
of each expert is, so that one can be viewed, always as [out, in], and written. Four duck types:

  fused    `num_experts`, 3-D `down_proj`, 3-D `gate_up_proj` (or `up_proj`: experts without gate).
           Nearly all families, and Llama 4. Either way round, told by the shapes; gate and up one
           after the other or alternating, told by `is_concatenated`
  linears  `input_linear.weight` and `output_linear.weight`, both 3-D: JetMoe's feed-forward experts
  rows     2-D `mlp.w1`, `v1`, `w2` of E · I rows each: DBRX

Source: integrations/moe.py and the modeling files of transformers 5.23. Left out: shared experts,
JetMoe's attention experts, encoder-decoder families, quantized experts (FP8, MXFP4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moebound.checkpoint import Role
from moebound.errors import UnsupportedArchitectureError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a stack keeps one role: parameter is its dotted name below the experts module, part
    maps (parameter, expert) to the view [out, in]."""

    parameter: str
    part: Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """The experts of one module. name: the module's, in the model. places: by role, in the order
    gate, up, down."""

    name: str
    module: nn.Module
    n_experts: int
    places: Mapping[Role, Place]

    def view(self, role: Role, expert: int) -> torch.Tensor:
        """The live matrix, [out, in], sharing the parameter's memory and outside of autograd.

        Looked up anew each time, so it is right after `model.to(...)` too. Raises
        UnsupportedArchitectureError where a view could not change the model: parameters on `meta`
        (offloaded, an edit in place would do nothing and say nothing) or quantized.
        """
        place = self.places[role]
        parameter = self._parameter(place.parameter)
        name = f"{self.name}.{place.parameter}"
        if parameter.device.type == "meta":
            raise UnsupportedArchitectureError(
                f"{name}: its weights are not in memory (device 'meta': offloaded to disk, or "
                "never loaded), so they can be neither read nor changed in place; load the model "
                "without disk offload"
            )
        if parameter.dtype not in FLOATS:
            raise UnsupportedArchitectureError(
                f"{name}: dtype {parameter.dtype}, expected one of "
                f"{', '.join(str(dtype) for dtype in FLOATS)}; dequantize the model first"
            )
        return place.part(parameter.detach(), expert)

    def shape(self, role: Role) -> tuple[int, int]:
        """Of each expert's matrix, [out, in]; known on `meta` too."""
        place = self.places[role]
        out, inputs = place.part(self._parameter(place.parameter).detach(), 0).shape
        return int(out), int(inputs)

    def on_meta(self, role: Role) -> bool:
        """Whether there are no weights of this role in memory."""
        return self._parameter(self.places[role].parameter).device.type == "meta"

    def _parameter(self, name: str) -> torch.Tensor:
        owner, _, attribute = name.rpartition(".")
        found = getattr(self.module.get_submodule(owner), attribute)
        assert isinstance(found, torch.Tensor)
        return found


def find_stack(name: str, module: nn.Module) -> Stack | None:
    """The stack of experts that this module is, or None if it is none.

    Raises UnsupportedArchitectureError for a module that looks like one and whose shapes fit none
    of the known packings.
    """
    for duck_type in (_fused, _linears, _rows):
        stack = duck_type(name, module)
        if stack is not None:
            return stack
    return None


def _fused(name: str, module: nn.Module) -> Stack | None:
    down = _own(module, "down_proj", 3)
    n_experts = getattr(module, "num_experts", None)
    if down is None or not isinstance(n_experts, int):
        return None
    entry_name = "gate_up_proj" if _own(module, "gate_up_proj", 3) is not None else "up_proj"
    entry = _own(module, entry_name, 3)
    if entry is None:
        return None
    gated = entry_name == "gate_up_proj"
    factor = 2 if gated else 1
    as_linear = entry.shape[1] == factor * down.shape[2] and entry.shape[2] == down.shape[1]
    as_matmul = entry.shape[1] == down.shape[2] and entry.shape[2] == factor * down.shape[1]
    # Without a gate both can fit (entry and down are each other's mirror image): ask the module.
    transposed = as_matmul and (not as_linear or bool(getattr(module, "is_transposed", False)))
    if not (as_linear or as_matmul) or not entry.shape[0] == down.shape[0] == n_experts:
        raise UnsupportedArchitectureError(
            f"{name}: {n_experts} experts with {entry_name} {tuple(entry.shape)} and down_proj "
            f"{tuple(down.shape)}, expected [E, {factor}I, H] and [E, H, I], or both transposed"
        )

    def oriented(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.mT if transposed else matrix

    places: dict[Role, Place] = {}
    if gated:
        interleaved = not getattr(module, "is_concatenated", True)
        half = entry.shape[2 if transposed else 1] // 2
        gate, up = (
            (slice(0, None, 2), slice(1, None, 2))
            if interleaved
            else (slice(half), slice(half, None))
        )
        places["gate"] = Place(entry_name, lambda p, e: oriented(p[e])[gate])
        places["up"] = Place(entry_name, lambda p, e: oriented(p[e])[up])
    else:
        places["up"] = Place(entry_name, lambda p, e: oriented(p[e]))
    places["down"] = Place("down_proj", lambda p, e: oriented(p[e]))
    return Stack(name, module, n_experts, places)


def _linears(name: str, module: nn.Module) -> Stack | None:
    entry = _own(getattr(module, "input_linear", None), "weight", 3)
    down = _own(getattr(module, "output_linear", None), "weight", 3)
    if entry is None or down is None:
        return None
    half = down.shape[2]
    if entry.shape[1] != 2 * half:
        return None  # JetMoe's attention experts: no gate, another job
    return Stack(
        name,
        module,
        entry.shape[0],
        {
            "gate": Place("input_linear.weight", lambda p, e: p[e, :half]),
            "up": Place("input_linear.weight", lambda p, e: p[e, half:]),
            "down": Place("output_linear.weight", lambda p, e: p[e]),
        },
    )


def _rows(name: str, module: nn.Module) -> Stack | None:
    inner = getattr(module, "mlp", None)
    n_experts = getattr(module, "num_experts", None)
    found = [_own(inner, leaf, 2) for leaf in ("w1", "v1", "w2")]
    if not isinstance(n_experts, int) or any(matrix is None for matrix in found):
        return None

    def rows(parameter: torch.Tensor, expert: int) -> torch.Tensor:
        return parameter.view(n_experts, -1, parameter.shape[1])[expert]

    return Stack(
        name,
        module,
        n_experts,
        {
            "gate": Place("mlp.w1", rows),
            "up": Place("mlp.v1", rows),
            "down": Place("mlp.w2", lambda p, e: rows(p, e).mT),
        },
    )


def _own(module: Any, name: str, dimensions: int) -> torch.Tensor | None:
    """A module's own tensor of that name and number of dimensions."""
    found = getattr(module, name, None) if isinstance(module, nn.Module) else None
    return found if isinstance(found, torch.Tensor) and found.dim() == dimensions else None
