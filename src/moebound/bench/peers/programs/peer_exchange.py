"""What every peer's program shares: what it is asked, and what it answers. Imports nothing of ours.

    PROGRAM REQUEST ANSWER

REQUEST is a folder:

    request.json       {"format": "moebound.peer.request", "version": 1,
                        "checkpoint": a plain folder of safetensors,
                        "setting": {"bits": 4, ...},
                        "experts": [{"name", "layer", "expert", "role"}, ...] a matrix each,
                        name being its tensor's, role gate, up or down}
    tokens.json        [[token ids], ...]: the calibration text, a row a sequence
    importance.safetensors  by tensor name, [cols] float32: the mean of g² x² over the tokens of
                       the text that its expert got (all ones for an expert that got none)

ANSWER is a folder that the program makes:

    checkpoint/        the same checkpoint, with the experts' weights as the quantizer leaves them,
                       dequantized, in the dtype that they had; all else bit for bit as it was
    peer.json          {"format": "moebound.peer.answer", "version": 1,
                        "n_bytes": of all that the experts are stored in,
                        "parts": the same by kind of tensor,
                        "library", "library_version", "settings": what was asked of it,
                        "remarks": what else is to be known}
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

REQUEST, ANSWER, VERSION = "moebound.peer.request", "moebound.peer.answer", 1
_SHIFT = 16
_EXPERT = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(gate|up|down)_proj$")


class Request:
    """What was asked. setting: of the quantizer. rows: the text. experts: by (layer, expert, role),
    the names of their tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        if (asked.get("format"), asked.get("version")) != (REQUEST, VERSION):
            raise SystemExit(f"{folder}: expected {REQUEST}, version {VERSION}")
        self.checkpoint = Path(asked["checkpoint"])
        self.setting: dict[str, Any] = asked["setting"]
        self.rows: list[list[int]] = json.loads((folder / "tokens.json").read_text())
        self.experts: dict[tuple[int, int, str], str] = {
            (one["layer"], one["expert"], one["role"]): one["name"] for one in asked["experts"]
        }

    def name_of(self, module: str) -> str | None:
        """The tensor of a module that a library calls ...layers.3...experts.7.gate_proj; None of
        others."""
        found = _EXPERT.search(module)
        return found and self.experts.get((int(found[1]), int(found[2]), found[3]))

    def importance(self) -> dict[str, Any]:
        """By tensor name."""
        with safe_open(self.folder / "importance.safetensors", "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def main(run: Callable[[Request, Path], dict[str, Any]]) -> None:
    """Answer what the command line asks. run: makes ANSWER/checkpoint, and what peer.json has."""
    request, answer = Request(Path(sys.argv[1])), Path(sys.argv[2])
    answer.mkdir(parents=True, exist_ok=True)
    said = run(request, answer)
    said = {"format": ANSWER, "version": VERSION, "n_bytes": sum(said["parts"].values()), **said}
    (answer / "peer.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


def write_checkpoint(request: Request, folder: Path, weights: Mapping[str, Any]) -> None:
    """A copy of the checkpoint with these weights [rows, cols], float32 NumPy arrays by tensor
    name, in the place of the experts'; cast once, to nearest. Raises SystemExit unless it is all
    of them and in their shapes."""
    missing = sorted(set(request.experts.values()) - set(weights))
    if missing:
        raise SystemExit(f"the quantizer left out {len(missing)} of the matrices, as {missing[0]}")
    folder.mkdir(parents=True)
    for path in request.checkpoint.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    for name, spelled, shape, file, offset in _places(folder):
        if name not in weights:
            continue
        values = np.ascontiguousarray(weights[name], dtype=np.float32)
        if values.shape != shape:
            raise SystemExit(f"{name}: expected shape {shape}, the quantizer made {values.shape}")
        if not np.isfinite(values).all():
            raise SystemExit(f"{name}: the quantizer made values that are not finite")
        with open(file, "r+b") as out:
            out.seek(offset)
            out.write(_cast(values, spelled))


def read_weights(request: Request, names: Mapping[str, Any] | None = None) -> Iterator[
    tuple[str, Any]
]:  # fmt: skip
    """(name, values [...] float32) of the checkpoint's tensors, or of these of them."""
    for name, spelled, shape, file, offset in _places(request.checkpoint):
        if names is None or name in names:
            with open(file, "rb") as data:
                data.seek(offset)
                raw = data.read(int(np.prod(shape)) * _ITEM[spelled])
            yield name, _uncast(raw, spelled).reshape(shape)


_ITEM = {"BF16": 2, "F16": 2, "F32": 4}


def _places(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...], Path, int]]:
    """name, dtype, shape, file, offset in it, of every tensor of float numbers."""
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as data:
            n = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(n))
        for name, about in header.items():
            if name != "__metadata__" and about["dtype"] in _ITEM:
                at = 8 + n + about["data_offsets"][0]
                yield name, about["dtype"], tuple(about["shape"]), file, at


def _cast(values: Any, spelled: str) -> bytes:
    if spelled == "BF16":  # NumPy has none: the upper half, rounded to nearest, ties to even
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(_SHIFT)) & np.uint32(1)
        upper = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(_SHIFT)
        return bytes(upper.astype("<u2").tobytes())
    return bytes(values.astype({"F16": "<f2", "F32": "<f4"}[spelled]).tobytes())


def _uncast(raw: bytes, spelled: str) -> Any:
    if spelled == "BF16":
        upper = np.frombuffer(raw, "<u2").astype(np.uint32)
        return (upper << np.uint32(_SHIFT)).view(np.float32)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[spelled]).astype(np.float32)


def packed_experts(request: Request, folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(tensor of ours, module, {kind: torch tensor}) of every expert matrix in a folder of
    safetensors that a library wrote: model.layers.0.mlp.experts.7.up_proj with its weight_packed,
    weight_scale and so on."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as data:
            for full in data.keys():  # noqa: SIM118
                module, _, kind = full.rpartition(".")
                if request.name_of(module) is not None:
                    found.setdefault(module, {})[kind] = data.get_tensor(full)
    for module, tensors in found.items():
        name = request.name_of(module)
        assert name is not None
        yield name, module, tensors


def count_bytes(parts: dict[str, int], tensors: Mapping[str, Any]) -> None:
    """Add what these torch tensors take, by kind."""
    for kind, tensor in tensors.items():
        parts[kind] = parts.get(kind, 0) + tensor.numel() * tensor.element_size()


def by_length(rows: list[list[int]]) -> list[list[list[int]]]:
    """Sequences of one length together: batches that need no padding."""
    found: dict[int, list[list[int]]] = {}
    for row in rows:
        found.setdefault(len(row), []).append(row)
    return [found[length] for length in sorted(found)]
