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
from moebound.checkpoint.gguf_source import gguf_file, open_gguf
from moebound.checkpoint.inventory import TEMPLATES_FOLDER, Inventory, take_inventory
from moebound.checkpoint.leftovers import why_missing
from moebound.checkpoint.quantized import KNOWN, dequantized
from moebound.checkpoint.shards import (
    TensorInfo,
    as_text,
    read_header,
    read_json,
    read_tensors,
    total_bytes,
)
from moebound.errors import CheckpointError, UnsupportedArchitectureError
from moebound.types import NUMPY_DTYPES, Array
from moebound.wordmath.builtin import resolve

# What is fetched from the hub, from the top folder and that of chat templates only: weights, and
# what a model needs to run.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py",
                 "LICENSE*", "README.md"]  # fmt: skip
# Patterns of fnmatch, in which * spans folders: all folders but the one with chat templates.
_HUB_IGNORED = [
    "consolidated*", "*/*/*", f"{TEMPLATES_FOLDER}[!/]*/*",
    *(f"{TEMPLATES_FOLDER[:at]}{end}"
      for at in range(len(TEMPLATES_FOLDER)) for end in (f"[!{TEMPLATES_FOLDER[at]}]*/*", "/*")),
]  # fmt: skip

# What is put around a model and gets into its tensors' names, and what puts it there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "base_model.model.": "PEFT; merge the adapter first",
    "base_layer.": "PEFT; merge the adapter first",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:" + "|".join(map(re.escape, _WRAPPERS)) + ")")

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

    stored_as: None, or of a quantized checkpoint its format, in words. Weights are dequantized as
    they are read, then, and tensors and config are those of the model that comes of it.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family | None
    tensors: Mapping[str, TensorInfo]
    name: str
    stored_as: str | None = None

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
        """The other files that a copy of this model needs: tokenizer, chat templates, generation
        config, licence, and weights that no index names and that are not the model's again.

        The model's weights, their index, config.json and hidden files are not among them.
        """
        return list(self._inventory.carried)

    @property
    def left_out(self) -> dict[str, str]:
        """The files that are neither among the weights nor among `files`, by name, with the reason.
        Hidden files are not named."""
        return dict(self._inventory.left_out)

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

    @property
    def stored_bytes(self) -> int:
        """Bytes that the files have of them: fewer than `total_bytes` where they are quantized."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @cached_property
    def _inventory(self) -> Inventory:
        if not self.path.is_dir():
            return Inventory((), {})
        return take_inventory(self.path, self.tensors)

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
    are huggingface_hub's), a built-in model ("builtin:wordmath"), a .gguf file (of a split set the
    first) or a folder with one, or one .safetensors file (tensors without experts). A checkpoint
    that is open is given back.

    A quantized one (FP8, MXFP4, compressed-tensors, GPTQ, AWQ, GGUF) is dequantized as it is read.

    Raises CheckpointError if it cannot be found, fetched or read, is inconsistent, or quantized in
    another way; UnsupportedArchitectureError if it is dense or its architecture is not known;
    FormatError or CorruptionError for bad safetensors files.
    """
    if isinstance(src, Checkpoint):
        return src
    path = Path(src).expanduser()
    name = as_text(path.resolve().name if path.exists() else os.fspath(src))
    if (file := gguf_file(path)) is not None:
        return _open_gguf(file, name)
    if path.exists() and not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a folder, a .safetensors file or a .gguf file")
        return Checkpoint(path, {}, None, read_header(path)[0], name)
    path = local_folder(
        src,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config.json (it {why_missing(path / 'config.json')}); expected a Hugging "
            "Face model folder"
        )
    config = read_json(path / "config.json")
    family = find_family(config)
    _refuse_stores(path, config)
    plain_config, tensors, stored_as = _plain(path, config, family, read_tensors(path))
    _refuse_wrapped(path, family, tensors)
    checkpoint = Checkpoint(path, plain_config, family, tensors, name, stored_as)
    if not checkpoint.experts():
        raise UnsupportedArchitectureError(
            f"{path}: model_type {config.get('model_type')!r} is supported, but this checkpoint "
            f"is dense: none of its tensors is a routed expert's{_nearly(family, tensors)}"
        )
    return checkpoint


