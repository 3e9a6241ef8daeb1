"""Linear layers that are no expert's, held as codes instead of values: which of them can be.

A token reads all of them, in bfloat16 two bytes a weight. A store that was made with `--others
RATE` has their matrices as codes already, which are then decoded to a `CodeLinear`, and never to
weights. What holds for experts' slots of codes holds here (`codes.py`), matrix by matrix: what
cannot be four bits is a byte, and what cannot be that stays values.

    plan = plan_linears(entries, "codes4", device)
    model = load_skeleton(..., codes=plan.dtypes)     # layers without weights in their places
    held = fill_linears(model, entries, plan)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moebound.codec.bound import BoundCodec
from moebound.codec.codes import Bits, code_bytes
from moebound.errors import CacheError, CheckpointError
from moebound.model import few_rows
from moebound.model.code_linear import CodeLinear, bytes_in_codes
from moebound.model.few_rows import flat
from moebound.offload.codes import (
    TOO_MANY_OUTSIDE,
    SlotsName,
    stored_outside,
    uncoded,
    unreadable,
)
from moebound.offload.entries import DiskEntries
from moebound.store.reader import StoredMatrix
from moebound.store.stored import StoredTensor
from moebound.types import DType


@dataclass(frozen=True)
class LinearPlan:
    """bits: of the codes of each tensor that can be so. dtypes: what it decodes to. refused: why
    others are values, or not of as few bits as was asked for."""

    bits: Mapping[str, Bits]
    dtypes: Mapping[str, DType]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class HeldLinears:
    """n_bytes: of all that is no expert's. kinds: how many linear layers hold what, of those worth
    it. refused: how many coded matrices are values, or codes of a byte, by why."""

    n_bytes: int
    kinds: Mapping[SlotsName, int]
    refused: Mapping[str, int]


def plan_linears(entries: DiskEntries, linears: SlotsName, device: torch.device) -> LinearPlan:
    """Reads the heads of a store's matrices that are no routed expert's. Raises CacheError where
    codes are asked for of what has none."""
    bits, dtypes, refused = dict[str, Bits](), dict[str, DType](), dict[str, str]()
    if linears == "values":
        return LinearPlan(bits, dtypes, refused)
    coded = {
        name: stored
        for name, stored in entries.coded.items()
        if len(stored.record.certificate.shape) == 2
    }
    if not any(one.record.certificate.codec == BoundCodec.id for one in coded.values()):
        what = "its tensors that are no expert's are held without loss"
        if not entries.compressed:
            what = "no store"
        raise CacheError(
            f"linears={linears!r}: {entries.path}: {what}, so no linear layer has codes: compress "
            "with --others 0.1 (no weight is then off by more than 0.1 times its matrix's mean), "
            "or load with linears='values'"
        )
    for name, stored in coded.items():
        why = "on another device than the CPU" if device.type != "cpu" else _refused(stored)
        if why is not None:
            refused[name] = f"values: {why}"
            continue
        bits[name], dtypes[name] = 8, stored.record.certificate.dtype
        if linears == "codes4":
            if stored_outside(stored) is None:
                refused[name] = TOO_MANY_OUTSIDE
            else:
                bits[name] = 4
    return LinearPlan(bits, dtypes, refused)


def _refused(stored: StoredMatrix | StoredTensor) -> str | None:
    certificate = stored.record.certificate
    if isinstance(stored, StoredMatrix) and (stored.target is not None or stored.needs):
        return "made of another expert's or shared parts"
    if certificate.n_weights < few_rows.LEAST_WEIGHTS:
        return f"fewer than {few_rows.LEAST_WEIGHTS} weights"
    return uncoded(certificate) or unreadable(stored)


def fill_linears(
    model: nn.Module, entries: DiskEntries, plan: LinearPlan, *, threads: int
) -> HeldLinears:
    """Read and decode the codes of all layers that wait for some. Raises CheckpointError for those
    of another shape, and as `StoredTensor.read` and `decode_codes`."""
    waiting = {m.source: m for m in model.modules() if isinstance(m, CodeLinear)}
    for name, layer in waiting.items():
        stored = entries.coded[name]
        shape = layer.out_features, layer.in_features
        if stored.record.certificate.shape != shape:
            raise CheckpointError(
                f"{stored.tensor.file}: tensor {name!r}: of shape "
                f"{stored.record.certificate.shape}, the model expects {shape}"
            )
        # torch's memory begins where a cache line does; NumPy's does not.
        room = torch.empty(code_bytes(shape, plan.bits[name]), dtype=torch.uint8)
        layer.matrix = stored.decode_codes(
            stored.read(), flat(room), bits=plan.bits[name], threads=threads
        )
    refused = dict(plan.refused)
    for name in plan.bits.keys() - waiting.keys():
        # A model of float32 takes codes of all dtypes, so this one is of another.
        cast = _dtype_of(model) not in (plan.dtypes[name], "F32")
        refused[name] = "values: " + (
            f"of {plan.dtypes[name]}, which is cast"
            if cast
            else "no linear layer's weight, or another's or attention's too"
        )
    return HeldLinears(other_bytes(model), _kinds(model), Counter(refused.values()))


def _dtype_of(model: Any) -> DType:
    found: dict[torch.dtype, DType] = {torch.bfloat16: "BF16", torch.float16: "F16"}
    return found.get(model.dtype, "F32")


def _kinds(model: nn.Module) -> dict[SlotsName, int]:
    found = Counter[SlotsName]()
    for module in model.modules():
        if isinstance(module, CodeLinear):
            assert module.matrix is not None
            found["codes" if module.matrix.bits == 8 else "codes4"] += 1
        elif type(module) is nn.Linear and module.weight.numel() >= few_rows.LEAST_WEIGHTS:
            found["values"] += 1
    return dict(found)


def other_bytes(model: nn.Module) -> int:
    """Memory of a model's weights that are no expert's: parameters and buffers, once each, and
    codes."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = sum(some.numel() * some.itemsize for some in tensors if not some.is_meta)
    return bytes_in_codes(model) + plain
