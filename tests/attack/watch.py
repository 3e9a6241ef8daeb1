"""Workers that may crash, hang or eat memory, and who watches them.

A worker writes the seed it is at into a file that both have mapped, before each case; so whatever
becomes of it, the seed is known. It takes "first last" a line on stdin, and answers lines of JSON:
findings as they come, and a count of outcomes at the end of each batch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import Attack, Case, case_of, try_case

BATCH = 200
START_S = 300.0
KEPT_A_PLACE = 3
"""Findings of one place that are written down; all are counted."""


@dataclass
class Report:
    """outcomes: word -> cases. findings: those written down. places: place -> cases."""

    kind: str
    seed: int
    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "seed": self.seed, "cases": self.cases,
            "seconds": round(self.seconds, 1), "outcomes": dict(self.outcomes),
            "wrong": sum(self.places.values()), "places": dict(self.places),
            "findings": self.findings,
        }  # fmt: skip


def work(attack: Attack, at: Path) -> None:
    """A worker: cases as asked for on stdin. at: the file that says which seed it is at."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    limit_memory(attack.memory_bytes)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    kept = Counter[str]()
    with open(at, "r+b") as handle, mmap.mmap(handle.fileno(), 8) as seat:
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            outcomes = Counter[str]()
            for seed in range(*map(int, line.split())):
                seat[:] = seed.to_bytes(8, "little")
                case = case_of(attack, seed)
                outcome, wrong = try_case(attack, case)
                outcomes[outcome] += 1
                if wrong is not None:
                    kept[wrong.place] += 1
                    found = {"seed": seed, "place": wrong.place, "what": str(wrong)}
                    found["keep"] = kept[wrong.place] <= KEPT_A_PLACE
                    print(json.dumps({"finding": found}), file=replies, flush=True)
            print(json.dumps({"done": outcomes}), file=replies, flush=True)


def limit_memory(extra: int) -> None:
    """From now on, so much address space more than this process has."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


class _Worker:
    """A process that tries cases, seen from outside."""

    def __init__(self, attack: type[Attack], folder: Path) -> None:
        self._at = folder / "at"
        self._at.write_bytes(bytes(8))
        self._errors = open(folder / "stderr", "w+b")  # noqa: SIM115 - as long as the process
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "MOEBOUND_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", __package__, "--worker", attack.__module__, attack.__name__,
             str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )  # fmt: skip
        self._rest = b""

    def send(self, first: int, last: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first} {last}\n".encode())
        self._process.stdin.flush()

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line, None if there is none in time. Raises EOFError if it has ended."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    @property
    def seed(self) -> int:
        return int.from_bytes(self._at.read_bytes(), "little")

    @property
    def closed(self) -> bool:
        """Whether `end` was called."""
        return self._errors.closed

    def end(self) -> str:
        """How it ended; it is killed if it has not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        code = self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip()[-400:]
        self._errors.close()
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return f"{how} {words}".strip()

    def fate(self) -> str:
        """How it ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return self.end()


def run(
    attack: type[Attack],
    *,
    seed: int,
    count: int,
    jobs: int,
    findings: Path,
    time_limit_s: float | None = None,
    progress: Callable[[Report, int, float], None] = lambda report, count, seconds: None,
) -> Report:
    """Try the cases of seeds seed .. seed + count - 1. findings: the folder for what is wrong."""
    report, lock, begun = Report(attack.name, seed), threading.Lock(), time.monotonic()
    batches: queue.Queue[tuple[int, int]] = queue.Queue()
    size = max(1, min(BATCH, count // (4 * jobs)))
    for first in range(seed, seed + count, size):
        batches.put((first, min(first + size, seed + count)))

    def late() -> bool:
        return time_limit_s is not None and time.monotonic() - begun > time_limit_s

    def wrong(at: int, place: str, what: str, keep: bool) -> None:
        report.places[place] += 1
        written = sum(f["place"] == place for f in report.findings)
        if not keep or written >= KEPT_A_PLACE:
            return
        where = findings / f"{attack.name}-{at}"
        report.findings.append({"seed": at, "place": place, "what": what, "folder": str(where)})

    def one_batch(worker: _Worker, first: int, last: int) -> int:
        """Returns the seed to go on from; `last` unless the worker came to an end."""
        worker.send(first, last)
        seen, since = -1, time.monotonic()
        try:
            while True:
                line = worker.line(0.5)
                if line is None:
                    if worker.seed != seen:
                        seen, since = worker.seed, time.monotonic()
                    elif time.monotonic() - since > attack.limit_s:
                        what = f"not done after {attack.limit_s:g} s"
                        raise TimeoutError(what)
                    continue
                with lock:
                    if "finding" in line:
                        f = line["finding"]
                        wrong(f["seed"], f["place"], f["what"], f["keep"])
                    else:
                        report.outcomes.update(line["done"])
                        report.cases += last - first
                        progress(report, count, time.monotonic() - begun)
                        return last
        except (EOFError, TimeoutError) as error:
            at, hung = worker.seed, isinstance(error, TimeoutError)
            how = worker.end() if hung else worker.fate()
            with lock:
                outcome = "hang" if hung else "crash"
                place = outcome if hung else f"crash {how.split()[0]}"
                wrong(at, place, str(error) if hung else how, True)
                report.outcomes[outcome] += 1
                report.outcomes["before a crash or hang"] += at - first
                report.cases += at + 1 - first
            return at + 1

    def watch(number: int, root: Path) -> None:
        worker: _Worker | None = None
        started = 0
        try:
            while not late():
                try:
                    first, last = batches.get_nowait()
                except queue.Empty:
                    return
                while first < last and not late():
                    if worker is None:
                        folder = root / f"{number}-{started}"
                        folder.mkdir()
                        started += 1
                        worker = _Worker(attack, folder)
                        if worker.line(START_S) is None:
                            raise RuntimeError(f"a worker does not start: {worker.end()}")
                    first = one_batch(worker, first, last)
                    if worker.closed:
                        worker = None
        except EOFError:
            assert worker is not None
            failures.append(f"a worker does not start: {worker.fate()}")
        except BaseException as error:
            failures.append(f"{type(error).__name__}: {error}")
        finally:
            if worker is not None and not worker.closed:
                worker.end()

    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="attack-") as root:
        threads = [
            threading.Thread(target=watch, args=(number, Path(root))) for number in range(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise RuntimeError(failures[0])
    report.seconds = time.monotonic() - begun
    return report


def write_findings(attack: Attack, report: Report) -> None:
    """The bytes of what was found, drawn from its seed again: that alone harms nobody."""
    for found in report.findings:
        case: Case = case_of(attack, found["seed"])
        case.save(Path(found["folder"]), {"kind": attack.name, **found})
