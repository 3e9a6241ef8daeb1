"""The door to the kernels: triton is imported here, when something is to run on a device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moebound.errors import BackendUnavailable
from moebound.extras import need

if TYPE_CHECKING:
    import torch


_ONE_LAUNCH = threading.Lock()
"""Threads launch one after the other: triton's interpreter keeps what it runs in its module, and on
a GPU, where launches hold Python's own lock, a kernel that two ask for first is compiled once."""


class Kernels(NamedTuple):
    """The modules of kernels of codec `bound`."""

    decode_kernel: Any
    encode_kernel: Any


def check_device(device: torch.device) -> None:
    """Make sure that kernels can run on this device.

    Raises BackendUnavailable without triton, and for a device that is not CUDA; with
    TRITON_INTERPRET=1 the CPU will do, slowly, for tests.
    """
    triton = need("triton", "work on a device")
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise BackendUnavailable(
            f"device {device}: expected a CUDA device; on the CPU use moebound.encode and "
            "moebound.decode"
        )


def kernels(device: torch.device) -> Kernels:
    """The kernels of codec `bound`, if they can run on this device. Raises as check_device."""
    check_device(device)
    from moebound.codec.device import decode_kernel, encode_kernel

    return Kernels(decode_kernel, encode_kernel)


def cuszp_kernels(device: torch.device) -> Any:
    """The kernels of cuSZp's stream, likewise."""
    check_device(device)
    from moebound.codec.device import cuszp_kernels

    return cuszp_kernels


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
    with _ONE_LAUNCH:
        function[*n_programs, 1](
            *tensors, *numbers, **constants, num_warps=num_warps, enable_fp_fusion=False
        )
