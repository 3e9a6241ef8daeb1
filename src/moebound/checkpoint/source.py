"""Open a checkpoint: a folder, a model on the hub, a built-in one, or one safetensors file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebound.checkpoint.experts import Expert, ExpertMatrix, find_experts, read_matrix
from moebound.checkpoint.families import Family, find_family, text_config
from moebound.checkpoint.shards import (
    TensorInfo,
    read_header,
    read_json,
    read_tensors,
    total_bytes,
)
from moebound.errors import BackendUnavailable, CheckpointError, UnsupportedArchitectureError
from moebound.types import Array
from moebound.wordmath.builtin import resolve

# What is fetched from the hub, from the top folder only: weights, and what a model needs to run.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py",
                 "LICENSE*", "README.md"]  # fmt: skip
_HUB_IGNORED = ["*/*", "consolidated*"]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack",
                    ".onnx", ".partial")  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# Companions of quantized tensors, by the last part of their names.
_QUANTIZED = re.compile(
    r".*(?:weight_scale(?:_inv)?|weight_packed|_blocks|_scales|qweight|qzeros|absmax)"
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's contents, by name; no weights are in memory.

    path: the folder (or the one file). config: config.json, as read. family: how its experts are
    laid out, None for a lone file. tensors: every tensor, in the order of the files. name: what
    people call it: of a path the last part, a hub id or a built-in name as it is.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family | None
    tensors: Mapping[str, TensorInfo]
    name: str

    def experts(self, *, shared: bool = False) -> list[Expert]:
        """The experts in model order (by layer, then index); with `shared`, shared ones too.

        Empty for a lone file, which has no config to tell experts apart.
        """
        if not shared:
            return list(self._routed)
        return sorted((*self._routed, *self._shared), key=lambda expert: expert.key)

    def passthrough(self, *, shared: bool = False) -> list[TensorInfo]:
        """The tensors that belong to no expert, in the order of the files.

        With `shared`, the same `shared` as given to `experts`, shared experts are experts too.
        """
        taken = {
            matrix.name for expert in self.experts(shared=shared) for matrix in expert.matrices
        }
        return [tensor for name, tensor in self.tensors.items() if name not in taken]

    def read(self, matrix: ExpertMatrix, *, drop_cache: bool = False) -> Array:
        """The weights of one matrix; see `read_matrix`."""
        return read_matrix(matrix, drop_cache=drop_cache)

    def files(self) -> list[Path]:
        """The other files that a copy of this model needs: tokenizer, generation config, licence.

        Weights, their index, config.json, hidden files and subfolders are not among them.
        """
        if not self.path.is_dir():
            return []
        return sorted(
            file
            for file in self.path.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
            and file.name != "config.json"
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(expert.n_bytes for expert in self._routed)

    @property
    def shared_bytes(self) -> int:
        """Bytes of all shared experts."""
        return sum(expert.n_bytes for expert in self._shared)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return total_bytes(self.tensors)

    @cached_property
    def _routed(self) -> tuple[Expert, ...]:
        if self.family is None:
            return ()
        return tuple(find_experts(self.tensors, self.family, self.config))

    @cached_property
    def _shared(self) -> tuple[Expert, ...]:
        if self.family is None:
            return ()
        return tuple(find_experts(self.tensors, self.family, self.config, shared=True))


def open_checkpoint(
    src: Checkpoint | str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a model's checkpoint. Reads headers only.

    src: a local folder, a hub id ("org/name", downloaded to the hub's cache; the other arguments
    are huggingface_hub's), a built-in model ("builtin:wordmath"), or one .safetensors file (tensors
    without experts). A checkpoint that is open is given back.

    Raises CheckpointError if it cannot be found, fetched or read, is inconsistent or quantized;
    UnsupportedArchitectureError if it is dense or its architecture is not in the table;
    FormatError or CorruptionError for bad safetensors files.
    """
    if isinstance(src, Checkpoint):
        return src
    path = Path(src).expanduser()
    name = path.resolve().name if path.exists() else os.fspath(src)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a folder or a .safetensors file")
        tensors = read_header(path)[0]
        return Checkpoint(path, {}, None, tensors, name)
    path = local_folder(
        src,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face model folder")
    config = read_json(path / "config.json")
    family = find_family(config)
    _refuse_quantized_config(path, config)
    tensors = read_tensors(path)
    _refuse_quantized_tensors(path, tensors)
    checkpoint = Checkpoint(path, config, family, tensors, name)
    if not checkpoint.experts():
        raise UnsupportedArchitectureError(
            f"{path}: model_type {config.get('model_type')!r} is supported, but this checkpoint "
            "is dense: none of its tensors is a routed expert's"
        )
    return checkpoint


def local_folder(
    src: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that src names: itself, a built-in model's, or where the hub's files for this id
    are, fetched now.

    Raises CheckpointError if there is none.
    """
    src = resolve(os.fspath(src))
    path = Path(src).expanduser()
    if path.is_dir():
        return path
    return _download(src, revision, token, cache_dir, local_files_only)


def _download(
    src: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    # What can only be a path is not looked up on the hub: the hub's error would mislead.
    if not _HUB_ID.fullmatch(src) or src.endswith(".safetensors"):
        raise CheckpointError(f"{src}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BackendUnavailable(
            f"{src}: no such folder, and fetching it from the hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(
            snapshot_download(
                src,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_IGNORED,
            )
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's, and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{src}: no local folder of this name, and it could not be fetched from the hub: "
            f"{reason} ({type(error).__name__}). Check the id, the connection and the token "
            "(hf auth login), or give the path of a folder"
        ) from error


def _refuse_quantized_config(path: Path, config: Mapping[str, Any]) -> None:
    for part in (config, text_config(config)):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if not quantization:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if method == "moebound":
            raise CheckpointError(
                f"{path}: already compressed by moebound; open it as a store, or decompress it"
            )
        hint = (
            "; load it in transformers with Mxfp4Config(dequantize=True) and save it as bfloat16"
            if method == "mxfp4"
            else "; dequantize it to bfloat16 first"
        )
        raise CheckpointError(
            f"{path}: quantized checkpoint (quant_method {method!r}), expected BF16, F16 or F32 "
            f"weights{hint}"
        )


def _refuse_quantized_tensors(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name in tensors:
        if _QUANTIZED.fullmatch(name):
            raise CheckpointError(
                f"{path}: quantized checkpoint (tensor {name!r}), expected BF16, F16 or F32 "
                "weights; dequantize it to bfloat16 first"
            )
