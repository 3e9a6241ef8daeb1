"""What every method costs on one layer of Moonlight's shapes: time, CPU time, memory.

    python bench/method_cost.py --work WORK > bench/results/method_cost.json
    python bench/method_cost.py --work WORK --methods svd:b3:f8,calibrated@0.94

One layer of 64 experts (2048 x 1408, bf16, random weights), and statistics of drawn tokens with
everything that a method can ask for. `moebound compress` runs for one method after the other,
each time in a process of its own with one thread: what is measured is the whole command. Behind an
@ stands the rate of a method that keeps a bound. Rows are kept in WORK, with the checkpoint and the
statistics (about 3 GB), and the same command goes on from them. JSON goes to stdout, a line for
each row to stderr.

On a machine that does other things as well, seconds of CPU say more than seconds on the clock. Peak
memory is what the system counts as resident: pages of the files that are read are among it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from calibrate_layer import measured, run
from moebound.bench.environment import describe
from moebound.bench.offload.model import Shapes, make_checkpoint
from moebound.files.formats.statistics import FILE
from moebound.files.rows import KEY, Rows

_KEEPING = ("frequency", "reap_re", "lu_re", "mone_re", "m_smoe_re", "hc_smoe_fixed", "sub_moe_re")
METHODS = (
    *("bounded:bound@0.32", "calibrated@0.94", "rtn:int3:g128", "rtn:int3:g128:coded"),
    *("moqe_re:int3", "gptq_re:int3:g128", "awq_re:int3:g128"),
    *(f"{name}:keep48+rtn:int4:g128" for name in _KEEPING),
    *("puzzle_moe_re:seed0", "puzzle_moe_re:seed0+rtn:int2:g128", "modegpt_re:b3:q4"),
    *("modegpt_re:k0.7+calibrated@0.5", "reap_re:keep48+calibrated@0.46"),
    *("resmoe_fixed:b3:f8:base5", "svd:b3:f8", "d2_moe_fixed:b3:f8:base5", "moe_i2_re:b3:f8"),
    *("milo_fixed:b4:i1", "soco_lite:b3:f8", "rfid_re:b3:f8", "mobe_fixed:b3:f8:s5"),
    *("residual:resmoe_fixed:k0:base4@0.32", "residual:d2_moe_fixed:r0:base3@0.32"),
    *("residual:svd:r2:f8@0.32", "reap_re:keep48", "hc_smoe_fixed:keep48"),
    *("milo_fixed:b4", "mobe_fixed:b3:f8"),
)
"""At about 3 bits a weight where a size can be chosen. Where experts are left out, 48 of 64 stay,
in 4 bits; of two methods as they are, too. The least that there is of MiLo and of PuzzleMoE."""
WINDOWS, LIMIT = 32, 600


def made(folder: Path, rows: Rows, experts: int) -> tuple[Path, Path]:
    """The checkpoint and the statistics, which are made if they are not there."""
    source, stats = folder / "source", folder / "stats"
    make_checkpoint(source, Shapes(layers=1, experts=experts))
    if not (stats / FILE).is_file():
        cost = run(
            sys.executable, str(Path(__file__).with_name("calibrate_layer.py")),
            "--calibrate", str(source), str(stats), "--windows", str(WINDOWS), "--search",
        )  # fmt: skip
        rows.append({KEY: "calibrate --search", **cost})
    return source, stats


def cost(asked: str, source: Path, stats: Path, folder: Path, limit: int) -> dict[str, Any]:
    """A method's row: what it took, or why there is no store."""
    setting, _, rate = asked.partition("@")
    with tempfile.TemporaryDirectory(dir=folder) as store:
        found = measured(
            sys.executable, "-m", "moebound", "compress", str(source), f"{store}/store",
            "--method", setting, *(["--rate", rate] if rate else []), "--calibration", str(stats),
            "--others", "keep", "--jobs", "1", "--json", limit=limit,
        )  # fmt: skip
    code, out, err = (found.pop(name) for name in ("code", "out", "err"))
    row = {"method": setting, "rate": float(rate) if rate else None, **found}
    if code == 0:
        said = json.loads(out)
        return row | {
            "bits_per_weight": said["expert_bits_per_weight"],
            "guarantee": said["guarantee"],
            "rmse": said["rmse"],
        }
    said = err.strip().splitlines()
    last = [line for line in said if line.startswith("Error")] or said or [f"exit code {code}"]
    over = found["cpu_seconds"] >= 0.9 * limit
    return row | {"reason": f"not done within {limit} s of CPU" if over else last[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--methods", default=",".join(METHODS), help="settings, or setting@rate")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of CPU for a method")
    parser.add_argument("--experts", type=int, default=64)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    args.work.mkdir(parents=True, exist_ok=True)
    with Rows(args.work / "rows.jsonl") as rows:
        source, stats = made(args.work, rows, args.experts)
        for asked in filter(None, args.methods.split(",")):
            if asked not in rows.found:
                row = cost(asked, source, stats, args.work, args.limit)
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append({KEY: asked, "load_average": os.getloadavg()[0], **row})
        found = list(rows.found.values())
    shapes = Shapes(layers=1, experts=args.experts)
    print(json.dumps({
        "environment": describe(), "experts": shapes.experts, "threads": 1,
        "n_weights": shapes.experts * shapes.expert_weights, "tokens": WINDOWS * 512,
        "limit_cpu_seconds": args.limit, "rows": found,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
