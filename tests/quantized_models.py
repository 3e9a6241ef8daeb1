"""Quantized checkpoints, made from ordinary ones by the libraries that make them everywhere.

    folder = quantized(plain_folder, tmp_path / "fp8", "fp8")

What each library says that the weights are, stands beside: `truth` is the state dict that its own
dequantization gives, by the names of the plain checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import model_class, tiny_config

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A quantized checkpoint. truth: all weights, dequantized by the library that made them."""

    folder: Path
    truth: Tensors


def plain_model(family: str, folder: Path, hidden: int = 64, inner: int = 32) -> Path:
    """Wide enough for groups of 32 and tiles of 8 x 16."""
    config = tiny_config(family)
    for side, size in {
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "intermediate_size": 64,
    }.items():
        setattr(config, side, size)
    torch.manual_seed(0)
    model = model_class(config)._from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def quantized(plain: Path, folder: Path, kind: str) -> Made:
    """kind: a key of KINDS. Skips the test if the library is not installed."""
    settings, quantize = KINDS[kind]
    shutil.copytree(plain, folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    weights = load_file(folder / "model.safetensors")
    stored, truth = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in weights.items():
        chosen = weight.dim() > 1 and ("proj" in name or "experts" in name)
        parts, exact = quantize(name, weight) if chosen else ({name: weight}, weight)
        stored |= parts
        truth[name] = exact
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return Made(folder, truth)


def _fp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(8, 16))

    quantize: Any = Fp8Quantize(Quantizer())  # type: ignore[no-untyped-call]
    dequantize: Any = Fp8Dequantize(Quantizer())  # type: ignore[no-untyped-call]
    parts = quantize.convert({name: weight})
    scales = parts[f"{name.removesuffix('.weight')}.weight_scale_inv"]
    exact = dequantize._dequantize_one(parts[name], scales, torch.bfloat16)
    return parts, exact


def _mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Any bytes are MXFP4, so these are drawn: transformers quantizes on GPUs only."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}, weight
    experts, inputs, out = weight.shape
    generator = torch.Generator().manual_seed(inputs)
    shape = (experts, out, inputs // 32, 16)
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 124, shape[:-1], generator=generator, dtype=torch.uint8)
    exact = convert_moe_packed_tensors(blocks, scales)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, exact


