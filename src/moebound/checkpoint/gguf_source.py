"""GGUF files, of llama.cpp, as sources: tensors under the names of Hugging Face, dequantized as
they are read, and a folder with the config and tokenizer that the file's metadata make.

Values are those of `gguf`'s own dequantizers, rounded once to bfloat16. The experts of a layer are
one tensor there, [experts, out, in]; here each is a tensor of its own, whose bytes alone are read.
Config and tokenizer are converted by transformers. Rows of queries and keys that llama.cpp permutes
for its rotary embeddings (architecture `llama`) are put back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moebound.checkpoint.leftovers import HEAD_BYTES, leftover
from moebound.checkpoint.quantized import Read, Weight
from moebound.checkpoint.shards import TensorInfo, is_text, tensor_bytes
from moebound.errors import (
    CheckpointError,
    CorruptionError,
    FormatError,
    UnsupportedArchitectureError,
)
from moebound.extras import need
from moebound.files.regular import regular_file
from moebound.types import Array

MAGIC = b"GGUF"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class _Arch:
    """block: where a layer's experts are. leaves: gate, up and down of one. permuted: whether rows
    of queries and keys are in llama.cpp's order."""

    model_type: str
    block: str = "mlp"
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    permuted: bool = False


_ARCHS = {
    "qwen2moe": _Arch("qwen2_moe"),
    "qwen3moe": _Arch("qwen3_moe"),
    "llama": _Arch("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), permuted=True),
}
"""By `general.architecture`. `llama` with experts is Mixtral."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "{block}.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_LAYER = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<part>\w+)\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class GgufSource:
    """folder: config.json and tokenizer. words: which file, quantization types, and hash."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    words: str


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the one in a folder that has no config.json, of a
    split set the first; else None. Raises CheckpointError for a folder with several."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = []
    for file in sorted(path.glob("*.gguf")):
        match = _SPLIT.fullmatch(file.name)
        if match is None or int(match["no"]) == 1:
            found.append(file)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(f"{path}: {len(found)} GGUF models ({names}); give the path of one")
    return found[0] if found else None


def open_gguf(file: Path) -> GgufSource:
    """Read headers, and make the folder of config and tokenizer, if it is not there yet.

    Raises BackendUnavailable without gguf, UnsupportedArchitectureError for an architecture that is
    not read, FormatError, CorruptionError or CheckpointError for a file that is not whole.
    """
    gguf = need("gguf", f"{file}: reading GGUF")
    files = split_set(file)
    readers = [_reader(gguf, part) for part in files]
    name = _value(readers[0], file, "general.architecture")
    arch = _ARCHS.get(name) if isinstance(name, str) else None
    if arch is None or (name == "llama" and not _value(readers[0], file, "llama.expert_count")):
        raise UnsupportedArchitectureError(
            f"{file}: GGUF architecture {name!r}"
            + (" without experts" if arch else "")
            + f" is not read; supported: {', '.join(_ARCHS)} (llama with experts, as Mixtral)"
        )
    _refuse_unread(file, readers[0], str(name))
    digest = hashlib.sha256()
    for part, reader in zip(files, readers, strict=True):
        with part.open("rb") as handle:
            digest.update(handle.read(int(reader.data_offset)))
    folder, config = _folder(file, readers[0], str(name), arch, digest.hexdigest(), gguf)
    tensors = dict[str, TensorInfo]()
    types = Counter[str]()
    for part, reader in zip(files, readers, strict=True):
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] += 1
            for info in _infos(part, tensor, arch, config, gguf):
                if info.name in tensors:
                    raise CorruptionError(f"{part}: tensor {tensor.name!r} is there twice")
                tensors[info.name] = info
    _check_whole(file, config, tensors)
    said = ", ".join(f"{kind} of {count} tensors" for kind, count in types.most_common())
    words = f"GGUF, {file.name} ({said}; SHA-256 of its header {digest.hexdigest()})"
    return GgufSource(folder, config, tensors, words)


def _refuse_unread(file: Path, reader: Any, name: str) -> None:
    """Raises UnsupportedArchitectureError for what the config would lack without a word."""
    scaling = _value(reader, file, f"{name}.rope.scaling.type")
    window = _value(reader, file, f"{name}.attention.sliding_window")
    factors = any(tensor.name.startswith("rope_f") for tensor in reader.tensors)
    unread = {
        f"rotary embeddings scaled as {scaling!r}": scaling not in (None, "none"),
        "rotary embeddings scaled by a tensor (rope_freqs, rope_factors)": factors,
        f"a sliding window of {window}": bool(window),
    }
    for what, found in unread.items():
        if found:
            raise UnsupportedArchitectureError(
                f"{file}: has {what}, which is not read from GGUF; compress the model's own "
                "checkpoint"
            )


