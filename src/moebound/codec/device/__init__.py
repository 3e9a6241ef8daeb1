"""Codec `bound` on a GPU, from the same bytes: docs/format.md has them, docs/gpu.md the reasons.

In the order of travel:

    stream.py         an envelope, parsed and checked on the host: what the device needs
    metadata.py       ... of many arrays, as numbers in one block
    jobs.py           what of it one launch decodes, from where, to where
    batch.py          many arrays, one launch: start reading there
    resident.py       ... with the metadata on the device for good
    kept_tables.py    ... and the decoding tables, expanded
    launch.py         what is allocated and run, and what came of it
    decode_kernel.py  its kernels, in Triton
    encode.py         the other way, to the same bytes as on the CPU
    encode_kernel.py  its kernels

cuszp.py and cuszp_kernels.py, apart from these, are the stream of cuSZp (docs/format-cuszp.md),
both ways.

`encode_on` is in `encode.py`; nothing else here imports torch before it is used.
"""

from moebound.codec.device.batch import DecodeBatch, decode_to
from moebound.codec.device.launch import DEFAULT_SCHEDULE, Launched, PreparedDecode, Schedule
from moebound.codec.device.resident import Resident
from moebound.codec.device.stream import Stream, read_stream

__all__ = [
    "DEFAULT_SCHEDULE",
    "DecodeBatch",
    "Launched",
    "PreparedDecode",
    "Resident",
    "Schedule",
    "Stream",
    "decode_to",
    "read_stream",
]
