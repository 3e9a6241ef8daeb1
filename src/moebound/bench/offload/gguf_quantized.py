"""The same GGUF file in a type of fewer bits, by llama.cpp's own quantizer, and what it takes.

Without importance matrix: drawn tokens have none that would mean anything. Rows that are no whole
number of blocks of 256 weights, as the 1408 of Moonlight's `down`, get what llama.cpp falls back
to; `GgufSizes.expert_types` says what became of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moebound.bench.peers.settings import PROGRAMS
from moebound.errors import MethodError
from moebound.extras import need

_EXPERTS = "_exps."
_SAID = 300
"""Characters of what the quantizer said last."""


@dataclass(frozen=True)
class GgufSizes:
    """file_bytes: of all of it. expert_bits: a weight of routed experts. expert_types: by type of
    llama.cpp, bytes of routed experts."""

    file_bytes: int
    expert_bits: float
    expert_types: Mapping[str, int]


def quantize_gguf(source: Path, file: Path, kind: str) -> Path:
    """Write `file`, of type `kind` ("q4_k_m"), from the GGUF file `source`, if it is not there.
    Returns the file.

    In a process of its own, whose memory is then free again. Raises MethodError if llama.cpp
    refuses.
    """
    if file.exists():
        return file
    part = file.with_name(file.name + ".partial")
    command = [sys.executable, str(PROGRAMS / "llama_quantize.py"), str(source), str(part), kind]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        part.unlink(missing_ok=True)
        said = done.stderr.decode(errors="replace").strip()[-_SAID:]
        raise MethodError(
            f"{source}: llama.cpp's quantizer to {kind} ended with {done.returncode}: {said}"
        )
    with open(part, "rb") as made:  # what is not yet written cannot be dropped from memory
        os.fsync(made.fileno())
    part.rename(file)
    return file


def gguf_sizes(file: Path) -> GgufSizes:
    """What a GGUF file takes, by its header. Raises BackendUnavailable without gguf."""
    types, n_weights = Counter[str](), 0
    for tensor in need("gguf", "reading GGUF").GGUFReader(file).tensors:
        if _EXPERTS in tensor.name:
            types[tensor.tensor_type.name] += int(tensor.n_bytes)
            n_weights += int(tensor.n_elements)
    bits = 8 * types.total() / n_weights if n_weights else 0.0
    return GgufSizes(file.stat().st_size, bits, dict(types))
