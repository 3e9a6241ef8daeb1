"""A loaded model, named by some of its weights.

Files that are on disk hold each of these names, and what goes on with such a file compares them: so
none may change, and each takes what it always took.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from moebound.checkpoint.corners import name_of
from moebound.codec.arrays import to_numpy
from moebound.model.live import LiveExperts


def of_parameters(model: Any) -> str:
    """Of answers and profiles: about 4,096 values of every parameter that is in memory."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if parameter.device.type != "meta":  # offloaded
            digest.update(_some(parameter, 4096).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_state(model: torch.nn.Module) -> str:
    """Of studies: names, shapes, and about 64 values of every tensor, buffers too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = _some(tensor, 64)
        digest.update((values.float() if values.is_floating_point() else values).numpy().tobytes())
    return digest.hexdigest()[:32]


def of_corners(live: LiveExperts) -> str:
    """Of calibration statistics: what `checkpoint.corners` says of the model's checkpoint."""
    values: list[float] = []
    for expert in live.values():
        matrices = expert.matrices
        first, down = next(iter(matrices.values())), matrices["down"]
        values += [float(first[0, 0]), float(down[0, 0]), float(down[-1, -1])]
    return name_of(values)


def of_experts(live: LiveExperts) -> str:
    """Of sensitivity maps: the first row of every matrix of every expert."""
    digest = hashlib.sha256()
    for expert in live.values():
        for matrix in expert.matrices.values():
            digest.update(to_numpy(matrix[:1].contiguous()).tobytes())
    return digest.hexdigest()[:16]


def _some(tensor: torch.Tensor, n: int) -> torch.Tensor:
    """About n of its values, evenly spread."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // n)].cpu()
