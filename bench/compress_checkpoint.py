"""Compress a synthetic checkpoint with Moonlight's expert shapes: how fast, in how much memory?

    python bench/compress_checkpoint.py --gb 8.5 --json > bench/results/compress_checkpoint.json

Writes a checkpoint (DeepseekV3, experts of 3 x 2048 x 1408 bf16, rows of different scale), runs
`moebound compress`, `verify --against` and `decompress` on it in processes of their own, and
records wall time and peak resident memory of each. Beside them, from the same run: the interpreter
with nothing imported, reading the source once, the encoder alone on one thread and the encoder with
the certificate's check and hashes, all on experts that are in memory. Needs about three times --gb
of free disk under --dir.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moebound.bench.environment import describe
from moebound.checkpoint import ShardWriter, TensorSpec, open_checkpoint, read_chunks, write_index
from moebound.codec import encode, encode_certified
from moebound.types import NUMPY_DTYPES, Array, ErrorBound

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 1408, 64
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 1024,
    "dtype": "bfloat16",
}


def weights(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Gaussian, rows log-normally scaled by 0.3, about the size of trained weights; bf16."""
    rows = np.exp(0.3 * rng.standard_normal((shape[0], 1), np.float32))
    values = 0.02 * rows * rng.standard_normal(shape, np.float32)
    scaled: Array = values.astype(NUMPY_DTYPES["BF16"])
    return scaled


def make_checkpoint(folder: Path, n_bytes: float) -> int:
    """Write whole MoE layers until n_bytes are reached; returns how many layers."""
    rng = np.random.default_rng(0)
    # Experts are rolled copies of a few: their bits cost as much to code as fresh ones.
    pool = {name: [weights(rng, shape) for _ in range(3)] for name, shape in SHAPES.items()}
    expert_bytes = 3 * HIDDEN * INTERMEDIATE * 2
    n_layers = max(1, round(n_bytes / (EXPERTS * expert_bytes)))
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for layer in range(1, n_layers + 1):
        names = {
            f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": (e, name)
            for e in range(EXPERTS)
            for name in SHAPES
        }
        file = f"model-{layer:05d}-of-{n_layers:05d}.safetensors"
        specs = [TensorSpec(n, "BF16", SHAPES[name]) for n, (_, name) in names.items()]
        with ShardWriter(folder / file, specs) as out:
            for tensor, (e, name) in names.items():
                rolled = np.roll(pool[name][e % 3], 64 * layer + e, axis=0)
                out.write(tensor, rolled.tobytes())
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map, n_layers * EXPERTS * expert_bytes)
    config = CONFIG | {"num_hidden_layers": n_layers + 1}
    (folder / "config.json").write_text(json.dumps(config))
    return n_layers


# A process begins with the peak of the one that forked it, so a small one starts and measures it.
MEASURE = """
import json, resource, subprocess, sys, time
begun = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": code, "seconds": seconds, "peak_mib": peak / 1024}))
"""


def run(*command: str) -> dict[str, float]:
    """Wall seconds and peak resident MiB of one process."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    if found.pop("code"):
        raise SystemExit(f"{' '.join(command)} failed")
    return found


def rate(work: Callable[[], object], n: int, repeats: int = 5) -> float:
    """The median of n / seconds."""
    work()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        found.append(n / (time.perf_counter() - begun))
    return float(np.median(found))


def limits(source: Path, bound: ErrorBound) -> dict[str, float]:
    """What bounds the job: reading the source, and the encoder on one thread."""
    checkpoint = open_checkpoint(source)
    begun = time.perf_counter()
    for tensor in checkpoint.tensors.values():
        for _ in read_chunks(tensor):
            pass
    read_gb_s = checkpoint.total_bytes / 1e9 / (time.perf_counter() - begun)
    array = checkpoint.read(checkpoint.experts()[0].matrices[0])
    os.environ["MOEBOUND_THREADS"] = "1"
    encoder = rate(lambda: encode(array, bound), array.size)
    certified = rate(lambda: encode_certified(array, bound), array.size)
    del os.environ["MOEBOUND_THREADS"]
    return {
        "read_source_gb_s": read_gb_s,
        "encoder_one_thread_gweights_s": encoder / 1e9,
        "encoder_with_certificate_one_thread_gweights_s": certified / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8.5, help="expert bytes to make, in 10^9")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--dir", type=Path, help="where to work; a temporary folder if left out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a summary")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moebound-", dir=args.dir))
    try:
        source, store, plain = folder / "source", folder / "store", folder / "plain"
        n_layers = make_checkpoint(source, args.gb * 1e9)
        n_weights = n_layers * EXPERTS * 3 * HIDDEN * INTERMEDIATE
        moebound = [sys.executable, "-m", "moebound"]
        result: dict[str, Any] = {
            "environment": describe(),
            "rate": args.rate,
            "n_experts": n_layers * EXPERTS,
            "n_weights": n_weights,
            "source_gb": 2 * n_weights / 1e9,
            "limits": limits(source, ErrorBound(args.rate, "rate")),
            "interpreter": run(sys.executable, "-c", "pass"),
            "compress": run(
                *moebound, "compress", str(source), str(store), "--rate", str(args.rate), "--json"
            ),
            "verify_against": run(
                *moebound, "verify", str(store), "--against", str(source), "--json"
            ),
            "decompress": run(*moebound, "decompress", str(store), str(plain), "--json"),
            "store_gb": sum(f.stat().st_size for f in store.iterdir()) / 1e9,
        }
    finally:
        shutil.rmtree(folder)
    result["compress"]["gweights_s"] = n_weights / 1e9 / result["compress"]["seconds"]
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for job in ("interpreter", "compress", "verify_against", "decompress"):
        print(
            f"{job:>15}: {result[job]['seconds']:7.1f} s, peak {result[job]['peak_mib']:6.0f} MiB"
        )
    print(json.dumps(result["limits"] | {"compress": result["compress"]["gweights_s"]}, indent=1))


if __name__ == "__main__":
    main()
