"""Every file of a checkpoint's folder: what a copy of the model needs, what is left out, and why.

Nothing is left out in silence but hidden files (of git, of the hub's client), config.json and the
index, in whose place a copy has its own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moebound.checkpoint.leftovers import (
    HEAD_BYTES,
    LFS_POINTER,
    UNFINISHED,
    leftover,
    why_missing,
)
from moebound.checkpoint.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    as_text,
    is_file_name,
    read_header,
    read_weight_map,
)
from moebound.errors import CheckpointError, FormatError
from moebound.files.regular import regular_file

TEMPLATES_FOLDER = "additional_chat_templates"
"""The one folder that is part of a model: a tokenizer's chat templates, but for the default."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_CONSOLIDATED = "consolidated"
"""How Mistral's own files begin: the weights again, under other names."""


@dataclass(frozen=True)
class Inventory:
    """carried: files that a copy takes over as they are, sorted. left_out: the others, by their
    names as text, with the reason, which begins with a verb."""

    carried: tuple[Path, ...]
    left_out: Mapping[str, str]


def take_inventory(folder: Path, tensors: Mapping[str, TensorInfo]) -> Inventory:
    """tensors: those that are read from the folder's weight files. Raises CheckpointError if the
    folder cannot be read."""
    carried, left_out = list[Path](), dict[str, str]()
    try:
        for path, why in _entries(folder, tensors):
            if why is None:
                carried.append(path)
            else:
                left_out[as_text(path.relative_to(folder).as_posix())] = why
        for name, why in _named_and_absent(folder, tensors):
            left_out[name] = why
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    return Inventory(tuple(carried), dict(sorted(left_out.items())))


def _entries(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[Path, str | None]]:
    """Each file, and why it is left out; None for one that is carried."""
    taken = {part.file for tensor in tensors.values() for part in tensor.parts}
    own = {folder / "config.json", folder / INDEX_FILE, folder / SINGLE_FILE} | taken
    for path in sorted(folder.iterdir()):
        if path in own or path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name != TEMPLATES_FOLDER:
                yield path, "is a folder; files beside config.json are carried, and chat templates"
                continue
            for inner in sorted(path.iterdir()):
                template = inner.name.endswith(".jinja")
                yield inner, _why_not(inner, tensors) if template else "is no chat template"
        else:
            yield path, _why_not(path, tensors)


def _why_not(path: Path, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why a file cannot be carried, None if it can."""
    name = path.name
    if not is_file_name(name):
        return "has a name that cannot be written down in every file system as text"
    if not path.exists():
        return why_missing(path)
    if not stat.S_ISREG(path.stat().st_mode):
        return "is no ordinary file"
    if name.endswith(UNFINISHED):
        return "is an unfinished download"
    if name.endswith(".safetensors"):
        return _why_not_weights(path, tensors)
    if name.endswith(_WEIGHTS):
        return "is not safetensors, and may be the weights in another format"
    if name.endswith(".index.json"):
        return "is an index of other weight files"
    with regular_file(path) as (fd, _):
        head = os.pread(fd, HEAD_BYTES, 0)
    # An empty file can be meant, and what begins like a web page be one.
    telling = head and (name.endswith(".json") or head.startswith(LFS_POINTER))
    instead = leftover(head) if telling else None
    return f"is {instead}" if instead else None


def _why_not_weights(path: Path, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Of a safetensors file that neither is the model's nor named by its index."""
    if path.name.startswith(_CONSOLIDATED):
        return "is in Mistral's own format, which has the weights under other names"
    try:
        header = read_header(path)[0]
    except (FormatError, CheckpointError) as error:
        return f"cannot be read as safetensors ({str(error).removeprefix(f'{path}: ')})"
    parts = {part.name: part for tensor in tensors.values() for part in tensor.parts}
    twice = header.keys() & parts.keys()
    if twice:
        name = min(twice)
        return f"has {name!r}, which the model has from {parts[name].file.name}"
    return None


def _named_and_absent(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """What an index beside `model.safetensors` promises, and nothing keeps."""
    index = folder / INDEX_FILE
    if not ((folder / SINGLE_FILE).is_file() and index.is_file()):
        return
    absent: dict[str, list[str]] = {}
    parts = {part.name for tensor in tensors.values() for part in tensor.parts}
    for name, shard in read_weight_map(index).items():
        if name not in parts:
            absent.setdefault(shard, []).append(name)
    for shard, names in absent.items():
        path = folder / shard
        why = "lacks them" if path.exists() else why_missing(path)
        yield shard, f"{why}; {INDEX_FILE} has {len(names)} tensors in it, as {names[0]!r}"
