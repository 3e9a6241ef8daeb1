"""The door to the kernels: triton is imported here, when something is to run on a device.

`launch` calls a kernel. Triton binds and specialises the arguments of each call anew, in Python,
and that takes many times as long as the rest of a launch. What it finds is known here beforehand,
so it is asked once for each set of constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moebound.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch


class Kernels(NamedTuple):
    """The modules of kernels."""

    decode_kernel: Any
    encode_kernel: Any


def kernels(device: torch.device) -> Kernels:
    """The kernels, if they can run on this device.

    Raises BackendUnavailable without triton, and for a device that is not CUDA; with
    TRITON_INTERPRET=1 the CPU will do, slowly, for tests.
    """
    try:
        import triton
    except ImportError:
        raise BackendUnavailable(
            "work on a device needs triton: pip install 'moebound[gpu]'"
        ) from None
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise BackendUnavailable(
            f"device {device}: expected a CUDA device; on the CPU use moebound.encode and "
            "moebound.decode"
        )
    from moebound.codec.device import decode_kernel, encode_kernel

    return Kernels(decode_kernel, encode_kernel)


def launch(
    function: Any,
    n_programs: tuple[int, int],
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
) -> None:
    """Launch a kernel on the current stream.

    function: takes the tensors, then the numbers, then the constants, in this order, and has all of
    its numbers in do_not_specialize; they fit 32 bits.
    """
    grid = (*n_programs, 1)
    # What else a compiled kernel depends on: which addresses are multiples of 16.
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    place = (id(function), tensors[0].device, num_warps, aligned, *constants.values())
    compiled = _COMPILED.get(place)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants.values())
        return
    compiled = function[grid](
        *tensors, *numbers, **constants, num_warps=num_warps, enable_fp_fusion=False
    )
    if compiled is not None:  # it is under the interpreter
        _COMPILED[place] = compiled


_COMPILED: dict[tuple[Any, ...], Any] = {}
