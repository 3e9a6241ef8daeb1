"""A rate for a size: `compress --bpw`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import MethodError, PlanError
from moebound.store import open_store, rate_within
from moebound.store.at_size import TOLERANCE, WIDEST
from moebound.types import ErrorBound

from .conftest import MakeSource, run

SRC = "builtin:wordmath"


@pytest.mark.parametrize("asked", [2.2, 5.0])
def test_the_size_is_met_from_below(asked: float, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SRC)
    rate = rate_within(checkpoint, asked)
    done = run(
        checkpoint.path, tmp_path / "dst", bound=ErrorBound(rate, "rate", "expert"), others="keep"
    )
    assert asked * (1 - 2 * TOLERANCE) <= done.expert_bits_per_weight <= asked


def test_of_chosen_experts_only(source: MakeSource, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"layers": {1}, "experts": {0, 2}}
    rate = rate_within(open_checkpoint(source("mixtral")), 7.0, scope="matrix", **chosen)
    bound = ErrorBound(rate, "rate", "matrix")
    done = run(source("mixtral"), tmp_path / "dst", bound=bound, **chosen)
    assert 6.5 <= done.expert_bits_per_weight <= 7


def test_what_cannot_be_met(source: MakeSource) -> None:
    checkpoint = open_checkpoint(source())
    with pytest.raises(PlanError, match=rf"0.01 bits a weight: at rate {2**WIDEST} experts still"):
        rate_within(checkpoint, 0.01)
    for method in ("rtn:int4:g32", "bounded:lossless", "frequency:keep2+bounded:bound"):
        with pytest.raises(MethodError, match="a size is met by a rate"):
            rate_within(checkpoint, 4, method=method)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "dst"
    assert main(["compress", SRC, str(dst), "--bpw", "3", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert 2.97 <= done["expert_bits_per_weight"] <= 3
    assert open_store(dst).settings.bound == ErrorBound(done["bound"]["value"], "rate", "expert")
    for more in (["--rate", "1"], ["--plan", __file__]):
        assert main(["compress", SRC, str(dst), "--bpw", "3", *more]) == 2
        assert "--bpw chooses the rate itself" in capsys.readouterr().err
