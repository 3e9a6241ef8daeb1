"""Quantized checkpoints: which tensors make up a weight, and weights as if they were stored.

FP8 with block scales (DeepSeek-V3, Kimi, Qwen3-FP8, GLM), MXFP4 (GPT-OSS), compressed-tensors (FP8,
INT8, packed integers, NVFP4, MXFP4), GPTQ and AWQ. Flagship models are published so.

    tensors, form = dequantized(folder, config, stored)

`tensors` has each weight under its usual name, as BF16 (F16 where its scales are). `read_into`,
under which all reading is, computes the rows that are asked for (`dequantize.py`), in bounded
memory. Everything after this reads an ordinary checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moebound.checkpoint.dequantize import (
    awq,
    by_blocks,
    fp4,
    gptq,
    power_of_two,
    rounded,
    unpack_words,
)
from moebound.checkpoint.shards import TensorInfo, read_raw, tensor_bytes
from moebound.errors import CheckpointError
from moebound.types import NUMPY_DTYPES, Array, DType

Tensors = Mapping[str, TensorInfo]
Read = Callable[[TensorInfo], Array]
Compute = Callable[[Read, int, int], Array]
"""(how a part is read, first row, last row) -> [rows, ...] float32."""

_FP8 = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("F8_E8M0", "U8")
"""Scales that are powers of two, by their exponents."""
_SCALES = ("F32", "BF16", "F16")

_OF_ACTIVATIONS = (
    ".input_scale", ".activation_scale", ".input_zero_point", ".input_global_scale",
    ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip


def dequantized(
    path: Path, quantization: Mapping[str, Any], stored: Tensors
) -> tuple[dict[str, TensorInfo], str] | None:
    """The tensors by the names that they have unquantized, and what they are stored as, in words;
    None for a format that is not known here, or where nothing is quantized.

    quantization: the `quantization_config` of config.json. Tensors that are no part of a quantized
    weight stay what they are. Scales of activations are left out: they are no weights.
    Raises CheckpointError for a weight that lacks a part, or has one of another shape or dtype.
    """
    method = quantization.get("quant_method")
    if method == "auto-round":  # which packs like others
        awq_like = "awq" in str(quantization.get("packing_format"))
        method = "awq" if awq_like else "gptq"
    known = _METHODS.get(method) if isinstance(method, str) else None
    if known is None:
        return None
    form = known(path, quantization, stored)
    found = {tensor.parts[0].name: tensor for tensor in form.weights()}
    if not found:
        return None
    taken = {part.name for tensor in found.values() for part in tensor.parts}
    tensors = dict[str, TensorInfo]()
    for name, tensor in stored.items():
        if name in found:  # where its largest part is
            tensors[found[name].name] = found[name]
        elif name not in taken and not name.endswith(_OF_ACTIVATIONS):
            tensors[name] = tensor
    return tensors, form.words()


@dataclass(frozen=True, eq=False)
class Weight:
    """How a weight is computed: `Stored` of shards.py."""

    parts: tuple[TensorInfo, ...]
    dtype: DType
    compute: Compute

    def rows(self, first: int, last: int, *, drop_cache: bool = False) -> Array:
        values = self.compute(partial(read_raw, drop_cache=drop_cache), first, last)
        return rounded(values, NUMPY_DTYPES[self.dtype])


@dataclass(frozen=True, eq=False)
class _Form(ABC):
    """A quantization method's way to store weights."""

    path: Path
    quantization: Mapping[str, Any]
    stored: Tensors

    @abstractmethod
    def weights(self) -> Iterator[TensorInfo]:
        """Each weight, computed from its parts. Raises CheckpointError."""

    @abstractmethod
    def words(self) -> str:
        """What weights are stored as."""

    def part(self, name: str, *dtypes: str, of: str) -> TensorInfo:
        """Raises CheckpointError if it is missing or of another dtype."""
        found = self.stored.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.path}: quantized tensor {of!r} has no {name!r}; expected it beside"
            )
        if dtypes and found.dtype not in dtypes:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} is {found.dtype}, expected {' or '.join(dtypes)}"
            )
        return found

    def number(self, *fields: str, default: int | None = None) -> int:
        """A number of the quantization_config above 0, or -1 for all, under one of these names."""
        for field in fields:
            value = self.quantization.get(field, default)
            if type(value) is int and (value > 0 or value == -1):
                return value
            if value is not None:
                raise CheckpointError(
                    f"{self.path}: quantization_config: {field}: expected a number, found {value!r}"
                )
        raise CheckpointError(f"{self.path}: quantization_config: expected {' or '.join(fields)}")


