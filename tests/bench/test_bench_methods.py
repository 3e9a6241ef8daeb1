"""Every method at the same bytes, on a tiny model: sizes, what cannot be reached, going on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moebound.bench.methods import BITS, METHODS, MethodsReport, run
from moebound.bench.methods.again import Again, alone
from moebound.bench.methods.claims import to_json
from moebound.bench.methods.making import Candidate, make
from moebound.bench.methods.page import render
from moebound.bench.methods.parts import parts
from moebound.bench.methods.place import Place
from moebound.bench.methods.plots import KINDS, kind_of
from moebound.bench.methods.residuals import base_row
from moebound.bench.methods.sizing import (
    AsItIs,
    ByCount,
    ByGrid,
    ByRate,
    BySize,
    OfPairs,
    Recalibrated,
    sizing_of,
)
from moebound.bench.methods.table import render_methods
from moebound.calibrate import collect, of_task
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import (
    BackendUnavailable,
    BoundViolatedError,
    MethodError,
    MoeboundError,
    SizeError,
)
from moebound.evaluate.loading import load
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.jobs.workers import Opens, Processes, Workers
from moebound.plan import Plan
from moebound.tasks import get_task
from moebound.wordmath.builtin import MODELS
from untrained import untrained


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(untrained(tmp_path_factory.mktemp("model"), MODELS[1]))


@pytest.fixture(scope="module")
def statistics(source: str, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    loaded = load(source)
    text = of_task(loaded, get_task("wordmath"), 4, skip=500)
    return collect(loaded, text, tmp_path_factory.mktemp("statistics") / "stats")


@pytest.fixture(scope="module")
def place(source: str, statistics: Statistics) -> Place:
    return Place(open_checkpoint(source), statistics)


def test_each_kind_of_method_is_searched_by_its_own_parameter(place: Place) -> None:
    kinds = {
        "bound": ByRate, "calibrated:k1.5": ByRate, "residual:svd:r2:f8": ByRate,
        "reap_re:keep6+bound": ByRate,
        "svd": BySize, "mobe_fixed:f8": BySize, "moe_i2_re:p0.25": BySize, "milo_fixed": BySize,
        "rtn": ByGrid, "rtn:coded": ByGrid,
        "reap_re": ByCount, "hc_smoe_fixed:kmeans": ByCount, "mone_re+calibrated": ByCount,
        "puzzle_moe_re+rtn": OfPairs, "puzzle_moe_re:seed3+rtn:coded": OfPairs,
        "again:mone_re+calibrated": Recalibrated, "again:modegpt_re:k0.5+gptq_re": Recalibrated,
        "modegpt_re:k0.7+calibrated": ByRate,
        "puzzle_moe_re": AsItIs, "svd:r4": AsItIs, "reap_re:keep6+rtn:int4:g64": AsItIs,
    }  # fmt: skip
    assert {name: type(sizing_of(name, place)) for name in kinds} == kinds


class Without7(ByGrid):
    def _bits(self, width: int, length: int) -> float:
        if width == 7:
            raise MethodError("no integers of 7 bits")
        return super()._bits(width, length)


def test_a_width_that_a_method_has_not_is_left_out(place: Place) -> None:
    for bits in (8.0, 3.0):
        assert ":int7" not in Without7("rtn", "", place).search(bits)(bits).setting
    with pytest.raises(SizeError) as caught:
        Without7("rtn", "", place).search(30.0)
    assert caught.value.nearest == place.measured("rtn:int8:g8")[0]


def test_all_methods_there_are_can_be_asked_for(place: Place) -> None:
    from moebound.methods import method_ids

    for name in METHODS:
        try:
            sizing_of(name, place)
        except BackendUnavailable:
            assert name == "hqq"
        assert kind_of(name) in KINDS
    asked = {part.partition(":")[0] for name in METHODS for part in name.split("+")}
    assert asked >= set(method_ids()) - {"bounded"}


@pytest.mark.parametrize(
    "name",
    ["nothing", "svd:q9", "reap_re:keep6+nothing", "bound+rtn", "again:bound", "again:reap_re",
     "again:reap_re+rtn", "again:puzzle_moe_re:seed0+calibrated"],
)  # fmt: skip
def test_an_unknown_method_is_found_before_any_work(name: str) -> None:
    with pytest.raises(MoeboundError, match=name.partition("+")[0].partition(":")[0]):
        run(MODELS[1], get_task("wordmath"), methods=[name], limit=1)


def test_sizes_are_numbers_above_0() -> None:
    wrong: list[dict[str, Any]] = [{"bits": [0.0]}, {"removed": [100.0]}, {"bits": [-1.0]}]
    for sizes in wrong:
        with pytest.raises(MoeboundError, match="above 0"):
            run(MODELS[1], get_task("wordmath"), methods=["bound"], limit=1, **sizes)


def test_whole_experts_come_to_a_size_with_one_more_in_some_layers(place: Place) -> None:
    # Three layers of eight experts, in BF16, two of which a token gets.
    found = sizing_of("reap_re", place).search(8.7)(8.7)
    assert sorted(setting for _, setting in found.layers) == [
        "reap_re:keep4", "reap_re:keep4", "reap_re:keep5",
    ]  # fmt: skip
    assert sizing_of("reap_re", place).search(8.0)(8.0) == Candidate("reap_re:keep4")
    with pytest.raises(SizeError, match="2 to 7 of 8") as raised:
        sizing_of("reap_re", place).search(3.0)
    assert raised.value.nearest == 4.0


def test_kept_experts_are_coded_in_3_to_4_bits(place: Place) -> None:
    candidate = sizing_of("reap_re+rtn", place).search(2.5)(2.5)
    assert candidate.setting.startswith("reap_re:keep6+rtn:int")  # 2.5 · 8 / 6 = 3.33 bits each
    with pytest.raises(SizeError, match="keep7") as raised:
        sizing_of("reap_re+rtn", place).search(5.0)
    assert raised.value.nearest == pytest.approx(3.5)


@pytest.mark.long
def test_what_is_kept_is_coded_by_statistics_gathered_again(
    source: str, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["reap_re+calibrated", "again:reap_re+calibrated", "bound"]
    options: dict[str, Any] = {"methods": asked, "bits": [2.5], "calibration": statistics,
                               "limit": 2, "answers": 1, "rows": tmp_path}  # fmt: skip
    report = run(source, get_task("wordmath"), **options)
    first, again, plain = (row.made for row in report.rows)
    assert first is not None
    assert again is not None
    assert plain is not None
    kept = again.setting.partition("+")[0]
    told = (first.statistics, again.statistics, plain.statistics)
    assert told == ("the whole model", f"after {kept}", None)
    folder = tmp_path / "moved" / kept.replace(":", "-")
    moved = read_statistics(folder)
    assert (moved.of.after, moved.of.text_sha256) == (kept, statistics.of.text_sha256)
    # They are gathered once; of another text they are not taken.
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("gathered again"))
    loaded, by = load(source), Again(source, statistics, tmp_path / "moved")
    assert by.moved(kept, loaded) == folder
    strange = replace(statistics, of=replace(statistics.of, text_sha256="00"))
    with pytest.raises(MoeboundError, match="expected the text of"):
        Again(source, strange, tmp_path / "moved").moved(kept, loaded)
    with pytest.raises(MoeboundError, match="which are none of those behind the first 500 or 0"):
        Again(source, strange, tmp_path / "other").moved(kept, loaded)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_plans_are_taken_by_their_size(source: str, tmp_path: Path) -> None:
    for bits in ("3", "5"):
        assert main(["plan", source, "--bpw", bits, "-o", str(tmp_path / f"{bits}.json")]) == 0
    asked = f"plan:{tmp_path}"
    report = run(source, get_task("wordmath"), methods=[asked], bits=[5.0, 4.0], limit=1)
    reached, missed = report.rows
    assert reached.made is not None
    assert reached.made.setting == f"plan:{tmp_path / '5.json'}"
    assert reached.made.bits_per_weight == pytest.approx(5.0, rel=0.01)
    assert reached.made.guarantee == "max_abs"
    assert missed.nearest in (pytest.approx(3, rel=0.01), pytest.approx(5, rel=0.01))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MethodError, match="found none"):
        run(source, get_task("wordmath"), methods=[f"plan:{tmp_path / 'empty'}"], limit=1)


@pytest.mark.slow
def test_plans_of_widths_are_rows(source: str, tmp_path: Path) -> None:
    out = tmp_path / "control.json"
    told = ["--bpw", "4", "--scheme", "mptqs_re", "--method", "rtn:g64", "-o", str(out)]
    assert main(["plan", source, *told]) == 0
    report = run(source, get_task("wordmath"), methods=[f"plan:{out}"], bits=[4.0], limit=1)
    [row] = report.rows
    assert row.made is not None, row
    assert row.made.n_bytes == Plan.load(out).n_bytes
    assert row.made.guarantee == "none"


def test_a_broken_promise_is_a_row_and_an_exit_code(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise BoundViolatedError("bounded:bound: a store breaks its promise")

    monkeypatch.setattr("moebound.bench.methods.parts.make", broken)
    asked = ["bench", "methods", source, "--task", "wordmath", "--limit", "1", "--json"]
    assert main([*asked, "--methods", "bound", "--bits", "4"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["violated"]
    assert not row["reached"]


def test_integers_and_groups_are_those_with_the_least_error(place: Place) -> None:
    sizing = sizing_of("rtn", place)
    setting = sizing.search(4.0)(4.0).setting
    size, error = place.measured(setting)
    assert size == pytest.approx(4.0, rel=0.01)
    # Two bits and short groups come to it as well, and are farther off.
    other, worse = place.measured("rtn:int2:g9")
    assert other == pytest.approx(4.0, rel=0.01)
    assert error < worse
    with pytest.raises(SizeError, match="nearest") as raised:
        sizing.search(1.5)
    assert raised.value.nearest == pytest.approx(2.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_size_that_a_method_cannot_be_says_the_nearest(
    source: str, statistics: Statistics, tmp_path: Path
) -> None:
    for setting, nearest in (("svd:b40", 32), ("milo_fixed:b1", 2.5), ("d2_moe_fixed:b0.1", 2.0)):
        with pytest.raises(SizeError) as raised:
            make(Candidate(setting), source, statistics.folder, tmp_path / setting[:3])
        assert raised.value.nearest == pytest.approx(nearest, rel=0.05)
        assert str(tmp_path) not in str(raised.value)


ASKED = ["bound", "svd:f8", "reap_re", "mone_re+rtn", "puzzle_moe_re"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_rows_have_the_size_asked_and_the_same_call_goes_on_from_them(
    source: str, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    options: dict[str, Any] = {
        "methods": ASKED, "bits": [4.0, 2.5], "bases": ["svd:r0"], "calibration": statistics,
        "limit": 3, "answers": 2, "rows": tmp_path / "work",
    }  # fmt: skip
    report = run(
        source, get_task("wordmath"), **options, say=lambda what, done, total: said.append(what)
    )
    document = report.to_json()
    rows = {(row["method"], row["bits"]): row for row in document["rows"]}
    assert list(rows) == [(name, bits) for bits in (4.0, 2.5) for name in ASKED]
    reached = {key for key, row in rows.items() if row["reached"]}
    assert reached == {
        ("bound", 4.0), ("svd:f8", 4.0), ("reap_re", 4.0),
        ("bound", 2.5), ("svd:f8", 2.5), ("mone_re+rtn", 2.5),
    }  # fmt: skip
    for key in reached:
        row = rows[key]
        assert row["bits_per_weight"] == pytest.approx(row["bits"], rel=0.01)
        assert row["n_bytes"] == row["bits_per_weight"] * row["n_weights"] / 8
        assert row["guarantee"] == ("max_abs" if key[0] == "bound" else "none")
        assert row["peak_bytes"] > row["base_bytes"] > 0
        assert row["seconds"] > 0
        assert row["max_abs_error"] > 0
        assert row["fidelity"]["kl_nats"] > 0
        assert row["to_original"]["pia"]["n"] == 2
        assert row["fidelity"]["n_problems"] == 3
    assert rows["mone_re+rtn", 4.0]["nearest_bits_per_weight"] == pytest.approx(3.5)
    assert rows["puzzle_moe_re", 2.5]["nearest_bits_per_weight"] == pytest.approx(8, rel=0.01)
    assert document["residuals"][0]["beats_at"] == ()
    assert any("left" in what for what in said)

    def again(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("moebound.bench.methods.parts.make", again)
    monkeypatch.setattr("moebound.bench.methods.parts.base_row", again)
    second = run(source, get_task("wordmath"), **options)
    assert second.to_json() | {"environment": 0} == document | {"environment": 0}
    assert render_methods(second).row_count == len(rows)
    page = render(second)
    for part in ("Every row", "does a base pay".capitalize(), "What was not reached", "<svg"):
        assert part in page
    with pytest.raises(MoeboundError, match="another limit"):
        run(source, get_task("wordmath"), **(options | {"limit": 2}))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_workers_make_rows_that_one_process_goes_on_from(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, names, base = tmp_path / "work", ["svd:f8", "reap_re", "calibrated"], "modegpt_re:k0.5"
    asked = ["bench", "methods", source, "--task", "wordmath", "--limit", "1", "--bits", "3"]
    asked += ["--methods", ",".join(names), "--residuals", base, "--work", str(work)]
    assert main([*asked, "--workers", "2", "--json"]) == 0
    told = capsys.readouterr()
    two = json.loads(told.out)
    made, missed, without = two["rows"]
    assert made["bits_per_weight"] == pytest.approx(3, rel=0.01)
    assert missed["nearest_bits_per_weight"] == 4.0
    assert "moebound calibrate" in without["reason"]
    assert "moebound calibrate" in two["residuals"][0]["reason"]
    assert "[0/4] 2 workers" in told.err
    assert "[4/4]" in told.err
    # Those are kept that the next run does not try again.
    lines = (work / "rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["condition"] for line in lines) == [
        "reap_re at 3",
        "svd:f8 at 3",
    ]
    options: dict[str, Any] = {"methods": names, "bits": [3.0], "bases": [base], "limit": 1}
    one = run(source, get_task("wordmath"), rows=work, **options)
    assert without_costs(one) == without_costs(two)
    options |= {"methods": names[:2], "bases": None, "workers": never}
    assert run(source, get_task("wordmath"), rows=work, **options).rows[0].made is not None


@pytest.mark.long
def test_workers_make_the_rows_of_one_process(
    source: str, statistics: Statistics, tmp_path: Path
) -> None:
    asked = ["bound", "rtn", "again:reap_re+calibrated", "again:reap_re+gptq_re", "mone_re+rtn"]
    options: dict[str, Any] = {"methods": asked, "bits": [4.0, 2.5], "bases": ["svd:r0"],
                               "calibration": statistics, "limit": 3, "answers": 2}  # fmt: skip
    task = get_task("wordmath")
    one = run(source, task, **options, rows=tmp_path / "one")
    two = run(source, task, **options, rows=tmp_path / "two", workers=lambda s: Processes(s, 2))
    assert sum(row.made is not None for row in one.rows) >= 5
    assert without_costs(two) == without_costs(one)


def without_costs(report: MethodsReport | dict[str, Any]) -> dict[str, Any]:
    """As JSON, without what differs from run to run."""
    found = report if isinstance(report, dict) else to_json(report)
    document: dict[str, Any] = json.loads(json.dumps(found))
    for row in document["rows"]:
        for cost in ("seconds", "cpu_seconds", "peak_bytes", "base_bytes"):
            row.pop(cost, None)
    return document | {"environment": None}


def never(setup: Opens) -> Workers:
    pytest.fail("workers for nothing")


def test_a_worker_that_finds_another_model_is_told(source: str, tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="other weights"):
        parts(
            source, get_task("wordmath"), limit=1, answers=None, calibration=None, fisher=None,
            moved=tmp_path, weights="00", at=Path.cwd(), threads=None,
        )  # fmt: skip


def test_who_gathers_statistics_again_is_alone(tmp_path: Path) -> None:
    out, entered = tmp_path / "moved" / "reap_re-keep6", threading.Event()

    def second() -> None:
        with alone(out):
            entered.set()

    thread = threading.Thread(target=second)
    with alone(out):
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_what_needs_statistics_says_so_in_its_row_and_is_tried_again(
    source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"methods": ["calibrated", "frequency"], "bits": [8.0], "limit": 1}
    report = run(source, get_task("wordmath"), **options, rows=tmp_path)
    assert [row.made for row in report.rows] == [None, None]
    for row in report.rows:
        assert "moebound calibrate" in (row.reason or "")
    assert "at 8" not in (tmp_path / "rows.jsonl").read_text()


def test_a_base_that_explains_nothing_never_pays(place: Place) -> None:
    nothing = base_row(place.checkpoint, "svd:r0", None, [0.1, 0.4])
    assert nothing.explained == pytest.approx(0, abs=1e-6)
    assert not nothing.predicted_to_pay
    assert nothing.beats_at == ()
    # A base that explains nearly all takes more than it saves: the weights are random.
    dear = base_row(place.checkpoint, "svd:r64:f8", None, [0.1, 0.4])
    assert 0.2 < dear.explained < 1
    assert 0 < dear.predicted_saving < dear.base_bits
    assert all(saved > 0 for saved in dear.saved)
    assert dear.beats_at == ()
    refused = base_row(place.checkpoint, "modegpt_re:k0.5", None)
    assert "calibrate" in (refused.reason or "")


@pytest.mark.long
def test_the_command_writes_json_and_a_page(
    source: str, statistics: Statistics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    asked = ["bench", "methods", source, "--task", "wordmath", "--limit", "2", "--json"]
    asked += ["--methods", "bound,svd", "--bits", "4", "--removed", "60", "--page", str(page)]
    assert main([*asked, "--calibration", str(statistics.folder)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "moebound.bench.methods"
    removed = [row for row in document["rows"] if row["removed"] == 60]
    assert {row["method"] for row in removed} >= {"svd", "mobe_fixed", "rfid_re", "d2_moe_fixed"}
    assert all(row["bits"] == pytest.approx(6.4) for row in removed)
    judged = {(one["better"], one["worse"]): one for one in document["claims"]}
    assert judged["d2_moe_fixed", "svd"]["sizes"][0]["removed"] == 60
    assert "What papers claim" in page.read_text()


def test_the_sizes_asked_by_default_go_from_8_to_1_5_bits() -> None:
    assert BITS[0] == 8
    assert BITS[-1] == 1.5
    with pytest.raises(MethodError):
        sizing_of("", Place(open_checkpoint(MODELS[1])))