def _compressed(**arguments: Any) -> Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """By the library compressed-tensors, with this scheme for weights."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        form = arguments["format"]
        args = QuantizationArgs(**{k: v for k, v in arguments.items() if k != "format"})
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        low, high, whole = _ranges(weight, args)
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        module = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if whole is not None:
            module["weight_global_scale"] = whole
        if args.symmetric:
            del module["weight_zero_point"]
        compressor = BaseCompressor.get_value_from_registry(form)
        parts = compressor.compress(module, scheme)
        exact = compressor.decompress(parts, scheme)["weight"]
        stem = name.removesuffix("weight")
        return {stem + part: tensor for part, tensor in parts.items()}, exact.to(torch.bfloat16)

    return quantize


def _ranges(weight: torch.Tensor, args: Any) -> tuple[Any, Any, torch.Tensor | None]:
    """Least and greatest of what shares a scale, and the scale of all, of NVFP4."""
    rows, cols = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1), None
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), None
    if args.strategy == "block":
        down, across = args.block_structure
        blocks = weight.reshape(rows // down, down, cols // across, across)
        return blocks.amin((1, 3)), blocks.amax((1, 3)), None
    groups = weight.reshape(rows, cols // args.group_size, args.group_size)
    whole = None
    if args.strategy == "tensor_group":
        whole = (448.0 * 6.0 / weight.abs().max().float()).reshape(1)
    return groups.amin(2), groups.amax(2), whole


def _words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] -> [rows, n · bits / 32] words: number behind number, from the lowest bit on."""
    rows, count = numbers.shape
    found = torch.zeros(rows, count * bits // 32, dtype=torch.int64)
    for i in range(count):
        at, shift = divmod(i * bits, 32)
        found[:, at] |= (numbers[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            found[:, at + 1] |= numbers[:, i] >> (32 - shift)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)


def _gptq(
    bits: int, *, act_order: bool = False, v2: bool = False
) -> Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """AutoGPTQ's packing, spelled out: w = scale · (q - zero), in float16."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = weight.shape
        if out % 32 or inputs % 32:
            return {name: weight}, weight
        generator = torch.Generator().manual_seed(bits)
        groups = torch.arange(inputs) // GROUP
        if act_order:
            groups = groups[torch.randperm(inputs, generator=generator)]
        zeros = torch.randint(1, 1 << bits, (inputs // GROUP, out), generator=generator)
        q = torch.randint(0, 1 << bits, (inputs, out), generator=generator)
        scales = (torch.rand(inputs // GROUP, out, generator=generator) * 0.02).half()
        exact = (scales[groups] * (q - zeros[groups])).T.contiguous()
        stem = name.removesuffix("weight")
        parts = {
            f"{stem}qweight": _words(q.T, bits).T,
            f"{stem}qzeros": _words(zeros - int(not v2), bits),
            f"{stem}scales": scales,
            f"{stem}g_idx": groups.to(torch.int32),
        }
        return parts, exact

    return quantize


def _awq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's packing for GEMM, spelled out: the columns of a word stand as 0, 2, 4, 6, 1, ..."""
    out, inputs = weight.shape
    generator = torch.Generator().manual_seed(4)
    zeros = torch.randint(0, 16, (inputs // GROUP, out), generator=generator)
    q = torch.randint(0, 16, (inputs, out), generator=generator)
    scales = (torch.rand(inputs // GROUP, out, generator=generator) * 0.02).half()
    exact = (scales.repeat_interleave(GROUP, 0) * (q - zeros.repeat_interleave(GROUP, 0))).T
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        return _words(numbers.reshape(len(numbers), -1, 8)[:, :, order].flatten(1), 4)

    stem = name.removesuffix("weight")
    parts = {f"{stem}qweight": pack(q), f"{stem}qzeros": pack(zeros), f"{stem}scales": scales}
    return parts, exact.contiguous()


GROUP = 16
_CT = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
_BLOCK = {"config_groups": {"group_0": {"weights": {"block_structure": [8, 16]}}}}

KINDS: dict[str, tuple[dict[str, Any], Callable[[str, Any], tuple[Tensors, torch.Tensor]]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [8, 16]}, _fp8),
    "mxfp4": ({"quant_method": "mxfp4"}, _mxfp4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, _gptq(4)),
    "gptq-3-bits": ({"quant_method": "gptq", "bits": 3, "group_size": GROUP}, _gptq(3)),
    "gptq-act-order": (
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True},
        _gptq(8, act_order=True),
    ),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        _gptq(2, v2=True),
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP,
         "packing_format": "auto_round:auto_gptq"},
        _gptq(4),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, _awq),
    "ct-fp8-tensor": (_CT, _compressed(num_bits=8, type="float", strategy="tensor",
                                       format="float-quantized")),
    "ct-fp8-channel": (_CT, _compressed(num_bits=8, type="float", strategy="channel",
                                        format="float-quantized")),
    "ct-fp8-block": (_CT | _BLOCK, _compressed(num_bits=8, type="float", strategy="block",
                                               block_structure=[8, 16], format="float-quantized")),
    "ct-int8": (_CT, _compressed(num_bits=8, strategy="channel", symmetric=False,
                                 format="int-quantized")),
    "ct-int4": (_CT, _compressed(num_bits=4, strategy="group", group_size=8,
                                 format="pack-quantized")),
    "ct-int4-asymmetric": (_CT, _compressed(num_bits=4, strategy="group", group_size=8,
                                            symmetric=False, format="pack-quantized")),
    "ct-int3-channel": (_CT, _compressed(num_bits=3, strategy="channel", format="pack-quantized")),
    "ct-nvfp4": (_CT, _compressed(num_bits=4, type="float", strategy="tensor_group", group_size=16,
                                  format="nvfp4-pack-quantized")),
}  # fmt: skip
"""By kind: the quantization_config, and what makes a weight's parts and its truth."""
