"""One layer of Moonlight's shapes, calibrated and compressed: how long, in how much memory?

    python bench/calibrate_layer.py --memory 2147483648 --json > bench/results/calibrate_layer.json

Writes a checkpoint with one layer of 64 experts (2048 x 1408, bf16, 6 of them a token), reads a
text of drawn tokens through it as `moebound calibrate` does, and runs `moebound compress --method
calibrated` and `moebound verify --against --calibration` on it, each in a process of its own: wall
seconds, seconds of CPU, peak resident memory. Needs about 3 GB of free disk under --dir.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moebound.bench.environment import describe
from moebound.bench.offload.model import Shapes, make_checkpoint
from moebound.bench.offload.text import drawn_ids

WINDOW = 512

# A process begins with the peak of the one that forked it, so a small one starts and measures it.
# Beyond its seconds of CPU the system ends it with a signal.
MEASURE = """
import json, resource, subprocess, sys, time
limit, command, begun = int(sys.argv[1]), sys.argv[2:], time.perf_counter()
if limit:
    command = ["sh", "-c", f'ulimit -t {limit}; exec "$@"', "sh", *command]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
seconds, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"code": done.returncode, "seconds": seconds, "peak_mib": used.ru_maxrss / 1024,
                  "cpu_seconds": used.ru_utime + used.ru_stime,
                  "out": done.stdout, "err": done.stderr}))
"""


def measured(*command: str, limit: int = 0) -> dict[str, Any]:
    """Wall and CPU seconds and peak resident MiB of one process, its exit code, and what it wrote
    (`out`, `err`). limit: seconds of CPU that it is given; 0 for all it wants."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, str(limit), *command],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(*command: str) -> dict[str, float]:
    """Of one process that has to succeed: seconds, CPU seconds, peak MiB."""
    found = measured(*command)
    if found["code"]:
        raise SystemExit(f"{found['err']}{' '.join(command)} failed")
    return {name: found[name] for name in ("seconds", "cpu_seconds", "peak_mib")}


def calibrate(
    source: Path, stats: Path, windows: int, memory: int, dtype: str, search: bool = False
) -> None:
    """What the command does, on tokens that no tokenizer made: this model has none."""
    from moebound.calibrate import Settings, Text, collect
    from moebound.evaluate.loading import Loaded, Source
    from moebound.model.dtypes import parse_dtype
    from moebound.model.pretrained import load_model

    model = load_model(source, dtype=parse_dtype(dtype))
    ids = drawn_ids(Shapes().vocab, windows * WINDOW).reshape(windows, WINDOW)
    text = Text("drawn", tuple(tuple(row) for row in ids.tolist()))
    collect(
        Loaded(model, None, Source("one layer", "checkpoint", dtype, "its own")), text, stats,
        Settings(memory=memory, search=search),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW} tokens each")
    parser.add_argument("--rate", type=float, default=0.7)
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes of H held at once")
    parser.add_argument("--dtype", default="bfloat16", help="what the model computes with")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dir", type=Path, help="where to work; a temporary folder if left out")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a summary")
    parser.add_argument("--search", action="store_true", help="with --calibrate, as there")
    parser.add_argument("--calibrate", nargs=2, type=Path, metavar=("SRC", "STATS"),
                        help="only that, in this process")  # fmt: skip
    args = parser.parse_args()
    if args.calibrate:
        source, stats = args.calibrate
        calibrate(source, stats, args.windows, args.memory, args.dtype, args.search)
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = Path(tempfile.mkdtemp(prefix="moebound-", dir=args.dir))
    try:
        shapes = Shapes(layers=1, experts=args.experts)
        source = make_checkpoint(folder / "source", shapes)
        stats, store = folder / "stats", folder / "store"
        moebound = [sys.executable, "-m", "moebound"]
        result: dict[str, Any] = {
            "environment": describe(),
            "experts": shapes.experts,
            "n_weights": shapes.experts * shapes.expert_weights,
            "tokens": args.windows * WINDOW,
            "rate": args.rate,
            "load_average": os.getloadavg()[0],
            "calibrate": run(
                sys.executable, __file__, "--calibrate", str(source), str(stats),
                "--windows", str(args.windows), "--memory", str(args.memory),
                "--dtype", args.dtype,
            ),
            "compress": run(
                *moebound, "compress", str(source), str(store), "--method", "calibrated",
                "--rate", str(args.rate), "--calibration", str(stats), "--json",
            ),
        }  # fmt: skip
        if not args.no_verify:
            result["verify"] = run(
                *moebound, "verify", str(store), "--against", str(source),
                "--calibration", str(stats), "--json",
            )  # fmt: skip
        result["store_bytes"] = sum(f.stat().st_size for f in store.iterdir())
    finally:
        shutil.rmtree(folder)
    jobs = [result["calibrate"], result["compress"]]
    result["both"] = {
        "seconds": sum(job["seconds"] for job in jobs),
        "cpu_seconds": sum(job["cpu_seconds"] for job in jobs),
        "peak_mib": max(job["peak_mib"] for job in jobs),
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for job in ("calibrate", "compress", "both", "verify"):
        if job in result:
            found = result[job]
            print(
                f"{job:>10}: {found['seconds']:6.1f} s, {found['cpu_seconds']:6.1f} s of CPU, "
                f"peak {found['peak_mib']:5.0f} MiB"
            )


if __name__ == "__main__":
    main()
