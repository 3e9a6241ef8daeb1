"""GGUF files, of llama.cpp, as sources: tensors under the names of Hugging Face, dequantized as
they are read, and a folder with the config and tokenizer that the file's metadata make.

Values are those of `gguf`'s own dequantizers, rounded once to bfloat16 (what transformers keeps in
float32 stays that). The experts of a layer are one tensor there, [experts, out, in]; of an expert
its own bytes alone are read. `gguf_config.py` makes the config, `gguf_tensors.py` the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moebound.checkpoint.gguf_config import arch_of, config_of
from moebound.checkpoint.gguf_header import Header, read_header
from moebound.checkpoint.gguf_tensors import left_out, model_of, tensors_of
from moebound.checkpoint.gguf_tokenizer import write_tokenizer
from moebound.checkpoint.shards import TensorInfo
from moebound.errors import CheckpointError, CorruptionError
from moebound.extras import need

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


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
    stamps = tuple((part, part.stat().st_mtime_ns, part.stat().st_size) for part in files)
    from huggingface_hub.constants import HF_HOME

    found = _opened(gguf, stamps, HF_HOME)
    if not (found.folder / "config.json").is_file():  # the cache was emptied
        _opened.cache_clear()
        found = _opened(gguf, stamps, HF_HOME)
    return found


@lru_cache(maxsize=2)
def _opened(gguf: Any, stamps: tuple[tuple[Path, int, int], ...], home: str) -> GgufSource:
    """stamps: files, with time and size, so that one that was changed is read again."""
    header = read_header(gguf, [file for file, *_ in stamps])
    file = header.file
    arch = arch_of(header)
    digest = hashlib.sha256()
    for part, reader in zip(header.files, header.readers, strict=True):
        with part.open("rb") as handle:
            digest.update(handle.read(int(reader.data_offset)))
    folder = Path(home) / "moebound" / "gguf" / digest.hexdigest()
    known = folder / "config.json"
    config = json.loads(known.read_text("utf-8")) if known.is_file() else config_of(header, arch)
    try:
        model = model_of(config)
    except Exception as error:  # transformers', of numbers that make no model
        raise CorruptionError(
            f"{file}: its metadata make no {config['model_type']} model: {error} "
            f"({type(error).__name__})"
        ) from error
    config["architectures"] = [model.name]
    tensors = tensors_of(header, arch, config, model)
    if not known.is_file():
        _make_folder(folder, header, config)
    types = Counter(tensor.tensor_type.name for _, tensor in header.tensors.values())
    said = ", ".join(f"{kind} of {count} tensors" for kind, count in types.most_common())
    if apart := len(list(left_out(header, config))):
        said += f"; {apart} of layers that predict several tokens are left out"
    words = f"GGUF, {file.name} ({said}; SHA-256 of its header {digest.hexdigest()})"
    return GgufSource(folder, config, tensors, words)


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


def _make_folder(folder: Path, header: Header, config: Mapping[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        if header.value("tokenizer.ggml.tokens"):
            write_tokenizer(header, made)
        (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
