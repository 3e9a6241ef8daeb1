"""AutoRound (SignRound, 2309.05516) by auto-round, on a CPU or a GPU.

setting: {"bits", "group", "symmetric", "iters"}.

Defaults of the library otherwise: iters steps a block, 8 sequences a step, rounding and ranges
tuned. It takes experts that transformers fused as they are and computes them one by one while it
tunes ("linear_loop"). A step reads 8 sequences at once, so all are padded to the longest at their
right; padding is masked, and left out of the loss, as the library does with the pad token. Experts
that get no token of a step have no gradient in it; one that never gets any is rounded to nearest.
Attention and routers are left as they are.

What is stored is what it writes (format auto_round), read again and dequantized by its own
QuantLinear.
"""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from peer_exchange import Request, count_bytes, main, packed_experts, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(request: Request, answer: Path) -> dict[str, Any]:
    setting = request.setting
    model = AutoModelForCausalLM.from_pretrained(request.checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint)
    length = max(map(len, request.rows))
    asked = {
        "bits": setting["bits"], "group_size": setting["group"], "sym": setting["symmetric"],
        "iters": setting["iters"], "nsamples": len(request.rows), "seqlen": length,
    }  # fmt: skip
    kept = {
        name: {"bits": 16}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "experts" not in name and name != "lm_head"
    }
    quantizer = AutoRound(
        model, tokenizer, dataset=_padded(request.rows, length, tokenizer.pad_token_id),
        layer_config=kept, batch_size=8, seed=42, enable_torch_compile=False,
        device_map=0 if torch.cuda.is_available() else "cpu", **asked,
    )  # fmt: skip
    _, folder = quantizer.quantize_and_save(str(answer / "packed"), format="auto_round")
    folder = Path(folder if isinstance(folder, str) else folder[0])

    wrote = json.loads((folder / "config.json").read_text())["quantization_config"]
    # Packed as AutoGPTQ does, zero points are stored less one.
    kind = "qlinear_torch_zp" if "gptq" in wrote["packing_format"] else "qlinear_torch"
    layer = importlib.import_module(f"auto_round_extension.torch.{kind}").QuantLinear
    made, parts = {}, dict[str, int]()
    for name, _, tensors in packed_experts(request, folder):
        count_bytes(parts, tensors)
        made[name] = _unpacked(layer, tensors, setting)
    write_checkpoint(request, answer / "checkpoint", made)
    return {
        "library": "auto-round",
        "library_version": version("auto-round"),
        "settings": asked | {"batch_size": 8, "packing_format": wrote["packing_format"]},
        "parts": parts,
        "remarks": [
            f"sequences are padded to {length} tokens, and padding is left out of the loss",
            "experts that no token of a step is sent to are not tuned in it",
        ],
    }


def _padded(rows: list[list[int]], length: int, pad: int) -> list[dict[str, Any]]:
    """One sequence each, as the library's calibration takes them."""
    found = []
    for row in rows:
        behind = length - len(row)
        mask = torch.tensor([[1] * len(row) + [0] * behind])
        found.append({"input_ids": torch.tensor([row + [pad] * behind]), "attention_mask": mask})
    return found


def _unpacked(layer: Any, tensors: dict[str, Any], setting: dict[str, Any]) -> Any:
    """[rows, cols] float32: what a layer makes of the unit vectors."""
    rows = tensors["scales"].shape[1]
    cols = tensors["qweight"].shape[0] * 32 // setting["bits"]
    packed = layer(setting["bits"], setting["group"], cols, rows, False)
    for kind, tensor in tensors.items():
        # Scales in float32, so that the product is rounded once, to the checkpoint's dtype.
        setattr(packed, kind, tensor.float() if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        return packed(torch.eye(cols)).T.contiguous().numpy()


if __name__ == "__main__":
    main(run)