def _weight(
    name: str, shape: tuple[int, ...], parts: tuple[TensorInfo, ...], compute: Compute
) -> TensorInfo:
    """parts: the quantized numbers first, then their scales, whose dtype says what the weight is
    rounded to."""
    dtype: DType = "F16" if parts[1].dtype == "F16" else "BF16"
    main = parts[0]
    return TensorInfo(
        name, dtype, shape, main.file, main.offset, tensor_bytes(dtype, shape),
        Weight(parts, dtype, compute),
    )  # fmt: skip


def _expect(tensor: TensorInfo, *shape: int) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected "
            f"{list(shape)}"
        )


def _rows(tensor: TensorInfo, first: int, last: int) -> TensorInfo:
    """Rows of a tensor's leading axis, as a tensor."""
    row = tensor.n_bytes // tensor.shape[0]
    return replace(
        tensor,
        shape=(last - first, *tensor.shape[1:]),
        offset=tensor.offset + first * row,
        n_bytes=(last - first) * row,
    )


def _scales(read: Read, tensor: TensorInfo) -> Array:
    values = read(tensor)
    if tensor.dtype in _EXPONENTS:
        return power_of_two(values.view(np.uint8))
    return values.astype(np.float32)


def _block_of(
    sides: tuple[int, ...], tensor: TensorInfo, scales: TensorInfo, named: Any
) -> tuple[int, int]:
    """Rows and columns of a block, of which `scales` has one value each.

    sides: of the weight, which `tensor` holds. named: what the config says, taken where it is so.
    Raises CheckpointError for scales of another shape.
    """
    grid = scales.shape
    if len(grid) == len(sides) and grid[:-2] == sides[:-2]:
        pairs = list(zip(sides[-2:], grid[-2:], strict=True))
        is_block = isinstance(named, list) and [type(side) for side in named] == [int, int]
        if is_block and all(
            b > 0 and -(-s // b) == g for (s, g), b in zip(pairs, named, strict=True)
        ):
            return named[0], named[1]
        if all(g and not s % g for s, g in pairs):
            return sides[-2] // grid[-2], sides[-1] // grid[-1]
    raise CheckpointError(
        f"{scales.file}: tensor {scales.name!r} has shape {list(grid)}, expected one scale for "
        f"each block of {tensor.name!r}, {list(sides)}"
        + (f", in blocks of {named}" if named else "")
    )


class _Fp8(_Form):
    """`W` in FP8 and `W_scale_inv`, which multiplies it, one for each block (DeepSeek-V3's report,
    2412.19437, section 3.3). Experts in one tensor have a leading axis in both."""

    def words(self) -> str:
        return "FP8"

    def weights(self) -> Iterator[TensorInfo]:
        named = self.quantization.get("weight_block_size")
        for name, tensor in self.stored.items():
            if tensor.dtype in _FP8 and len(tensor.shape) in (2, 3):
                scales = self.part(f"{name}_scale_inv", *_SCALES, *_EXPONENTS, of=name)
                block = _block_of(tensor.shape, tensor, scales, named)
                compute = partial(_fp8, tensor, scales, block)
                yield _weight(name, tensor.shape, (tensor, scales), compute)


def _fp8(
    tensor: TensorInfo, scales: TensorInfo, block: tuple[int, int],
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    values = read(_rows(tensor, first, last))
    if values.ndim == 2:
        return by_blocks(values, _scales(read, scales), block, first)
    own = _scales(read, _rows(scales, first, last))
    return np.stack([by_blocks(*one, block) for one in zip(values, own, strict=True)])


class _Mxfp4(_Form):
    """GPT-OSS: `W_blocks` [E, out, in / 32, 16] of two FP4 a byte, `W_scales` [E, out, in / 32].
    W is [E, in, out], as transformers has it."""

    def words(self) -> str:
        return "MXFP4"

    def weights(self) -> Iterator[TensorInfo]:
        for name, blocks in self.stored.items():
            if name.endswith("_blocks") and len(blocks.shape) == 4:
                stem = name.removesuffix("_blocks")
                self.part(name, "U8", of=name)
                scales = self.part(f"{stem}_scales", *_EXPONENTS, of=name)
                _expect(scales, *blocks.shape[:-1])
                experts, out, groups, width = blocks.shape
                shape = (experts, groups * width * 2, out)
                yield _weight(stem, shape, (blocks, scales), partial(_mxfp4, blocks, scales))


def _mxfp4(blocks: TensorInfo, scales: TensorInfo, read: Read, first: int, last: int) -> Array:
    weights = fp4(read(_rows(blocks, first, last)))
    weights *= _scales(read, _rows(scales, first, last))[..., None]
    return weights.reshape(*weights.shape[:2], -1).swapaxes(1, 2)


class _Gptq(_Form):
    """`W.qweight`, `W.qzeros`, `W.scales` and, with act-order, `W.g_idx` (2210.17323; the packing
    is AutoGPTQ's, which GPTQModel kept)."""

    def words(self) -> str:
        return "GPTQ"

    def weights(self) -> Iterator[TensorInfo]:
        group = self.number("group_size", default=-1)
        for name, words in self.stored.items():
            if not name.endswith(".qweight") or len(words.shape) != 2:
                continue
            stem, out = name.removesuffix("qweight"), words.shape[1]
            scales = self.part(f"{stem}scales", *_SCALES, of=name)
            zeros = self.part(f"{stem}qzeros", "I32", of=name)
            fits = (b for b in (2, 3, 4, 8) if zeros.shape[1:] == (-(-out * b // 32),))
            bits = next(fits, 0)
            if not bits:
                raise CheckpointError(
                    f"{zeros.file}: tensor {zeros.name!r} has shape {list(zeros.shape)}, expected "
                    f"{out} zero points of 2, 3, 4 or 8 bits in each row"
                )
            inputs = words.shape[0] * 32 // bits
            size = inputs if group == -1 else group
            _expect(scales, -(-inputs // size), out)
            _expect(zeros, -(-inputs // size), zeros.shape[1])
            parts: tuple[TensorInfo, ...] = (self.part(name, "I32", of=name), scales, zeros)
            if f"{stem}g_idx" in self.stored:
                parts = (*parts, self.part(f"{stem}g_idx", "I32", "I64", of=name))
                _expect(parts[3], inputs)
            compute = partial(_gptq, parts, bits, size, self._minus_one())
            yield _weight(f"{stem}weight", (out, inputs), parts, compute)

    def _minus_one(self) -> bool:
        """Whether zero points are stored less 1."""
        packed = self.quantization.get("packing_format")  # of auto-round
        if isinstance(packed, str):
            return "gptq" in packed
        return bool(self.quantization.get("checkpoint_format", "gptq") == "gptq")


def _gptq(
    parts: tuple[TensorInfo, ...], bits: int, size: int, minus_one: bool,
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    words, scales, zeros = (read(part) for part in parts[:3])
    groups = np.arange(words.shape[0] * 32 // bits) // size
    if len(parts) == 4:
        order = read(parts[3])
        # Where nothing was reordered, some writers leave it empty.
        groups = _groups(order, len(scales), parts[3]) if order.any() else groups
    return gptq(words, zeros, scales, groups, bits, minus_one=minus_one)[first:last]


def _groups(order: Array, count: int, tensor: TensorInfo) -> Array:
    """Raises CheckpointError for a group that is not there."""
    if order.min(initial=0) < 0 or order.max(initial=0) >= count:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has groups {order.min()} to {order.max()}, "
            f"expected 0 to {count - 1}"
        )
    return order.astype(np.int64)


class _Awq(_Form):
    """`W.qweight`, `W.qzeros` and `W.scales`, packed for GEMM (2306.00978; AutoAWQ's packing)."""

    def words(self) -> str:
        return "AWQ, 4 bits"

    def weights(self) -> Iterator[TensorInfo]:
        version = str(self.quantization.get("version", "gemm")).lower()
        bits, group = self.number("bits", "w_bit"), self.number("group_size", "q_group_size")
        if bits != 4 or version != "gemm":
            raise CheckpointError(
                f"{self.path}: AWQ of {bits} bits packed for {version!r}; expected 4 and 'gemm'"
            )
        for name, words in self.stored.items():
            if not name.endswith(".qweight") or len(words.shape) != 2:
                continue
            stem = name.removesuffix("qweight")
            inputs, out = words.shape[0], words.shape[1] * 8
            size = inputs if group == -1 else group
            scales = self.part(f"{stem}scales", *_SCALES, of=name)
            zeros = self.part(f"{stem}qzeros", "I32", of=name)
            _expect(scales, -(-inputs // size), out)
            _expect(zeros, -(-inputs // size), out // 8)
            parts = (self.part(name, "I32", of=name), scales, zeros)
            yield _weight(f"{stem}weight", (out, inputs), parts, partial(_awq, parts, size))


def _awq(parts: tuple[TensorInfo, ...], size: int, read: Read, first: int, last: int) -> Array:
    words, scales, zeros = (read(part) for part in parts)
    return awq(words, zeros, scales, size)[first:last]


class _CompressedTensors(_Form):
    """The formats of the library compressed-tensors, as llm-compressor writes them; what a tensor
    is follows from its name and companions.

    `W` (FP8, INT8) with `W_scale` by tensor, channel, group or block; `W_packed` in words of 32
    bits, with `W_shape`; or in bytes of two FP4, with `W_scale` and, of NVFP4, `W_global_scale`,
    which divides it.
    """

    def words(self) -> str:
        return f"compressed-tensors, {self.quantization.get('format') or 'mixed formats'}"

    def weights(self) -> Iterator[TensorInfo]:
        if self.quantization.get("sparsity_config"):
            raise CheckpointError(
                f"{self.path}: compressed-tensors with a sparsity_config; expected dense weights"
            )
        for name, tensor in self.stored.items():
            if len(tensor.shape) != 2:
                continue
            if name.endswith(".weight_packed"):
                packed = self._fp4 if tensor.dtype == "U8" else self._integers
                yield packed(name.removesuffix("_packed"), tensor)
            elif tensor.dtype in (*_FP8, "I8") and f"{name}_scale" in self.stored:
                yield self._plain(name, tensor)

    def _scaled(
        self, name: str, tensor: TensorInfo, sides: tuple[int, int]
    ) -> tuple[TensorInfo, tuple[int, int], tuple[int, int]]:
        """The scales, how many there are down and across, and the sides of what each is for."""
        scales = self.part(f"{name}_scale", *_SCALES, "F8_E4M3", *_EXPONENTS, of=tensor.name)
        if math.prod(scales.shape) == 1:
            return scales, (1, 1), sides
        block = _block_of(sides, tensor, scales, self._block_structure())
        return scales, (scales.shape[0], scales.shape[1]), block

    def _block_structure(self) -> Any:
        groups = self.quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping) and weights.get("block_structure"):
                return weights["block_structure"]
        return None

    def _plain(self, name: str, tensor: TensorInfo) -> TensorInfo:
        scales, grid, block = self._scaled(name, tensor, (tensor.shape[0], tensor.shape[1]))
        parts: tuple[TensorInfo, ...] = (tensor, scales)
        if f"{name}_zero_point" in self.stored:
            parts = (*parts, self.part(f"{name}_zero_point", "I8", "I32", "I64", of=name))
            _expect(parts[2], *scales.shape)
        return _weight(name, tensor.shape, parts, partial(_plain, parts, grid, block))

    def _integers(self, name: str, words: TensorInfo) -> TensorInfo:
        self.part(words.name, "I32", of=name)
        shape = self.part(f"{name}_shape", "I64", "I32", of=words.name)
        _expect(shape, 2)
        rows, cols = (int(side) for side in read_raw(shape))
        fits = (b for b in range(1, 9) if -(-cols * b // 32) == words.shape[1])
        bits = next(fits, 0) if cols > 0 and rows == words.shape[0] else 0
        if not bits:
            raise CheckpointError(
                f"{words.file}: tensor {words.name!r} has shape {list(words.shape)}, expected "
                f"words of 32 bits with {rows} x {cols} integers of 1 to 8 bits, as {shape.name!r} "
                "says"
            )
        scales, grid, block = self._scaled(name, words, (rows, cols))
        zeros, order = (self.stored.get(f"{name}_{part}") for part in ("zero_point", "g_idx"))
        if zeros is not None:
            _expect(zeros, -(-grid[0] * bits // 32), grid[1])
        if order is not None:
            _expect(order, cols)
        present = (part for part in (zeros, order) if part is not None)
        compute = partial(_integers, words, scales, zeros, order, bits, cols, grid, block)
        return _weight(name, (rows, cols), (words, scales, shape, *present), compute)

    def _fp4(self, name: str, packed: TensorInfo) -> TensorInfo:
        sides = packed.shape[0], 2 * packed.shape[1]
        scales, grid, block = self._scaled(name, packed, sides)
        parts: tuple[TensorInfo, ...] = (packed, scales)
        if f"{name}_global_scale" in self.stored:
            parts = (*parts, self.part(f"{name}_global_scale", "F32", of=packed.name))
        return _weight(name, sides, parts, partial(_fp4, parts, grid, block))


def _plain(
    parts: tuple[TensorInfo, ...], grid: tuple[int, int], block: tuple[int, int],
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    values = read(_rows(parts[0], first, last)).astype(np.float32)
    if len(parts) == 3:
        zeros = read(parts[2]).astype(np.float32).reshape(grid)
        values -= by_blocks(np.ones_like(values), zeros, block, first)
    return by_blocks(values, _scales(read, parts[1]).reshape(grid), block, first)


def _integers(
    words: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, order: TensorInfo | None,
    bits: int, cols: int, grid: tuple[int, int], block: tuple[int, int],
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    offset = 1 << (bits - 1)
    values = unpack_words(read(_rows(words, first, last)), bits, cols) - offset
    groups = np.arange(cols) // block[1]
    if order is not None and (found := read(order)).min(initial=0) >= 0:
        groups = _groups(found, grid[1], order)
    its = (np.arange(first, last)[:, None] // block[0], groups[None, :])
    if zeros is not None:
        values = values - (unpack_words(read(zeros).T, bits, grid[0]).T - offset)[its]
    product: Array = values.astype(np.float32) * _scales(read, scales).reshape(grid)[its]
    return product


def _fp4(
    parts: tuple[TensorInfo, ...], grid: tuple[int, int], block: tuple[int, int],
    read: Read, first: int, last: int,
) -> Array:  # fmt: skip
    scales = _scales(read, parts[1]).reshape(grid)
    if len(parts) == 3:
        scales = scales / read(parts[2]).reshape(-1)[0]
    return by_blocks(fp4(read(_rows(parts[0], first, last))), scales, block, first)


_METHODS: dict[str, type[_Form]] = {
    "fp8": _Fp8,
    "mxfp4": _Mxfp4,
    "compressed-tensors": _CompressedTensors,
    "gptq": _Gptq,
    "awq": _Awq,
}

KNOWN = (*_METHODS, "auto-round")
"""What `quant_method` may be."""
