"""Tensors of a GGUF file as those of the model in transformers.

What tensors a model has, and their names on the hub and shapes, transformers itself tells of the
config; which tensor of the file each is, `gguf`'s table of names. Here stands only what llama.cpp's
conversion changes in them, and how it is put back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from moebound.checkpoint.gguf_config import Arch
from moebound.checkpoint.gguf_header import Header
from moebound.checkpoint.gguf_undo import Change, Config, How, change_of
from moebound.checkpoint.quantized import Read, Weight
from moebound.checkpoint.shards import TensorInfo, is_text, tensor_bytes
from moebound.errors import (
    CheckpointError,
    CorruptionError,
    FormatError,
    UnsupportedArchitectureError,
)
from moebound.types import Array, DType

_EXPERT = re.compile(r"\.experts\.(?P<expert>\d{1,6})\.")
_LAYER = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<part>[\w.]+)")
_NO_WEIGHTS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""What the config says instead."""


@dataclass(frozen=True)
class Model:
    """What transformers says of the model that a config makes.

    tensors: names as on the hub -> shape. exact: those that are float32 beside bfloat16.
    """

    name: str
    tensors: Mapping[str, tuple[int, ...]]
    exact: frozenset[str]

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(_EXPERT.sub(".experts.", name) for name in self.tensors)

    def experts(self, name: str) -> int:
        """How many experts have a tensor as this one's."""
        return self._counts[_EXPERT.sub(".experts.", name)]


