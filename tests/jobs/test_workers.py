"""Processes that work: what they leave when they are told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import pytest

from moebound.errors import MoeboundError
from moebound.jobs.workers import Opening, Processes


class Holds:
    """Begins a folder and a process, as who makes a store does."""

    def __init__(self, threads: int | None, folder: Path) -> None:
        del threads
        self.folder = folder

    def run(self, _: None) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as own:
            says = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
            subprocess.run([sys.executable, "-c", says, f"{own}/begun"], check=False)


class ToldWithin(Holds):
    """Is told to end where Python drops what is raised: in the callback of a weak reference."""

    def run(self, _: None) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder):
            thing = set[int]()
            told = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            del thing
            assert told() is None
            time.sleep(60)


def test_a_worker_that_is_told_to_end_takes_its_work_with_it(tmp_path: Path) -> None:
    begun = time.monotonic()
    with Processes(Opening(Holds, {"folder": tmp_path}), 1) as workers:
        workers._grow(1)[0].send("run", None)
        while not list(tmp_path.glob("*/begun")):
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_told_where_that_is_lost_ends_quietly_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Processes(Opening(ToldWithin, {"folder": tmp_path}), 1) as workers:
        worker = workers._grow(1)[0]
        worker.send("run", None)
        with pytest.raises(MoeboundError, match="ended with exit code 143 "):
            worker.receive()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""
