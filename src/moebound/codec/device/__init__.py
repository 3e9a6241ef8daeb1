"""Codec `bound` on a GPU, from the same bytes: docs/format.md has them, docs/gpu.md the reasons.

    stream.py         an envelope, parsed and checked on the host: what the device needs
    metadata.py       ... as numbers in one block
    plan.py           many arrays, one launch: start reading there
    decode_kernel.py  the kernels, in Triton
"""

from moebound.codec.device.plan import DecodePlan, Launched, decode_to, plan_decode
from moebound.codec.device.stream import Stream, read_stream

__all__ = ["DecodePlan", "Launched", "Stream", "decode_to", "plan_decode", "read_stream"]