def split_set(file: Path) -> list[Path]:
    """The files that this one is the first of. Raises CheckpointError where one is missing."""
    match = _SPLIT.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if int(match["no"]) != 1:
        raise CheckpointError(
            f"{file}: part {int(match['no'])} of {count}; give the first, "
            f"{match['stem']}-00001-of-{match['count']}.gguf"
        )
    names = [f"{match['stem']}-{no:05d}-of-{match['count']}.gguf" for no in range(1, count + 1)]
    for name in names:
        if not file.with_name(name).is_file():
            raise CheckpointError(f"{file}: {name} of the same split set is missing beside it")
    return [file.with_name(name) for name in names]


def _reader(gguf: Any, file: Path) -> Any:
    try:
        with regular_file(file) as (fd, _):
            head = os.pread(fd, max(HEAD_BYTES, 4), 0)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if head[:4] != MAGIC:
        instead = leftover(head) or f"begins with {head[:4]!r}, expected {MAGIC!r}"
        raise FormatError(f"{file}: not a GGUF file: {instead}")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # gguf raises what NumPy does of a file that is cut or wrong
        raise CorruptionError(
            f"{file}: cannot be read as GGUF: {error} ({type(error).__name__}); it is cut short or "
            "damaged, or of types that the installed gguf does not know"
        ) from error
    size = file.stat().st_size
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise CorruptionError(
                f"{file}: tensor {tensor.name!r} ends at byte {end}, the file has {size}; it is "
                "cut short, download it again"
            )
    return reader


def _value(reader: Any, file: Path, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        return None
    try:
        return field.contents()
    except Exception as error:  # as above
        raise CorruptionError(f"{file}: {key}: cannot be read: {error}") from error


def _infos(
    file: Path, tensor: Any, arch: _Arch, config: Mapping[str, Any], gguf: Any
) -> Iterator[TensorInfo]:
    """What one tensor of the file is in the model: itself, or its experts."""
    shape = tuple(int(side) for side in reversed(tensor.shape))
    kind = tensor.tensor_type
    where = f"{file}: tensor {tensor.name!r}"
    if kind not in (*gguf.quants._type_traits, *_plain_types(gguf)):
        raise FormatError(f"{where} is {kind.name}, which gguf does not dequantize")
    raw = tuple(int(side) for side in gguf.quant_shape_to_byte_shape(shape, kind))
    if not is_text(tensor.name) or math.prod(raw) != int(tensor.n_bytes):
        raise CorruptionError(f"{where}: {tensor.n_bytes} bytes, {kind.name} {list(shape)} differs")
    part = TensorInfo(
        tensor.name, "U8", raw, file, int(tensor.data_offset), int(tensor.n_bytes)
    )  # fmt: skip
    match = _LAYER.fullmatch(tensor.name)
    if match and match["part"] in _EXPERTS and match["leaf"] == "weight":
        if len(shape) != 3:
            raise CorruptionError(f"{where} has shape {list(shape)}, expected 3 dimensions")
        leaf, step = arch.leaves[_EXPERTS.index(match["part"])], part.n_bytes // shape[0]
        for index in range(shape[0]):
            its = TensorInfo(
                tensor.name, "U8", raw[1:], file, part.offset + index * step, step
            )  # fmt: skip
            name = f"model.layers.{match['layer']}.{arch.block}.experts.{index}.{leaf}.weight"
            yield _info(name, shape[1:], its, partial(_rows, its, kind, gguf))
        return
    named = _name(tensor.name, match, arch)
    if named is None:
        raise UnsupportedArchitectureError(
            f"{where}: has no name in a {arch.model_type} model of transformers"
        )
    heads = 0
    if arch.permuted and match and match["part"] in ("attn_q", "attn_k"):
        key = "num_attention_heads" if match["part"] == "attn_q" else "num_key_value_heads"
        heads = int(config[key])
        if heads < 1 or shape[0] % (2 * heads):
            raise CorruptionError(f"{where} has {shape[0]} rows, which {heads} heads cannot share")
    compute = partial(_whole if heads or len(shape) == 1 else _rows, part, kind, gguf)
    if heads:
        compute = partial(_unpermuted, part, kind, gguf, heads)
    if match and match["part"] == "ffn_gate_inp_shexp":
        yield _info(named, (1, *shape), part, partial(_as_row, part, kind, gguf))
    else:
        yield _info(named, shape, part, compute)


def _plain_types(gguf: Any) -> tuple[Any, ...]:
    return gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16


def _name(name: str, match: re.Match[str] | None, arch: _Arch) -> str | None:
    if match is None:
        stem, _, leaf = name.rpartition(".")
        return f"{_TOP[stem]}.{leaf}" if stem in _TOP and leaf in ("weight", "bias") else None
    inner = _IN_LAYER.get(match["part"])
    if inner is None:
        return None
    return f"model.layers.{match['layer']}.{inner.format(block=arch.block)}.{match['leaf']}"


def _info(name: str, shape: tuple[int, ...], part: TensorInfo, compute: Any) -> TensorInfo:
    stored = Weight((part,), "BF16", compute)
    return TensorInfo(
        name, "BF16", shape, part.file, part.offset, tensor_bytes("BF16", shape), stored
    )


def _rows(part: TensorInfo, kind: Any, gguf: Any, read: Read, first: int, last: int) -> Array:
    step = part.n_bytes // part.shape[0]
    its = TensorInfo(
        part.name, "U8", (last - first, *part.shape[1:]), part.file, part.offset + first * step,
        (last - first) * step,
    )  # fmt: skip
    return _whole(its, kind, gguf, read, 0, last - first)


def _whole(part: TensorInfo, kind: Any, gguf: Any, read: Read, first: int, last: int) -> Array:
    values: Array = gguf.quants.dequantize(read(part), kind)
    return values.astype(np.float32, copy=False)[first:last]


def _as_row(part: TensorInfo, kind: Any, gguf: Any, read: Read, first: int, last: int) -> Array:
    values: Array = gguf.quants.dequantize(read(part), kind)
    return values.astype(np.float32, copy=False).reshape(1, -1)[first:last]


def _unpermuted(
    part: TensorInfo, kind: Any, gguf: Any, heads: int, read: Read, first: int, last: int
) -> Array:
    """Rows of each head: llama.cpp has pairs beside each other, transformers has halves."""
    values = _whole(part, kind, gguf, read, 0, part.shape[0])
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(values.shape))[first:last]


