"""Run the offloading benchmark on a GPU, after `bench/gpu.sh` has built the package: a script.

python bench/offload_gpu.py OUT [moonlight|mixtral]

Writes OUT/offload_gpu-NAME.json. Experts of Moonlight's size, 17 MB each in bfloat16, many and
small; or of Mixtral's, 352 MB each, few and large.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from moebound.bench.offload import OffloadSettings, render_offload, run
from moebound.bench.offload.model import Shapes

CASES = {
    "moonlight": (Shapes(layers=2), 0.11),
    "mixtral": (Shapes(layers=1, experts=8, hidden=4096, intermediate=14336, top_k=2), 0.4),
}


def main(out: Path, name: str) -> None:
    shapes, budget = CASES[name]
    settings = OffloadSettings(
        shapes=shapes, codec="bound:segment=gpu", budgets=(budget,), tiers=("ram", "device"),
        device="cuda", peers=(), tokens=64, warm=16, prompt=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        report = run(settings, Path(work), say=lambda *step: print(*step, file=sys.stderr))
    text = json.dumps(report.to_json(), indent=1)
    (out / f"offload_gpu-{name}.json").write_text(text, encoding="utf-8")
    Console(width=150).print(render_offload(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "moonlight")
