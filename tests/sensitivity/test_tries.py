"""A search that is killed goes on from what it measured, to the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.calibrate import Settings, collect, of_task
from moebound.checkpoint import Checkpoint, open_checkpoint
from moebound.errors import MethodError, MoeboundError, PlanError
from moebound.evaluate.loading import Loaded, load
from moebound.files.formats.statistics import Statistics
from moebound.plan import Budget, Evidence, Plan, Search, make_plan
from moebound.plan.plan import PlannedExpert
from moebound.sensitivity.planned import planned
from moebound.sensitivity.trial import Trial, unread_by
from moebound.sensitivity.tries import Tries
from moebound.store import Encoded, Memo, compress, measure_calibrated, verify
from moebound.tasks import get_task
from moebound.types import ErrorBound
from untrained import untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("tries") / "model")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture(scope="module")
def calibration(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    text = of_task(loaded, get_task("wordmath"), 4, skip=3)
    return collect(loaded, text, tmp_path_factory.mktemp("tries") / "stats", Settings())


class Killed(Exception):
    pass


class Dying:
    """A trial that is killed after so many measurements."""

    def __init__(self, trial: Trial, left: int) -> None:
        self.trial, self.left, self.n = trial, left, 0

    def measure(self, plan: Plan, layer: int | None = None, expert: int | None = None) -> Any:
        if self.n >= self.left:
            raise Killed
        self.n += 1
        return self.trial.measure(plan, layer, expert)


def test_a_killed_search_goes_on(
    checkpoint: Checkpoint, loaded: Loaded, calibration: Statistics, tmp_path: Path
) -> None:
    task = get_task("wordmath")
    sizes = measure_calibrated(checkpoint, calibration, bits_per_weight=4, jobs=1)
    problems = unread_by(loaded, calibration, task, 5)
    trial = Trial.of(loaded, task, problems, calibration=calibration, memo=Memo())
    encoded = Encoded(checkpoint, calibration, memo=trial.memo, jobs=1)
    calls: list[str] = []

    def counted(plan: Plan) -> Any:
        calls.append(plan.sha256)
        return encoded(plan)

    def run(path: Path, left: int) -> tuple[Plan, int, Tries]:
        dying = Dying(trial, left)
        tries = Tries(lambda: dying, counted, path, {"model": "m"})  # type: ignore[arg-type,return-value]
        try:
            plan = make_plan(
                sizes, Evidence(calibration=calibration), Budget(bpw=4), source="m",
                method="calibrated", encoded=tries.sizes, search=Search(tries, 52),
            )  # fmt: skip
        finally:
            tries.close()
        return plan, dying.n, tries

    whole, n, tries = run(tmp_path / "whole.json", 99)
    # However large the budget, it is kept to the byte.
    summary = compress(checkpoint, tmp_path / "store", bound=whole, calibration=calibration)
    assert summary.expert_bytes_after == whole.n_bytes <= 4 * whole.n_weights / 8
    assert verify(tmp_path / "store", against=checkpoint).ok
    n_encoded = len(calls)
    assert len(set(calls)) == n_encoded

    calls.clear()
    kills = 0
    partial = tmp_path / "killed.json.rows.partial"
    while True:
        try:
            again, last, tries = run(tmp_path / "killed.json", 3)
            break
        except Killed:
            kills += 1
            with partial.open("ab") as file:
                file.write(b'{"plan": "torn')
    assert again == whole
    assert 3 * kills + last == n
    assert len(calls) == n_encoded  # nothing was encoded again
    with pytest.raises(MoeboundError, match="of another run"):
        Tries(lambda: trial, encoded, tmp_path / "killed.json", {"model": "another"})
    tries.remove()
    assert not partial.exists()


def test_what_statistics_read_is_left_out(loaded: Loaded, calibration: Statistics) -> None:
    task = get_task("wordmath")
    all_of_it = task.problems(20)
    found = unread_by(loaded, calibration, task, 4)
    assert [p.id for p in found] == [p.id for p in all_of_it[7:11]]
    elsewhere = unread_by(loaded, calibration, get_task("wordmath-hard"), 3, skip=2)
    assert [p.id for p in elsewhere] == [p.id for p in get_task("wordmath-hard").problems(5)[2:]]

    class Another:
        name = task.name

        def problems(self, limit: int | None = None) -> Any:
            return get_task("wordmath-hard").problems(limit)

        def __getattr__(self, name: str) -> Any:
            return getattr(task, name)

    with pytest.raises(PlanError, match="is of other problems than 'wordmath' has now"):
        unread_by(loaded, calibration, Another(), 4)  # type: ignore[arg-type]


def test_trials_need_the_statistics_of_their_model(
    checkpoint: Checkpoint, loaded: Loaded, calibration: Statistics, tmp_path: Path
) -> None:
    bound = ErrorBound(0.5, "rate", "expert")
    plan = Plan(
        method="calibrated", scheme="by hand", budget={"bpw": 4.0}, source="m", source_bytes=1,
        experts=tuple(
            PlannedExpert(e.key, {m.role: bound for m in e.matrices}, e.size, 1)
            for e in checkpoint.experts()
        ),
    )  # fmt: skip
    task = get_task("wordmath")
    trial = Trial.of(loaded, task, task.problems(2))
    with pytest.raises(MethodError, match=r"needs statistics .* --calibration"):
        trial.measure(plan)
    with pytest.raises(MethodError, match=r"needs statistics .* --calibration"):
        compress(checkpoint, tmp_path / "store", bound=plan)
    other = load(untrained(tmp_path / "other"))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    with pytest.raises(MoeboundError, match="has other weights"):
        Trial.of(other, task, task.problems(2), calibration=calibration)
    # The memo's experts are what would be made anew.
    memo = Memo(room=1)
    for _ in range(2):
        with planned(trial.experts, plan, calibration=calibration, memo=memo) as n_bytes:
            remembered = {k: e.matrices["up"].clone() for k, e in trial.experts.items()}
        with planned(trial.experts, plan, calibration=calibration) as anew:
            assert anew == n_bytes
            assert all(
                (trial.experts[k].matrices["up"] == matrix).all()
                for k, matrix in remembered.items()
            )
