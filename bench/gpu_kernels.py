"""Compile every kernel of codec/device for GPUs that need not be here, and record what they use.

    python bench/gpu_kernels.py

Writes bench/results/gpu-kernels.json: registers, shared memory and spills as the bundled cuobjdump
reports them, and how many instructions one step of a loop has in the bundled nvdisasm's listing.
"""

from __future__ import annotations

import json
from pathlib import Path

import triton

from moebound.bench.gpu.compiled import compile_all

RESULTS = Path(__file__).parent / "results" / "gpu-kernels.json"


def main() -> None:
    found = compile_all()
    document = {
        "format": 1,
        "triton": triton.__version__,
        "kernels": [kernel.to_json() for kernel in found],
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{'kernel':<18} {'variant':<18} {'sm':>3} {'registers':>9} {'shared':>6} {'spilled':>7} "
          f"{'loop':>5}")  # fmt: skip
    for k in found:
        print(f"{k.kernel:<18} {k.variant:<18} {k.capability:>3} {k.registers:>9} "
              f"{k.shared_bytes:>6} {k.spilled_bytes:>7} {k.loop_instructions:>5}")  # fmt: skip


if __name__ == "__main__":
    main()