def _check_whole(file: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError for a tensor that every model of these architectures has, and is not
    there. Missing experts are told where experts are found."""
    layers = range(int(config["num_hidden_layers"]))
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    inner = ("input_layernorm", "post_attention_layernorm", *_projections("qkvo"))
    names += (f"model.layers.{layer}.{part}.weight" for layer in layers for part in inner)
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{file}: no tensor for {name!r}, which this architecture has")


def _projections(letters: str) -> Iterator[str]:
    return (f"self_attn.{letter}_proj" for letter in letters)


def _folder(
    file: Path, reader: Any, name: str, arch: _Arch, digest: str, gguf: Any
) -> tuple[Path, dict[str, Any]]:
    """The folder for a file of this header, in the hub's cache, and its config."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "moebound" / "gguf" / digest
    if (folder / "config.json").is_file():
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return folder, found
    config = _config(file, reader, name, arch)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        if _value(reader, file, "tokenizer.ggml.tokens"):
            _tokenizer(file, made)
        (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    return folder, config


def _config(file: Path, reader: Any, name: str, arch: _Arch) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        loaded: Any = load_gguf_checkpoint(str(file))  # type: ignore[no-untyped-call]
        found = dict(loaded["config"])
        top = {"experts": "expert_count", "top_k": "expert_used_count"}
        counts = {key: _value(reader, file, f"{name}.{part}") for key, part in top.items()}
        found["num_local_experts" if name == "llama" else "num_experts"] = int(counts["experts"])
        found["num_experts_per_tok"] = int(counts["top_k"])
        for key, part in (
            ("moe_intermediate_size", "expert_feed_forward_length"),
            ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ):
            value = _value(reader, file, f"{name}.{part}")
            if value is not None and name != "llama":
                found[key] = int(value)
        found.pop("model_type", None)
        # Of float32: 1e-6 is 9.999999974752427e-07 there.
        found = {
            key: float(str(np.float32(value))) if isinstance(value, float) else value
            for key, value in found.items()
        }
        head_dim = _value(reader, file, f"{name}.attention.key_length")
        if head_dim is not None:
            found["head_dim"] = int(head_dim)
        if arch.model_type == "qwen3_moe":
            # llama.cpp has no key for it, and normalizes always.
            found["norm_topk_prob"] = True
        config = CONFIG_MAPPING[arch.model_type](**found).to_dict()
    except Exception as error:  # of metadata that are missing, or of another kind
        raise CorruptionError(
            f"{file}: its metadata make no {arch.model_type} config: {error} "
            f"({type(error).__name__})"
        ) from error
    config["dtype"] = "bfloat16"
    config["architectures"] = [_CLASSES[arch.model_type]]
    return json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


_CLASSES = {
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def _tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        made.save_pretrained(folder)
    except Exception as error:  # transformers raises what its converters do
        raise CheckpointError(
            f"{file}: transformers cannot convert its tokenizer: {error} ({type(error).__name__})"
        ) from error
