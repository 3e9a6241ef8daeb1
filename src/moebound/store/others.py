"""Tensors that are no routed expert's: attention, dense and shared layers, embeddings, head.

    others="keep"      each stays as it is
    others="lossless"  those of LEAST_WEIGHTS and more are coded by codec `lossless`; `raw`, where
                       that is not smaller
    others=0.1         matrices are coded by codec `bound`, no weight off by more than 0.1 times its
                       matrix's mean |weight|; all others as by "lossless"

A router decides by small differences which experts compute, and norms, biases and gates scale whole
rows, in a few weights: they lose nothing under a rate. Routed experts that were not chosen stay as
they are, and so do the experts of prediction heads.
"""

from __future__ import annotations

import math

from moebound.checkpoint import Family, TensorInfo, read_tensor
from moebound.checkpoint.families import ROUTERS
from moebound.codec import encode_certified
from moebound.codec.lossless import MAX_WEIGHTS
from moebound.codec.registry import codec_class
from moebound.errors import BoundError, CodecError
from moebound.store.format import CodedRecord, Others
from moebound.store.ratio import kept_ratio
from moebound.types import NO_LOSS, NUMPY_DTYPES, Array, ErrorBound

LEAST_WEIGHTS = 4096
"""Of smaller ones, the certificate takes a good part of what coding saves."""

_GATES = frozenset({*ROUTERS, "router", "gate", "shared_expert_gate", "classifier", "wg"})
"""What routers, and the gate of a shared expert, are called in names of tensors."""


def may_be_coded(tensor: TensorInfo, family: Family | None) -> bool:
    """Whether a tensor that no expert of the store has is coded unless all are kept."""
    return (
        tensor.dtype in NUMPY_DTYPES
        and LEAST_WEIGHTS <= math.prod(tensor.shape) <= MAX_WEIGHTS
        and (family is None or family.match(tensor.name) is None)
    )


def bound_of(name: str, shape: tuple[int, ...], others: Others) -> ErrorBound:
    """What is promised of a tensor that is coded."""
    if isinstance(others, str) or len(shape) != 2 or min(shape) < 2:
        return NO_LOSS
    words = name.split(".")
    if words[-1].endswith("bias") or _GATES & set(words[-2:]):
        return NO_LOSS
    return ErrorBound(others, "rate", "matrix")


CODERS = ("bound", "lossless", "raw")


def coder_versions() -> dict[str, int]:
    """Of the codecs that tensors may be coded by: they decide the bytes."""
    return {name: codec_class(name).version for name in CODERS}


def encode_other(tensor: TensorInfo, others: Others) -> tuple[CodedRecord, bytes]:
    """Its bytes, decoded again and measured. Raises as reading and `encode_certified` do."""
    try:
        return _encode(tensor, read_tensor(tensor), others)
    except (BoundError, CodecError) as error:
        raise type(error)(f"{tensor.file}: tensor {tensor.name!r}: {error}") from error


def _encode(tensor: TensorInfo, array: Array, others: Others) -> tuple[CodedRecord, bytes]:
    bound = bound_of(tensor.name, tensor.shape, others)
    made = encode_certified(array, bound, codec="lossless" if bound == NO_LOSS else "bound")
    if len(made.data) >= array.nbytes:
        made = encode_certified(array, NO_LOSS, codec="raw")
    certificate = made.certificate
    ratio = kept_ratio(certificate, array)
    return CodedRecord(tensor.name, tensor.file.name, ratio, certificate), made.data
