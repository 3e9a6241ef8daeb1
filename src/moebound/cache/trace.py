"""Routing traces: for every token and every MoE layer, the experts chosen and their weights.

On disk a trace is one NumPy `.npz`, no pickles:

  meta                   JSON: {"format": "moebound.trace", "version": 1, "model", "task",
                         "layers": [decoder indices], "n_experts": [one a layer]}
  token      int32 [T]   token ids, -1 where unknown
  position   int32 [T]   place in its sequence, padding not counted
  sequence   int32 [T]   which sequence, numbered in the order in which they began
  step       int32 [T]   the forward pass, ascending: tokens of one step are computed together
  decode     bool  [T]   True: fed alone, after a prefill; False: part of a prompt (or of a text
                         that was read at once)
  index_L    int16 [T, K]    experts chosen in decoder layer L, in the router's order; -1: none (a
                             router that may skip: ZAYA)
  weights_L  float16 [T, K]  what their outputs are multiplied by, scaling factors included

Only real tokens are in it: no padding, and nothing that is computed for sequences that have ended.
A cache simulator replays it step by step and, within a step, layer by layer.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebound.errors import CorruptionError, FormatError, MoeboundError
from moebound.files.durable import save_bytes
from moebound.types import Array

FORMAT, VERSION = "moebound.trace", 1
MAX_FILE_BYTES = 1 << 36
"""What a trace may unpack to; larger ones are refused before any memory is asked for."""
MAX_EXPERTS = (1 << 15) - 1

_TOKEN_FIELDS = {"token": "i4", "position": "i4", "sequence": "i4", "step": "i4", "decode": "?"}


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One layer's decisions. index: [T, K] int16, -1 for none. weights: [T, K] float32 or 16."""

    layer: int
    n_experts: int
    index: Array
    weights: Array


@dataclass(frozen=True, eq=False)
class Trace:
    """What every layer decided for every token; see the module for the fields, all of length T."""

    layers: tuple[LayerTrace, ...]
    token: Array
    position: Array
    sequence: Array
    step: Array
    decode: Array
    model: str = ""
    task: str = ""

    @property
    def n_tokens(self) -> int:
        return len(self.token)

    @property
    def n_sequences(self) -> int:
        return len(np.unique(self.sequence))

    def layer(self, layer: int) -> LayerTrace:
        """Raises MoeboundError for a layer that has no experts here."""
        for found in self.layers:
            if found.layer == layer:
                return found
        raise MoeboundError(
            f"layer {layer}: not in this trace, which has {[entry.layer for entry in self.layers]}"
        )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "task": self.task,
            "layers": [entry.layer for entry in self.layers],
            "n_experts": [entry.n_experts for entry in self.layers],
        }
        arrays: dict[str, Any] = {"meta": np.array(json.dumps(meta))}
        for name, dtype in _TOKEN_FIELDS.items():
            arrays[name] = np.asarray(getattr(self, name), dtype)
        for entry in self.layers:
            arrays[f"index_{entry.layer}"] = entry.index.astype(np.int16)
            arrays[f"weights_{entry.layer}"] = entry.weights.astype(np.float16)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        save_bytes(path, packed.getbuffer())


def load_trace(path: Path) -> Trace:
    """Read a trace.

    Raises MoeboundError for a file that is not there, FormatError for one that is no trace or of a
    later version, CorruptionError for one that contradicts itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_FILE_BYTES:
            raise FormatError(f"{path}: unpacks to {unpacked} bytes, at most {MAX_FILE_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            return _read(path, arrays)
    except OSError as error:
        raise MoeboundError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise FormatError(f"{path}: no routing trace (.npz): {error}") from error
    except (KeyError, ValueError, TypeError, EOFError, zlib.error, NotImplementedError) as error:
        if isinstance(error, MoeboundError):
            raise
        raise CorruptionError(f"{path}: damaged routing trace: {error}") from error


def _read(path: Path, arrays: Any) -> Trace:
    if "meta" not in arrays:
        raise FormatError(f"{path}: no routing trace: no 'meta' in it")
    meta = json.loads(str(arrays["meta"]))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise FormatError(f"{path}: no routing trace: expected format {FORMAT!r}")
    if meta["version"] != VERSION:
        raise FormatError(f"{path}: trace version {meta['version']}, this moebound reads {VERSION}")
    fields = {name: arrays[name] for name in _TOKEN_FIELDS}
    n_tokens = len(fields["token"])
    for name, dtype in _TOKEN_FIELDS.items():
        if fields[name].shape != (n_tokens,) or fields[name].dtype != np.dtype(dtype):
            raise CorruptionError(f"{path}: {name}: expected {dtype} [{n_tokens}]")
    layers = []
    for layer, n_experts in zip(meta["layers"], meta["n_experts"], strict=True):
        entry = LayerTrace(layer, n_experts, arrays[f"index_{layer}"], arrays[f"weights_{layer}"])
        index = entry.index
        if index.dtype != np.int16 or index.ndim != 2 or index.shape != entry.weights.shape:
            raise CorruptionError(f"{path}: layer {layer}: index and weights do not match")
        if len(index) != n_tokens or (
            index.size and not -1 <= index.min() <= index.max() < n_experts
        ):
            raise CorruptionError(f"{path}: layer {layer}: tokens or experts that do not exist")
        layers.append(entry)
    return Trace(tuple(layers), **fields, model=str(meta["model"]), task=str(meta["task"]))


def join(traces: Sequence[Trace]) -> Trace:
    """One after the other, sequences and steps numbered on. Raises MoeboundError for none, and for
    traces of different models."""
    if not traces:
        raise MoeboundError("no traces to join")
    shapes = {tuple((e.layer, e.n_experts, e.index.shape[1]) for e in t.layers) for t in traces}
    if len(shapes) > 1:
        raise MoeboundError("traces of different models: their layers or experts differ")
    sequences, steps, sequence, step = [], [], 0, 0
    for trace in traces:
        sequences.append(trace.sequence + sequence)
        steps.append(trace.step + step)
        sequence += int(trace.sequence.max(initial=-1)) + 1
        step += int(trace.step.max(initial=-1)) + 1
    first = traces[0]
    return Trace(
        tuple(
            LayerTrace(
                entry.layer,
                entry.n_experts,
                np.concatenate([t.layers[at].index for t in traces]),
                np.concatenate([t.layers[at].weights for t in traces]),
            )
            for at, entry in enumerate(first.layers)
        ),
        token=np.concatenate([t.token for t in traces]),
        position=np.concatenate([t.position for t in traces]),
        sequence=np.concatenate(sequences),
        step=np.concatenate(steps),
        decode=np.concatenate([t.decode for t in traces]),
        model=first.model,
        task=first.task,
    )
