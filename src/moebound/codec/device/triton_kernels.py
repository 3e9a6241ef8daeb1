"""The door to the kernels: triton is imported here, when something is to run on a device."""

from __future__ import annotations

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