def model_of(config: Config) -> Model:
    """Makes it without memory for its weights."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    state = revert_weight_conversion(model, model.state_dict())
    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    tied = "lm_head.weight" if config.get("tie_word_embeddings") else None
    tensors = {name: tuple(value.shape) for name, value in state.items() if name != tied}
    whole = frozenset(name for name in tensors if any(part in name for part in exact))
    return Model(type(model).__name__, tensors, whole)


@dataclass(frozen=True)
class Block:
    """Values of one tensor of the file, or of some of its leading slices: which bytes they are."""

    bytes: TensorInfo
    kind: Any
    shape: tuple[int, ...]
    gguf: Any

    def between(self, first: int, last: int) -> Block:
        step = self.bytes.n_bytes // self.shape[0]
        part = replace(
            self.bytes,
            shape=(last - first, *self.bytes.shape[1:]),
            offset=self.bytes.offset + first * step,
            n_bytes=(last - first) * step,
        )
        return replace(self, bytes=part, shape=(last - first, *self.shape[1:]))

    def at(self, index: int) -> Block:
        one = self.between(index, index + 1)
        part = replace(one.bytes, shape=one.bytes.shape[1:])
        return replace(one, bytes=part, shape=one.shape[1:])

    def values(self, read: Read) -> Array:
        found: Array = self.gguf.quants.dequantize(read(self.bytes), self.kind)
        return found.astype(np.float32, copy=False).reshape(self.shape)


def tensors_of(header: Header, arch: Arch, config: Config, model: Model) -> dict[str, TensorInfo]:
    """The model's tensors, in the order of the file's.

    Raises UnsupportedArchitectureError for a tensor of the file that the model has not,
    CheckpointError for one of the model that the file has not, CorruptionError and FormatError for
    one of another shape, or of a type that is not dequantized.
    """
    blocks = {
        name: _block(file, tensor, header.gguf) for name, (file, tensor) in header.tensors.items()
    }
    named = _Names(header, config)
    _refuse_unknown(header, model, named)
    changes = {
        name: _change(header, arch, config, name, blocks.keys(), named) for name in model.tensors
    }
    made = {name: _find(header, model, name, change, blocks) for name, change in changes.items()}
    used = {part for change in changes.values() for part in change.parts}
    used.update(left_out(header, config))
    for name in blocks:
        if name not in used and name.removesuffix(".weight") not in _NO_WEIGHTS:
            raise _unknown(header, model, name)
    order = {name: at for at, name in enumerate(blocks)}
    names = sorted(made, key=lambda name: (order[changes[name].parts[0]], made[name].offset))
    return {name: made[name] for name in names}


class _Names:
    """`gguf`'s table: a tensor's name on the hub -> its name in the file."""

    def __init__(self, header: Header, config: Config) -> None:
        gguf = header.gguf
        arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == header.arch)
        self._table = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
        self.parts = {
            gguf.TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in gguf.MODEL_TENSORS[arch]
        }

    def of(self, name: str) -> str | None:
        # As llama.cpp's conversion spells them before it looks them up.
        name = _EXPERT.sub(".experts.", name)
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = re.sub(r"\.dt_bias$", ".dt_proj.bias", name)
        if name.endswith(".sinks"):
            name += ".weight"
        found = self._table.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)


def _change(
    header: Header, arch: Arch, config: Config, name: str, there: Collection[str], named: _Names
) -> Change:
    """The file's tensors that this one is made of, and how. `Change.how` is None where it is one of
    them as it is."""
    change = change_of(header.arch, arch.permuted, name, config, there) or Change(("",))
    parts = tuple(part or named.of(name) or "" for part in change.parts)
    fused = re.sub(r"ffn_(gate|up)_exps", "ffn_gate_up_exps", parts[0])
    if parts[0] not in there and fused in there:  # `--fuse-gate-up-exps`: gate before up
        return Change((fused,), half=int("ffn_up_exps" in parts[0]))
    return replace(change, parts=parts)


def _find(
    header: Header, model: Model, name: str, change: Change, blocks: Mapping[str, Block]
) -> TensorInfo:
    shape = model.tensors[name]
    for part in change.parts:
        if part not in blocks:
            raise CheckpointError(
                f"{header.file}: no tensor {part or 'there'} for {name!r}, which a {model.name} of "
                "its metadata has"
            )
    parts = [blocks[part] for part in change.parts]
    where = f"{parts[0].bytes.file}: tensor {change.parts[0]!r}"
    if expert := _EXPERT.search(name):
        count = model.experts(name)
        if any(len(part.shape) != 3 or part.shape[0] != count for part in parts):
            raise CorruptionError(
                f"{where} has shape {list(parts[0].shape)}, expected {count} experts in 3 axes"
            )
        parts = [part.at(int(expert["expert"])) for part in parts]
    if change.half is not None:
        rows = parts[0].shape[0] // 2
        parts = [parts[0].between(change.half * rows, (change.half + 1) * rows)]
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape) or (
        change.how is None and _sides(parts[0].shape) != _sides(shape)
    ):
        raise CorruptionError(
            f"{where} has shape {list(parts[0].shape)}, expected one that makes {list(shape)} of "
            f"{name!r}"
        )
    dtype: DType = "F32" if name in model.exact else "BF16"
    compute = partial(_compute, tuple(parts), shape, change, name)
    stored = Weight(tuple(part.bytes for part in parts), dtype, compute)
    first = parts[0].bytes
    return TensorInfo(
        name, dtype, shape, first.file, first.offset, tensor_bytes(dtype, shape), stored
    )


def _sides(shape: tuple[int, ...]) -> list[int]:
    return [side for side in shape if side != 1]


def _compute(
    parts: tuple[Block, ...], shape: tuple[int, ...], change: Change, name: str,
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    """Rows of a tensor."""
    if change.how is None:
        part = parts[0]
        if part.shape[0] == shape[0] and len(part.shape) > 1:
            return part.between(first, last).values(read).reshape(last - first, *shape[1:])
        return part.values(read).reshape(shape)[first:last]
    if not change.each:
        values = [part.values(read) for part in parts]
        return _made(change.how, values, shape, parts, name)[first:last]
    slices = (
        _made(change.how, [part.at(index).values(read) for part in parts], shape[1:], parts, name)
        for index in range(first, last)
    )
    return np.stack(list(slices))


def _made(
    how: How, values: list[Array], shape: tuple[int, ...], parts: tuple[Block, ...], name: str
) -> Array:
    try:
        return np.ascontiguousarray(how(*values)).reshape(shape)
    except ValueError as error:  # NumPy's, of shapes
        first = parts[0]
        raise CorruptionError(
            f"{first.bytes.file}: tensor {first.bytes.name!r} has shape {list(first.shape)}, which "
            f"does not make {list(shape)} of {name!r}: {error}"
        ) from error


def _block(file: Path, tensor: Any, gguf: Any) -> Block:
    shape = tuple(int(side) for side in reversed(tensor.shape))
    kind = tensor.tensor_type
    where = f"{file}: tensor {tensor.name!r}"
    plain = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
    if kind not in (*gguf.quants._type_traits, *plain):
        raise FormatError(f"{where} is {kind.name}, which gguf does not dequantize")
    raw = tuple(int(side) for side in gguf.quant_shape_to_byte_shape(shape, kind))
    if not is_text(tensor.name) or math.prod(raw) != int(tensor.n_bytes) or 0 in raw:
        raise CorruptionError(f"{where}: {tensor.n_bytes} bytes, {kind.name} {list(shape)} differs")
    info = TensorInfo(
        tensor.name, "U8", raw, file, int(tensor.data_offset), int(tensor.n_bytes)
    )  # fmt: skip
    return Block(info, kind, shape, gguf)


def _unknown(header: Header, model: Model, name: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{header.tensors[name][0]}: tensor {name!r}: has no name in a {model.name} of transformers"
    )


def _refuse_unknown(header: Header, model: Model, named: _Names) -> None:
    """Raises UnsupportedArchitectureError for a tensor that no model of the architecture has."""
    for name in header.tensors:
        stem = name.removesuffix(".weight").removesuffix(".bias")
        match = _LAYER.fullmatch(stem)
        part = match["part"] if match else stem
        if part not in named.parts and not part.startswith("nextn.") and stem not in _NO_WEIGHTS:
            raise _unknown(header, model, name)


def left_out(header: Header, config: Config) -> Iterator[str]:
    """Tensors of the layers that predict several tokens, which come after the model's."""
    extra = int(header.get("nextn_predict_layers", 0))
    layers = int(config["num_hidden_layers"])
    for name in header.tensors:
        match = _LAYER.match(name)
        if match and layers <= int(match["layer"]) < layers + extra:
            yield name
