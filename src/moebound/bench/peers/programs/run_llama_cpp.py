"""K- and I-quants of llama.cpp, with an importance matrix, by its own quantizer.

setting: {"type": "q4_k_m", ...}: a file type of llama.cpp's `llama-quantize`, its mixtures of types
by layer and projection included.

The experts alone go into a GGUF file, float32, one tensor [E, out, in] a projection and layer as
llama.cpp has them; `llama_model_quantize` writes another; gguf's own dequantizers read that. Rows
must be a whole number of blocks (256 weights), or llama.cpp falls back to another type for them;
this is refused. The importance matrix is what `llama-imatrix` sums up, the mean square of each
input channel over the tokens that an expert gets, but weighted by the square of the gate's weight,
as everything here is. An expert that gets no token has ones, as llama.cpp gives it.

Bytes are those of the tensors; types and shapes are in the file's header, as anyone's are.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_quantize import quantize
from peer_exchange import Request, main, read_weights, write_checkpoint

BLOCK = 256


def run(request: Request, answer: Path) -> dict[str, Any]:
    kind = str(request.setting["type"])
    stacks = _stacks(request)
    source, made = answer / "experts.gguf", answer / f"experts-{kind}.gguf"
    _write(source, request, stacks)
    quantize(source, made, kind, _importance(request, stacks))
    source.unlink()

    weights, parts = {}, dict[str, int]()
    for tensor in gguf.GGUFReader(made).tensors:
        if tensor.name not in stacks:
            continue
        parts[tensor.tensor_type.name] = parts.get(tensor.tensor_type.name, 0) + tensor.n_bytes
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for name, matrix in zip(stacks[tensor.name], values, strict=True):
            weights[name] = matrix
    write_checkpoint(request, answer / "checkpoint", weights)
    return {
        "library": "llama.cpp (llama-cpp-python)",
        "library_version": version("llama-cpp-python"),
        "settings": {"type": kind, "importance_matrix": True, "gguf": version("gguf")},
        "parts": parts,
        "remarks": ["the importance matrix is weighted by the square of the gate's weight"],
    }


def _stacks(request: Request) -> dict[str, list[str]]:
    """By name in GGUF, the tensors of a projection of a layer, one an expert."""
    found: dict[str, list[str]] = {}
    for (layer, _, role), name in sorted(request.experts.items()):
        found.setdefault(f"blk.{layer}.ffn_{role}_exps.weight", []).append(name)
    return found


def _write(file: Path, request: Request, stacks: dict[str, list[str]]) -> None:
    """All in memory at once: the experts in float32."""
    values = dict(read_weights(request, set(request.experts.values())))
    writer = gguf.GGUFWriter(file, "llama")
    first = next(iter(stacks.values()))
    writer.add_block_count(1 + max(layer for layer, _, _ in request.experts))
    writer.add_expert_count(len(first))
    writer.add_expert_used_count(min(2, len(first)))
    # Of a model that is never run: what llama.cpp asks for when it opens a file.
    width = values[first[0]].shape[1]
    writer.add_context_length(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(values[first[0]].shape[0])
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(1)
    writer.add_tokenizer_model("none")
    for name, members in stacks.items():
        if values[members[0]].shape[1] % BLOCK:
            raise SystemExit(
                f"{members[0]}: rows of {values[members[0]].shape[1]} weights are no whole number "
                f"of blocks of {BLOCK}, which K- and I-quants ask for"
            )
        writer.add_tensor(name, np.stack([values.pop(member) for member in members]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _importance(request: Request, stacks: dict[str, list[str]]) -> dict[str, Any]:
    """By name in GGUF, [E x in] float32."""
    known = request.importance()
    return {
        name: np.concatenate([known[member] for member in members]).astype(np.float32)
        for name, members in stacks.items()
    }


if __name__ == "__main__":
    main(run)
