"""Array + bound -> bytes, and back. One file a codec, one interface, one registry."""

from moebound.codec.api import (
    Encoded,
    decode,
    decode_array,
    decode_into,
    encode,
    encode_certified,
    thread_count,
)
from moebound.codec.arrays import to_numpy, to_torch, torch_dtype
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.certificate import Certificate
from moebound.codec.envelope import Envelope, parse
from moebound.codec.estimate import estimate_bytes
from moebound.codec.measure import Distortion, measure, stats
from moebound.codec.registry import codec_ids, get_codec, register_codec
from moebound.codec.scaled import Steps, encode_codes, steps_in

__all__ = [
    "ArraySpec",
    "Certificate",
    "Codec",
    "Distortion",
    "Encoded",
    "Envelope",
    "Payload",
    "Steps",
    "codec_ids",
    "decode",
    "decode_array",
    "decode_into",
    "encode",
    "encode_certified",
    "encode_codes",
    "estimate_bytes",
    "get_codec",
    "measure",
    "parse",
    "register_codec",
    "stats",
    "steps_in",
    "thread_count",
    "to_numpy",
    "to_torch",
    "torch_dtype",
]
