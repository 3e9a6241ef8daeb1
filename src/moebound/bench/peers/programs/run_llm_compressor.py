"""GPTQ (2210.17323) and AWQ (2306.00978) by llm-compressor, on a CPU.

setting: {"method": "gptq" | "awq", "bits", "group", "symmetric", "routed"}.

The model is loaded as llm-compressor's guide for Mixture-of-Experts asks, with
`load_quantizable_moe`: transformers fuses experts into one tensor a layer, and it takes them apart
into Linear modules again. Unless `routed`, `moe_calibrate_all_experts` is left at its default:
every token of the text is shown to every expert, so none is without. Sequences of one length are
read together, without padding. Only experts are quantized.

What is stored is what it writes (format pack-quantized): the file is read again, bytes are those of
the tensors of the experts in it, and weights are what its own decompressor makes of them.

AWQ divides the norm in front of the experts by a scale s for each channel and multiplies the
columns of gate, up and router by it. Here router and norm stay as they are: s is taken out of gate
and up after they are dequantized, as W_ij / s_j, which is the same function. Bytes are the same,
since s is stored in the norm there. Between up and down it scales as well, inside of the expert.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_exchange import (
    Request,
    by_length,
    count_bytes,
    main,
    packed_experts,
    write_checkpoint,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

EXPERTS = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"
NORM = "post_attention_layernorm"


def run(request: Request, answer: Path) -> dict[str, Any]:
    setting = request.setting
    weights = {
        "num_bits": setting["bits"], "type": "int", "symmetric": setting["symmetric"],
        "strategy": "group", "group_size": setting["group"],
    }  # fmt: skip
    groups = {"experts": {"targets": [EXPERTS], "weights": weights}}
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(request.checkpoint, dtype="auto")
    before = _norms(model)
    recipe: list[Any]
    if setting["method"] == "gptq":
        recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    else:
        # The cache pins memory for a GPU without asking whether there is one (0.14.0.1).
        if not torch.cuda.is_available():
            IntermediatesCache.pin_memory = lambda *args, **kwargs: None
        recipe = [
            AWQModifier(mappings=_mappings(model), offload_device=None),
            QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
        ]
    batches: Any = [{"input_ids": torch.tensor(rows)} for rows in by_length(request.rows)]
    data: Any = DataLoader(batches, batch_size=None)
    oneshot(model=model, dataset=data, recipe=recipe,
            moe_calibrate_all_experts=not setting["routed"])  # fmt: skip
    after = _norms(model)
    schemes = {
        request.name_of(name): (type(module), module.quantization_scheme)
        for name, module in model.named_modules()
        if request.name_of(name) and hasattr(module, "quantization_scheme")
    }
    model.save_pretrained(answer / "packed", save_compressed=True)

    scheme = next(iter(schemes.values()))[1]
    layers = {name: (layer, role) for (layer, _, role), name in request.experts.items()}
    made, parts = {}, dict[str, int]()
    for name, _, tensors in packed_experts(request, answer / "packed"):
        count_bytes(parts, tensors)
        values = _unpacked(tensors, scheme)
        layer, role = layers[name]
        if role != "down" and setting["method"] == "awq":
            values = values * (after[layer] / before[layer])
        made[name] = values.numpy()
    write_checkpoint(request, answer / "checkpoint", made)
    tokens = sum(map(len, request.rows))
    told = "the tokens that it is sent" if setting["routed"] else "all tokens"
    return {
        "library": "llmcompressor",
        "library_version": version("llmcompressor"),
        "settings": {
            "method": setting["method"], "weights": weights, "n_sequences": len(request.rows),
            "n_tokens": tokens, "moe_calibrate_all_experts": not setting["routed"],
        },
        "parts": parts,
        "remarks": [
            f"every expert is calibrated on {told}",
            *(["scales of AWQ for norm and router are folded back into gate and up"]
              if setting["method"] == "awq" else []),
        ],
    }  # fmt: skip


def _unpacked(tensors: dict[str, Any], scheme: Any) -> Any:
    """[rows, cols] float32, by the library's own decompressor."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    # Scales in float32, so that the product is rounded once, to the checkpoint's dtype.
    exact = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    return PackedQuantizationCompressor.decompress(exact, scheme)["weight"].float()


def _mappings(model: Any) -> list[Any]:
    """As the library's own for other models with experts (`_moe_default_mappings`), without those
    of attention, which stays as it is."""
    router = next(
        name.rpartition(".layers.0.")[2]
        for name, module in model.named_modules()
        if ".layers.0." in name and name.endswith((".gate", ".router")) and "expert" not in name
    )
    return [
        AWQMapping(
            rf"re:.*{NORM}$",
            [rf"re:.*{router}$", r"re:.*experts\.\d+\.gate_proj$", r"re:.*experts\.\d+\.up_proj$"],
        ),
        AWQMapping(r"re:.*experts\.\d+\.up_proj$", [r"re:.*experts\.\d+\.down_proj$"]),
    ]


def _norms(model: Any) -> dict[int, Any]:
    """By layer, the weight of the norm in front of its experts."""
    return {
        index: getattr(layer, NORM).weight.detach().float().clone()
        for index, layer in enumerate(model.model.layers)
    }


if __name__ == "__main__":
    main(run)
