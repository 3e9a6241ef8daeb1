"""What each command would take with a model that is not here, by rates that were measured.

Rates are of one machine with two cores, of checkpoints and layers as in `bench/results/`; a step
takes the model's weights at that rate, divided among machines by the parts it can be cut into.
Nothing is tried on the model itself, and disks and networks are taken to be fast enough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moebound.fit.estimate import PLAIN_BYTES, Estimate
from moebound.fit.shape import Shape
from moebound.store.layout import SHARD_BYTES

# bench/results/compress_checkpoint.json: 512 experts of 3 x 2048 x 1408 weights, rate 0.3.
CHECKPOINT_WEIGHTS = 4_429_185_024
COMPRESS_S, VERIFY_S, DECOMPRESS_S = 24.831159317999663, 39.778861419999885, 86.82013200199981
COMPRESS_MIB, VERIFY_MIB, DECOMPRESS_MIB = 132.015625, 120.30859375, 90.1640625
_MEASURED_EXPERT = CHECKPOINT_WEIGHTS // 512
# bench/results/calibrate_layer.json: method calibrated on 64 of them.
CALIBRATED_WEIGHTS, CALIBRATED_CPU_S = 553_648_128, 134.674081
CALIBRATED_MIB = 1324.046875
CORES = 2
_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Step:
    """seconds: None where no rate was measured at this size. memory: bytes, of one machine. disk:
    bytes that it writes. parts: into how many it can be cut, each a machine's. remark: what else
    there is to say."""

    name: str
    seconds: float | None
    memory: int
    disk: int
    parts: int
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def road(shape: Shape, sizes: Estimate, *, machines: int = 1, h_memory: int = _GIB) -> list[Step]:
    """From a checkpoint in bfloat16 to a store and back. sizes: at the rate that is asked for.
    h_memory: `calibrate --memory`, bytes."""
    whole = PLAIN_BYTES * shape.n_weights
    shards = -(-whole // SHARD_BYTES)
    larger = shape.expert_size / _MEASURED_EXPERT

    def step(name: str, seconds: float, weights: int, mib: float, disk: int, spread: bool) -> Step:
        parts = shards if spread else 1
        took = seconds * shape.n_expert_weights / weights / min(machines, parts)
        # What was measured held a few experts; these are larger.
        return Step(name, took, int(mib * _MIB * max(1.0, larger)), disk, parts)

    width, inner = shape.expert[-1]
    moments = width**2 + inner**2
    n_experts = shape.layers * shape.n_experts
    packed = 4 * (width * (width + 1) // 2 + inner * (inner + 1) // 2)
    passes = -(-n_experts // max(1, h_memory // (4 * moments)))
    return [
        step("compress --rate", COMPRESS_S, CHECKPOINT_WEIGHTS, COMPRESS_MIB,
             sizes.model_bytes, True),
        step("verify --against", VERIFY_S, CHECKPOINT_WEIGHTS, VERIFY_MIB, 0, False),
        step("decompress", DECOMPRESS_S, CHECKPOINT_WEIGHTS, DECOMPRESS_MIB, whole, False),
        Step("calibrate", None, whole + h_memory, n_experts * packed, passes,
             f"the model in bfloat16 in memory, and the text read {passes} times"),
        Step("calibrate --diagonal", None, whole + h_memory, 4 * n_experts * (width + inner),
             -(-n_experts // max(1, h_memory // (4 * (width + inner)))),
             "the model in bfloat16 in memory"),
        step("compress --method calibrated", CALIBRATED_CPU_S / CORES, CALIBRATED_WEIGHTS,
             CALIBRATED_MIB, sizes.model_bytes, True),
        Step("sensitivity", None, 2 * whole, 0, shape.layers,
             "the model in float32 in memory; by layer"),
    ]  # fmt: skip
