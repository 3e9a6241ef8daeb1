"""What long work says of itself where no terminal watches."""

from __future__ import annotations

import sys

import pytest

from moebound.cli.output import Output
from moebound.cli.progress import progress_bar
from moebound.store import Progress


def steps(output: Output) -> None:
    with progress_bar(output, "compressing") as say:
        for n in (1, 2, 4):
            if say is not None:
                say(Progress(n * 10**9, 4 * 10**9, n, 4, f"layer {n}"))


def test_a_log_shows_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 5.0, 30.0, 60.0])
    monkeypatch.setattr("moebound.cli.progress.time.monotonic", lambda: next(clock))
    steps(Output(False, False, sys.stdout))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "compressing layer 2: 2 of 4 experts, 2.0 GB of 4.0 GB; 1 min left",
        "compressing layer 4: 4 of 4 experts, 4.0 GB of 4.0 GB",
    ]


def test_short_work_and_quiet_work_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    steps(Output(False, False, sys.stdout))
    steps(Output(False, True, sys.stdout))
    assert capsys.readouterr().err == ""
