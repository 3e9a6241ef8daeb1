"""A peer's process: what it is given, what it gives, and what is checked of that.

A run is kept: asked for the same of the same model and text again, what it made is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from moebound.bench.peers.environments import python_of
from moebound.bench.peers.settings import Peer
from moebound.bench.peers.text import CalibrationText
from moebound.checkpoint import Checkpoint, experts_name, open_checkpoint, read_tensor
from moebound.errors import MethodError, MoeboundError, UnsupportedArchitectureError
from moebound.files.documents import Format, fields_of, load_json, save_json
from moebound.files.durable import save_bytes

REQUEST = Format("moebound.peer.request", 1)
ANSWER = Format("moebound.peer.answer", 1, MethodError)
_SAID = 2000
"""Characters of what a program said last, for the message if it failed."""


@dataclass(frozen=True)
class Made:
    """What a peer made. checkpoint: a plain folder, experts dequantized, all else as it was.
    n_bytes: of all that the experts are stored in. max_abs_error: in weight units. about: library,
    version, settings, bytes by part."""

    checkpoint: Path
    n_bytes: int
    max_abs_error: float
    about: Mapping[str, Any]


def is_answered(peer: Peer, work: Path) -> bool:
    """Whether there is an answer in `work`, whatever it is of."""
    return (_folder(peer, work) / "answer" / "peer.json").exists()


def run_peer(
    peer: Peer,
    checkpoint: Checkpoint,
    text: CalibrationText,
    work: Path,
    *,
    environments: Path | None = None,
) -> Made:
    """Quantize the experts of a checkpoint, or take what is kept in `work`.

    Raises BackendUnavailable if its environment is not there, UnsupportedArchitectureError for
    experts that the checkpoint keeps in one tensor, and MethodError if it fails or gives something
    else than was asked, such as other weights where no expert is.
    """
    folder = _folder(peer, work)
    request = _request(peer, checkpoint, text)
    answer = folder / "answer"
    if not _kept(folder, request):
        python = python_of(peer.environment, environments, f"peer {peer.setting}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_bytes(folder / "tokens.json", json.dumps(text.rows).encode())
        save_bytes(folder / "importance.safetensors", to_safetensors(dict(text.importance)))
        save_json(folder / "request.json", request)
        _run([str(python), str(peer.program), str(folder), str(answer)], folder / "log.txt", peer)
    return _checked(peer, checkpoint, answer)


def _folder(peer: Peer, work: Path) -> Path:
    return work / peer.setting.replace(":", "-")


def _request(peer: Peer, checkpoint: Checkpoint, text: CalibrationText) -> dict[str, Any]:
    experts = []
    for expert in checkpoint.experts():
        for matrix in expert.matrices:
            if matrix.index is not None or matrix.transposed or matrix.role == "gate_up":
                raise UnsupportedArchitectureError(
                    f"{checkpoint.path}: tensor {matrix.name!r} has several matrices in one, or "
                    "one that is turned; peers are given checkpoints with a tensor [out, in] for "
                    "each expert's gate, up and down"
                )
            experts.append(
                {
                    "name": matrix.name,
                    "layer": expert.key.layer,
                    "expert": expert.key.expert,
                    "role": matrix.role,
                }
            )
    return {
        **REQUEST.header,
        "checkpoint": str(checkpoint.path.resolve()),
        "model": experts_name(checkpoint),
        "text_sha256": text.sha256,
        "setting": dict(peer.asked),
        "experts": experts,
    }


def _kept(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether this was asked before and answered: where the checkpoint lies is no matter."""
    try:
        before = load_json(folder / "request.json")
    except MoeboundError:
        return False
    same = isinstance(before, dict) and before | {"checkpoint": ""} == {**request, "checkpoint": ""}
    return same and (folder / "answer" / "peer.json").exists()


def _run(command: list[str], log: Path, peer: Peer) -> None:
    # Waiting threads that spin take the time of those that work.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # ours would stand before theirs
    with open(log, "wb") as out:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-_SAID:]
        raise MethodError(
            f"peer {peer.setting}: its program ended with {done.returncode}; all that it said is "
            f"in {log}, which ends with:\n{said}"
        )


def _checked(peer: Peer, checkpoint: Checkpoint, answer: Path) -> Made:
    """What was answered, if it is one: experts of the shapes and dtypes that they had, and all
    other tensors bit for bit. Raises MethodError."""
    where = f"peer {peer.setting}: {answer / 'peer.json'}"
    said = load_json(answer / "peer.json")
    ANSWER.check(said, where)
    with fields_of(where, MethodError):
        n_bytes = said["n_bytes"]
        about = {
            name: said[name]
            for name in ("library", "library_version", "settings", "parts", "remarks")
        }
    if type(n_bytes) is not int or n_bytes < 1:
        raise MethodError(f"{where}: n_bytes: expected a whole number above 0, found {n_bytes!r}")
    made = open_checkpoint(answer / "checkpoint")
    if set(made.tensors) != set(checkpoint.tensors):
        other = sorted(set(made.tensors) ^ set(checkpoint.tensors))
        raise MethodError(
            f"peer {peer.setting}: {made.path}: expected the tensors of {checkpoint.name}, found "
            f"{len(other)} too many or too few, as {other[0]!r}"
        )
    for before in checkpoint.passthrough():
        after = made.tensors[before.name]
        same = (before.dtype, before.shape) == (after.dtype, after.shape)
        if not same or read_tensor(before).tobytes() != read_tensor(after).tobytes():
            raise MethodError(
                f"peer {peer.setting}: {made.path}: changed {before.name!r}, which is no routed "
                "expert's: only experts may differ from the original"
            )
    error = 0.0
    for expert in checkpoint.experts():
        for matrix in expert.matrices:
            after = made.tensors[matrix.name]
            if (after.dtype, after.shape) != (matrix.dtype, matrix.shape):
                raise MethodError(
                    f"peer {peer.setting}: {made.path}: {matrix.name!r}: expected {matrix.dtype} "
                    f"{list(matrix.shape)}, found {after.dtype} {list(after.shape)}"
                )
            off = read_tensor(after).astype(np.float64) - checkpoint.read(matrix).astype(np.float64)
            error = max(error, float(np.abs(off).max()))
    if not np.isfinite(error):
        raise MethodError(f"peer {peer.setting}: {made.path}: has weights that are not finite")
    return Made(answer / "checkpoint", n_bytes, error, about)
