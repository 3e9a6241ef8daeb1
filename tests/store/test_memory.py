"""Memory is that of a few experts, not of a shard, let alone of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moebound.checkpoint import ShardWriter, TensorSpec

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 1024, 1024, 32, 3
EXPERT_MIB = 3 * HIDDEN * INTERMEDIATE * 2 / 2**20

PROGRAM = """
import sys
from pathlib import Path
from moebound.checkpoint import open_checkpoint
from moebound.store import compress, decompress, verify
from moebound.types import ErrorBound

def peak():
    # Not ru_maxrss: that is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

src, dst, out = sys.argv[1:4]
checkpoint = open_checkpoint(src)
before = peak()
compress(checkpoint, dst, bound=ErrorBound(0.3, "rate", "expert"), codec=sys.argv[4], jobs=2)
compressing = peak() - before
assert verify(dst, against=checkpoint, jobs=2).ok
verifying = peak() - before
decompress(dst, out, jobs=2)
print(compressing, verifying, peak() - before)
"""


def _synthetic(folder: Path) -> int:
    """A Mixtral-shaped checkpoint of one shard, about 580 MB. Returns its bytes."""
    folder.mkdir()
    config = {
        "model_type": "mixtral", "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (1024, HIDDEN))]
    specs += [
        TensorSpec(
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight",
            "BF16",
            (INTERMEDIATE, HIDDEN),
        )
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for leaf in ("w1", "w2", "w3")
    ]
    values = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bf16, truncated
    with ShardWriter(folder / "model.safetensors", specs) as shard:
        for number, spec in enumerate(specs):
            cut = number * 2048 % len(block)
            shard.write(spec.name, block[cut:] + block[:cut])
        return shard.n_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory(tmp_path: Path) -> None:
    n_bytes = _synthetic(tmp_path / "src")
    assert n_bytes > 550_000_000
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            *(str(tmp_path / n) for n in ("src", "dst", "out")),
            "bound",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compressing, verifying, decompressing = map(float, done.stdout.split())
    # Two jobs, an expert being 6 MiB: a few of them each, and the allocator's slack.
    assert compressing < 24 * EXPERT_MIB
    assert verifying < 24 * EXPERT_MIB
    assert decompressing < 24 * EXPERT_MIB
    print(f"MiB above start: {compressing:.0f} {verifying:.0f} {decompressing:.0f}")