def _open_gguf(file: Path, name: str) -> Checkpoint:
    found = open_gguf(file)
    family = find_family(found.config)
    checkpoint = Checkpoint(found.folder, found.config, family, found.tensors, name, found.words)
    if not checkpoint.experts():
        raise UnsupportedArchitectureError(f"{file}: dense: none of its tensors is an expert's")
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
    if (file := gguf_file(path)) is not None:
        return open_gguf(file).folder
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
    from huggingface_hub import snapshot_download

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


_QUANTIZATION_FIELDS = ("quantization_config", "compression_config")


def _quantization(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The field of a config that says how weights are quantized, and its value."""
    for part in (config, text_config(config)):
        for field in _QUANTIZATION_FIELDS:
            if part.get(field):
                return field, part[field]
    return None


def _quant_method(value: Any) -> Any:
    return value.get("quant_method") if isinstance(value, Mapping) else None


def _refuse_stores(path: Path, config: Mapping[str, Any]) -> None:
    found = _quantization(config)
    if found and _quant_method(found[1]) == "moebound":
        raise CheckpointError(
            f"{path}: already compressed by moebound; open it as a store, or decompress it"
        )


def _plain(
    path: Path, config: Mapping[str, Any], family: Family, stored: Mapping[str, TensorInfo]
) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo], str | None]:
    """Config and tensors as if nothing was quantized, and how it is, None if it is not.

    Raises CheckpointError for what is quantized in a way that is not known, and for a config that
    only says that it is.
    """
    found = _quantization(config)
    tensor = _quantized_tensor(stored)
    if found is None:
        # A dtype alone is judged where it matters: of experts, when they are found.
        if tensor is not None and _QUANTIZED.fullmatch(tensor.name):
            raise CheckpointError(
                f"{path}: quantized checkpoint (tensor {tensor.name!r}), and config.json has no "
                "quantization_config that says how"
            )
        return config, stored, None
    field, value = found
    method = _quant_method(value)
    known = dequantized(path, value, stored) if isinstance(value, Mapping) else None
    if known is not None:
        tensors, words = known
        tensor = _quantized_tensor(tensors)
        if tensor is None:
            return without_quantization(config), tensors, words
    if tensor is None and any(family.match(name) for name in stored):
        dtypes = ", ".join(sorted({t.dtype for t in stored.values()}))
        raise CheckpointError(
            f"{path}: config.json has a {field} (quant_method {method!r}), but no tensor is "
            f"quantized: all are {dtypes}. It is left over from before the weights were "
            f"dequantized, and transformers would misread them; remove {field} from config.json"
        )
    raise CheckpointError(
        f"{path}: quantized checkpoint (quant_method {method!r} in the {field} of config.json"
        + ("" if tensor is None else f", tensor {tensor.name!r} is {tensor.dtype}")
        + f"), expected one of {', '.join(KNOWN)}, or BF16, F16 or F32 weights; dequantize it to "
        "bfloat16 first"
    )


def _quantized_tensor(tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """One that only a quantized checkpoint has, by its name, or else by its dtype."""
    named = (t for t in tensors.values() if _QUANTIZED.fullmatch(t.name))
    return next(named, None) or next((t for t in tensors.values() if _is_packed(t)), None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and the parts of it that are configs of their own, without what says how weights
    are quantized."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _QUANTIZATION_FIELDS
    }


def _is_packed(tensor: TensorInfo) -> bool:
    """Whether a matrix is of a dtype that only quantized weights have. Tables of numbers (of
    experts, by token) are I64."""
    return len(tensor.shape) > 1 and tensor.dtype not in (*NUMPY_DTYPES, "F64", "I64", "BOOL")


def _nearly(family: Family, tensors: Mapping[str, TensorInfo]) -> str:
    """A name that would be an expert's without what stands before it, in words; mostly none."""
    for name in tensors:
        head, rest = "", name
        while "." in rest:
            part, _, rest = rest.partition(".")
            head += part + "."
            if family.match(rest):
                return f"; {name!r} would be one without {head!r} in front"
    return ""


def _refuse_wrapped(path: Path, family: Family, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError if experts would be found under names without a wrapper's prefix."""
    for name in tensors:
        if not (found := _WRAPPER.search(name)):
            continue
        if family.match(name) is None and family.match(_WRAPPER.sub("", name)):
            raise CheckpointError(
                f"{path}: tensor {name!r}: {found[0]!r} in it was left by a wrapper "
                f"({_WRAPPERS[found[0]]}); save the model inside it, or rename the tensors"
            )
