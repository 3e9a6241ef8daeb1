"""cuSZp's stream on a device: what is said where there is none."""

from __future__ import annotations

import pytest
import torch

from moebound.codec.cuszp import encode_stream as encode_on_cpu
from moebound.codec.device.cuszp import decode_stream, encode_stream
from moebound.errors import BackendUnavailable


def test_a_cpu_is_no_device() -> None:
    x = torch.ones(64)
    stream = torch.frombuffer(bytearray(encode_on_cpu(x.numpy(), 0.1)), dtype=torch.uint8)
    with pytest.raises(BackendUnavailable, match=r"CUDA|pip install"):
        encode_stream(x, 0.1)
    with pytest.raises(BackendUnavailable, match=r"CUDA|pip install"):
        decode_stream(stream, 64, 0.1)
