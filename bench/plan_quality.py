"""What a plan is worth: KL of planned and of uniform bounds at the same size, on held-out problems.

    python bench/plan_quality.py map.json --task wordmath-hard --skip 64 --limit 200 > rows.json
    python bench/plan_quality.py map.json --calibration stats --search 96 --skip 0 --limit 200 \
        --work searches > rows.json

map.json: of `moebound sensitivity`, one or more, say one of answers and one of all tokens; --skip
leaves out the problems that they were made with. Every row is a real store, verified, loaded and
read, over all tokens and over those of answers. Beside its KL stand the plan's own figures:
predicted from the map, and measured as `moebound plan` does, on --measure problems behind the
held-out ones. "Bound planned" is by the first map. --search adds plans that are searched for on the
model, and --calibration rows of method calibrated, with one rate and searched for; searches read
--search-problems others, and keep what they measured in --work. --fisher adds method calibrated by
other statistics, of `calibrate --fisher`, and the plan by them. Rows go to stdout as JSON, a table
and progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moebound.bench.environment import describe
from moebound.bench.quality import in_a_store
from moebound.checkpoint import Checkpoint, experts_name, open_checkpoint
from moebound.evaluate.candidate import Original, in_folder, score
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.text import solved_rows
from moebound.files.documents import Document
from moebound.files.formats.sensitivity_map import FORMAT, SensitivityMap
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.plan import Budget, Evidence, ExpertSizes, Plan, Scheme, Search, make_plan
from moebound.plan.fisher import Widest
from moebound.score import Score, Tokens
from moebound.score.statistics import ratio_stderr
from moebound.sensitivity.trial import N_PROBLEMS, Trial, unread_by
from moebound.sensitivity.tries import Tries
from moebound.store import Encoded, Memo, fisher_bounds, measure_calibrated, measure_sizes
from moebound.tasks import Task, get_task
from moebound.tasks.base import Problem
from moebound.types import ExpertKey
from moebound.wordmath.builtin import resolve

BOUND, CALIBRATED = "bounded:bound", "calibrated"


def tokens_of(document: Document) -> Tokens:
    return SensitivityMap.of(document).tokens


@dataclass
class Bench:
    """One model, and the problems that each part of the work reads."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    loaded: Loaded
    maps: Sequence[Document]
    calibration: Statistics | None
    task: Task
    problems: Sequence[Problem]
    others: Sequence[Problem]
    work: Path
    fisher: Statistics | None = None

    @cached_property
    def memo(self) -> Memo:
        return Memo()

    @cached_property
    def original(self) -> Original:
        rows = solved_rows(self.loaded.tokenizer, self.task, self.problems)
        return Original(self.loaded.model, Baseline.of(self.loaded.model, rows))

    @cached_property
    def trial(self) -> Trial:
        return self._trial(self.others)

    @cached_property
    def searching(self) -> Trial:
        """On problems that nothing else reads."""
        far = self.args.skip + self.args.limit + self.args.measure
        if self.calibration is None:
            n = far + self.args.search_problems
            return self._trial(self.task.problems(n)[far:])
        n = self.args.measure + self.args.search_problems
        found = unread_by(self.loaded, self.calibration, self.task, n, skip=far)
        return self._trial(found[-self.args.search_problems :])

    @cached_property
    def widest(self) -> Widest | None:
        return None if self.fisher is None else fisher_bounds(self.checkpoint, self.fisher)

    def _trial(self, problems: Sequence[Problem]) -> Trial:
        return Trial.of(
            self.loaded, self.task, problems, tokens=self.args.tokens,
            calibration=self.calibration, memo=self.memo,
        )  # fmt: skip

    @cached_property
    def bound_sizes(self) -> list[ExpertSizes]:
        return measure_sizes(self.checkpoint)

    @property
    def known(self) -> Document | None:
        """The map of the tokens that are protected."""
        same = (found for found in self.maps if tokens_of(found) == self.args.tokens)
        return next(same, None)

    def rows(self) -> Iterator[tuple[str, Scheme, Document | None]]:
        """Methods, schemes, and the maps they go by."""
        known = self.known
        if not self.args.only_calibrated:
            yield BOUND, "uniform", self.maps[0]
            for document in self.maps:
                yield BOUND, "layer", document
                yield BOUND, "sensitivity", document
            if self.args.search:
                yield BOUND, "search", known
        if self.calibration is not None:
            yield CALIBRATED, "uniform", None
            if known is not None:
                yield CALIBRATED, "sensitivity", known
            if self.args.search:
                yield CALIBRATED, "search", known
        if self.fisher is not None:
            yield CALIBRATED, "fisher", None

    def calibration_of(self, scheme: Scheme) -> Statistics | None:
        return self.fisher if scheme == "fisher" else self.calibration

    def plan(
        self,
        method: str,
        scheme: Scheme,
        document: Document | None,
        bpw: float,
        sizes: list[ExpertSizes],
    ) -> Plan:
        evidence = Evidence(sensitivity=document)
        encoded: Callable[[Plan], dict[ExpertKey, int]] | None = None
        if method == CALIBRATED:
            calibration = self.calibration_of(scheme)
            evidence = Evidence(sensitivity=document, calibration=calibration)
            memo = self.memo if calibration is self.calibration else Memo()
            encoded = Encoded(self.checkpoint, calibration, memo=memo)
        search = None
        if scheme == "search":
            tries = Tries(
                lambda: self.searching,
                encoded or (lambda plan: {e.key: e.n_bytes for e in plan.experts}),
                self.work / f"{method.replace(':', '-')}-{bpw:g}",
                {"model": experts_name(self.checkpoint), "task": self.task.name,
                 "problems": self.args.search_problems, "tokens": self.args.tokens,
                 "calibration": self.calibration and self.calibration.of.to_json()},
            )  # fmt: skip
            encoded = tries.sizes if encoded is not None else None
            search = Search(tries, self.args.search, _say)
        found = make_plan(
            sizes, evidence, Budget(bpw=bpw), source=self.args.src, method=method, scheme=scheme,
            measure=None if scheme == "fisher" else self.trial.measure, encoded=encoded,
            search=search, widest=self.widest if scheme == "fisher" else None,
        )  # fmt: skip
        if search is not None:
            tries.close()
        return found


