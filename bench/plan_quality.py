"""What a plan is worth: KL of planned and of uniform bounds at the same size, on held-out problems.

    python bench/plan_quality.py map.json --task wordmath-hard --skip 64 --limit 200 > rows.json

map.json: of `moebound sensitivity`; --skip leaves out the problems that it was made with. Every row
is a real store, verified, loaded and read. Beside its KL stand the plan's own figures: predicted
from the map, and measured as `moebound plan` does, on --measure problems behind the held-out ones.
Rows go to stdout as JSON, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moebound.bench.environment import describe
from moebound.bench.quality import in_a_store
from moebound.checkpoint import open_checkpoint
from moebound.evaluate.candidate import Original, in_folder, score
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import load
from moebound.evaluate.text import solved_rows
from moebound.files.formats.sensitivity_map import FORMAT
from moebound.plan import Budget, Evidence, Scheme, make_plan
from moebound.sensitivity.trial import N_PROBLEMS, Trial
from moebound.store import measure_sizes
from moebound.tasks import get_task
from moebound.wordmath.builtin import resolve

SCHEMES: tuple[Scheme, ...] = ("uniform", "layer", "sensitivity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("map", type=Path)
    parser.add_argument("--src", default="builtin:wordmath", help="the model that the map is of")
    parser.add_argument("--task", default="wordmath-hard")
    parser.add_argument("--bpw", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--skip", type=int, default=64)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--measure", type=int, default=N_PROBLEMS)
    args = parser.parse_args()

    document = FORMAT.read(args.map)
    checkpoint, loaded = open_checkpoint(resolve(args.src)), load(args.src)
    task = get_task(args.task)
    problems = task.problems(args.skip + args.limit + args.measure)[args.skip :]
    problems, others = problems[: args.limit], problems[args.limit :]
    trial = Trial.of(loaded, task, others)
    rows_read = solved_rows(loaded.tokenizer, task, problems)
    original = Original(loaded.model, Baseline.of(loaded.model, rows_read))
    sizes = measure_sizes(checkpoint)
    rows = []
    for bpw in args.bpw:
        for scheme in SCHEMES:
            print(f"{bpw:g} bits, {scheme}", file=sys.stderr)
            evidence = Evidence(sensitivity=document)
            plan = make_plan(
                sizes,
                evidence,
                Budget(bpw=bpw),
                source=args.src,
                scheme=scheme,
                measure=trial.measure,
            )
            assert plan.measured is not None
            with in_a_store(checkpoint, plan) as (folder, about):
                found = score(in_folder(folder), original).score
            rows.append(
                {
                    "bpw": bpw,
                    "scheme": scheme,
                    "bits_per_weight": 8 * about["n_bytes"] / about["n_weights"],
                    "predicted_kl": plan.kl,
                    "plan_measured_kl": plan.measured.kl,
                    "plan_measured_stderr": plan.measured.stderr,
                    "largest_rate": about["largest_rate"],
                    **found.to_json(),
                }
            )
    about_run = {
        "source": args.src,
        "task": args.task,
        "skipped": args.skip,
        "n_problems": len(problems),
        "n_measured_on": len(others),
    }
    print(json.dumps({**about_run, "rows": rows, "environment": describe()}, indent=1))


if __name__ == "__main__":
    main()
