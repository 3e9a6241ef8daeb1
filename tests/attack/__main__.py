"""The attack's command. Exit codes: 0 nothing found, 1 something found, 2 usage."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from .cases import Attack, Case, try_case
from .watch import Report, limit_memory, run, work, write_findings

KINDS = {  # and how many cases `all` tries
    "streams": ("streams", "Streams", 1_000_000),
    "arrays": ("streams", "Arrays", 100_000),
    "stores": ("stores", "Stores", 10_000),
    "certificates": ("stores", "Certificates", 10_000),
    "requests": ("requests", "Requests", 100_000),
}


def attack_class(kind: str) -> type[Attack]:
    """Imports what it attacks."""
    module, name, _ = KINDS[kind]
    found: type[Attack] = getattr(importlib.import_module(f".{module}", __package__), name)
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--worker"]:
        module, name, folder = arguments[1], arguments[2], Path(arguments[3])
        (folder / "work").mkdir()
        found: type[Attack] = getattr(importlib.import_module(module), name)
        work(found(folder / "work"), folder / "at")
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack",
        description="Mutated streams, stores, certificates, requests.",
    )
    parser.add_argument("kind", nargs="?", default="all", choices=["all", *KINDS])
    parser.add_argument("--count", type=int, help="cases of each kind; else " + ", ".join(
        f"{count} {kind}" for kind, (_, _, count) in KINDS.items()))  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the first; one a case, 0 if not given")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for each kind")
    parser.add_argument("--findings", type=Path, default=Path("attack-findings"), metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="try what was written there")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or options.seed < 0 or (options.count is not None and options.count < 1):
        parser.error("--jobs and --count: expected 1 or more; --seed: 0 or more")
    if options.replay is not None:
        try:
            return replay(options.replay)
        except OSError as error:
            parser.error(f"--replay {options.replay}: {error.strerror}")
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    reports = [_run(kind, options) for kind in kinds]
    wrong = sum(sum(report.places.values()) for report in reports)
    print(
        json.dumps({"ok": not wrong, "kinds": [report.to_json() for report in reports]}, indent=1)
    )
    return 1 if wrong else 0


def _run(kind: str, options: argparse.Namespace) -> Report:
    last = [0.0]

    def progress(report: Report, count: int, seconds: float) -> None:
        now = time.monotonic()
        if now - last[0] > 5:
            last[0] = now
            left = (count - report.cases) * seconds / max(1, report.cases)
            wrong = sum(report.places.values())
            print(f"{kind}: {report.cases} of {count}, {wrong} wrong, {left:.0f} s left",
                  file=sys.stderr, flush=True)  # fmt: skip

    report = run(
        attack_class(kind), seed=options.seed, count=options.count or KINDS[kind][2],
        jobs=options.jobs, findings=options.findings, time_limit_s=options.time_limit,
        progress=progress,
    )  # fmt: skip
    if report.findings:
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            write_findings(attack_class(kind)(Path(folder)), report)
    for found in report.findings:
        print(f"{kind} {found['seed']}: {found['place']}: {found['what']}", file=sys.stderr)
        again = f"python -m tests.attack --replay {found['folder']}"
        print(f"  again: {again}", file=sys.stderr)
    return report


def replay(folder: Path) -> int:
    """One finding, in this process: a crash is one, a hang is one."""
    kind, case = Case.load(folder)
    os.environ.update(MOEBOUND_THREADS="1", MALLOC_ARENA_MAX="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="attack-") as work_folder:
        attack = attack_class(kind)(Path(work_folder))
        limit_memory(attack.memory_bytes)
        outcome, wrong = try_case(attack, case)
    print(json.dumps({"ok": wrong is None, "kind": kind, "how": case.how, "outcome": outcome,
                      "what": None if wrong is None else str(wrong)}, indent=1))  # fmt: skip
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
