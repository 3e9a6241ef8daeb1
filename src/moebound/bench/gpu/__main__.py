"""`python -m moebound.bench.gpu OUT`: the benchmark into a folder, for a machine that is lent.

Writes OUT/gpu.json and OUT/gpu.txt. With --quick, all comparisons and few figures; with --profile,
only runs the decoder a few times, for a profiler to look at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from moebound.bench.gpu import GpuSettings, render_gpu, run
from moebound.bench.gpu.cases import encode_expert, expert
from moebound.bench.gpu.throughput import placed

QUICK = GpuSettings(rates=(0.3,), segments=(8192, 16384), experts=(1, 6))


def main(out: Path, settings: GpuSettings) -> None:
    report = run(settings, say=lambda text: print(text, file=sys.stderr))
    (out / "gpu.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    with (out / "gpu.txt").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=150, highlight=False)
        for table in render_gpu(report):
            console.print(table)


def profile() -> None:
    for kind in ("gaussian", "gaussian-rows-cols"):
        coded = encode_expert(expert(kind), kind, 0.3, 8192)
        there = placed(coded, 6)
        for _ in range(2):
            there.batch.launch(there.compressed, there.outs).check()


if __name__ == "__main__":
    if "--profile" in sys.argv:
        profile()
    else:
        main(Path(sys.argv[1]), QUICK if "--quick" in sys.argv else GpuSettings())
