"""Run the offloading benchmark on a GPU, after `bench/gpu.sh` has built the package: a script.

python bench/offload_gpu.py OUT [layers]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from moebound.bench.offload import Settings, render_offload, run
from moebound.bench.offload.model import Shapes


def main(out: Path, layers: int) -> None:
    settings = Settings(
        shapes=Shapes(layers=layers), codec="bound:segment=gpu", budgets=(0.15, 0.5),
        tiers=("ram", "disk"), device="cuda", peers=("stock",), tokens=48, warm=16, prompt=16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        report = run(settings, Path(work), say=lambda *step: print(*step, file=sys.stderr))
    (out / "offload_gpu.json").write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    Console(width=150).print(render_offload(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4)