def _say(what: str, done: int, total: int) -> None:
    print(f"  [{done}/{total}] {what}", file=sys.stderr)


def ratio(found: Score, to: Score) -> dict[str, list[float]]:
    """KL over another's on the same problems, and its standard error."""
    sums = np.array(found.kl_sums), np.array(to.kl_sums)
    return {
        name: [float(a.sum() / b.sum()), ratio_stderr(a.tolist(), b.tolist())]
        for name, a, b in (
            ("all", sums[0][:, 0], sums[1][:, 0]),
            ("answers", sums[0][:, 1], sums[1][:, 1]),
        )
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """KL in 1e-5 nats a token, ± one standard error."""
    lines = [
        "| bits a weight | method | scheme | map of | KL, all tokens | to one rate | "
        "to bound planned | KL, answers | to one rate | to bound planned |",
        "|" + "---|" * 10,
    ]

    def of(row: Mapping[str, Any], name: str) -> str:
        return f"{1e5 * row[name + '_nats']:.1f} ± {1e5 * row[name + '_stderr']:.1f}"

    def part(row: Mapping[str, Any], to: str, tokens: str) -> str:
        found = row[to]
        return "" if found is None else f"{found[tokens][0]:.2f} ± {found[tokens][1]:.2f}"

    for row in rows:
        cells = [
            f"{row['bits_per_weight']:.3f}", row["method"], row["scheme"], row["map_tokens"] or "",
            of(row, "kl"), part(row, "to_uniform", "all"), part(row, "to_planned_bound", "all"),
            of(row, "answer_kl"), part(row, "to_uniform", "answers"),
            part(row, "to_planned_bound", "answers"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps", type=Path, nargs="*", metavar="map.json")
    parser.add_argument("--src", default="builtin:wordmath", help="the model that the maps are of")
    parser.add_argument("--task", default="wordmath-hard")
    parser.add_argument("--bpw", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--skip", type=int, default=64)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--measure", type=int, default=N_PROBLEMS)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--fisher", type=Path)
    parser.add_argument("--only-calibrated", action="store_true")
    parser.add_argument("--search", type=int, default=0, help="measurements of each search")
    parser.add_argument("--search-problems", type=int, default=128)
    parser.add_argument("--tokens", choices=["all", "answers"], default=None,
                        help="what searches protect; default: as the one map, or all")  # fmt: skip
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()

    maps = [FORMAT.read(path) for path in args.maps]
    args.tokens = args.tokens or (tokens_of(maps[0]) if len(maps) == 1 else "all")
    if not maps and not args.only_calibrated:
        parser.error("without a map: only with --only-calibrated")
    checkpoint, loaded = open_checkpoint(resolve(args.src)), load(args.src)
    calibration = None if args.calibration is None else read_statistics(args.calibration)
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), args.src)
    task = get_task(args.task)
    problems = task.problems(args.skip + args.limit + args.measure)[args.skip :]
    problems, others = problems[: args.limit], problems[args.limit :]
    if calibration is not None:
        others = unread_by(loaded, calibration, task, args.measure, skip=args.skip + args.limit)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        fisher = None if args.fisher is None else read_statistics(args.fisher)
        bench = Bench(
            args, checkpoint, loaded, maps, calibration, task, problems, others, work, fisher
        )
        rows = measured(bench)
    about_run = {
        "source": args.src,
        "task": args.task,
        "skipped": args.skip,
        "n_problems": len(problems),
        "n_measured_on": len(others),
        "searched": args.search,
        "search_problems": args.search_problems,
        "tokens": args.tokens,
        "calibration": None if calibration is None else calibration.of.to_json(),
        "fisher": None if fisher is None else fisher.of.to_json(),
    }
    print(table(rows), file=sys.stderr)
    print(json.dumps({**about_run, "rows": rows, "environment": describe()}, indent=1))


def measured(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for bpw in bench.args.bpw:
        calibrated: list[ExpertSizes] = []
        if bench.calibration is not None:
            calibrated = measure_calibrated(
                bench.checkpoint,
                bench.calibration,
                bits_per_weight=bpw,
                plain_rates=() if bench.known is None else SensitivityMap.of(bench.known).bounds,
            )
        scores: dict[tuple[str, Scheme], Score] = {}
        planned: Score | None = None
        for method, scheme, document in bench.rows():
            by = "" if document is None else tokens_of(document)
            print(f"{bpw:g} bits, {method}, {scheme} {by}", file=sys.stderr)
            sizes = calibrated if method == CALIBRATED else bench.bound_sizes
            if scheme == "fisher" and bench.fisher is not None:
                sizes = measure_calibrated(bench.checkpoint, bench.fisher, bits_per_weight=bpw)
            plan = bench.plan(method, scheme, document, bpw, sizes)
            options: dict[str, Any] = {}
            if method == CALIBRATED:
                options["calibration"] = bench.calibration_of(scheme)
            with in_a_store(bench.checkpoint, plan, **options) as (folder, about):
                found = score(in_folder(folder), bench.original).score
            scores[method, scheme] = found
            uniform = scores.get((method, "uniform"))
            if planned is None and (method, scheme) == (BOUND, "sensitivity"):
                planned = found
            rows.append(
                {
                    "bpw": bpw,
                    "method": method,
                    "scheme": scheme,
                    "map_tokens": by or None,
                    "bits_per_weight": 8 * about["n_bytes"] / about["n_weights"],
                    "predicted_kl": plan.kl,
                    "plan_measured_kl": plan.measured and plan.measured.kl,
                    "plan_measured_stderr": plan.measured and plan.measured.stderr,
                    "largest_rate": about["largest_rate"],
                    "to_uniform": None if uniform is None else ratio(found, uniform),
                    "to_planned_bound": None if planned is None else ratio(found, planned),
                    "search": plan.made.get("search"),
                    **found.to_json(),
                }
            )
    return rows


if __name__ == "__main__":
    main()
