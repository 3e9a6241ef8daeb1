"""cuSZp's stream on a device: what is said where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moebound.codec.cuszp import encode_stream as encode_on_cpu
from moebound.codec.device.cuszp import Placed, decode_stream, encode_stream, read
from moebound.errors import BackendUnavailable, BoundError, CodecError


@pytest.mark.parametrize("n", [True, 64.0, "64", None])
def test_a_number_of_values_is_a_whole_number(n: Any) -> None:
    stream = torch.frombuffer(
        bytearray(encode_on_cpu(np.ones(64, np.float32), 0.1)), dtype=torch.uint8
    )
    with pytest.raises(CodecError, match="cuszp: n"):
        decode_stream(stream, n, 0.1)
    with pytest.raises(BoundError, match="expected a number"):
        decode_stream(stream, 64, True)
    with pytest.raises(CodecError, match="expected bfloat16, float16 or float32"):
        decode_stream(stream, 64, 0.1, dtype=torch.float64)


def test_what_is_decoded_does_not_lie_over_its_stream() -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    nothing = torch.zeros(1, dtype=torch.int64)
    inside = torch.zeros(1024, dtype=torch.int32)
    placed = Placed(nothing, inside, nothing, 1030)
    out = memory[1028 : 1028 + 256].view(torch.float32)
    with pytest.raises(CodecError, match="overlap"):
        read(memory[:1030], placed, out, 0.1, "plain")


def test_a_cpu_is_no_device() -> None:
    x = torch.ones(64)
    stream = torch.frombuffer(bytearray(encode_on_cpu(x.numpy(), 0.1)), dtype=torch.uint8)
    with pytest.raises(BackendUnavailable, match=r"CUDA|pip install"):
        encode_stream(x, 0.1)
    with pytest.raises(BackendUnavailable, match=r"CUDA|pip install"):
        decode_stream(stream, 64, 0.1)
