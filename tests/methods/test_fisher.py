"""Method calibrated by Fisher statistics: rows in steps of their own, and every bound kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound import store
from moebound.calibrate import Settings, Statistics, collect
from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.codec import Steps, encode_codes, parse, steps_in
from moebound.codec.certificate import Columns
from moebound.errors import BoundError, MoeboundError, PlanError
from moebound.files.documents import load_json
from moebound.methods import ExpertView, GroupView, compress
from moebound.methods.calibrated import Calibrated
from moebound.methods.outputs import columns_kept
from moebound.plan import Budget, Evidence, make_plan
from moebound.store.format import CARD_FILE
from moebound.types import Array, DType, ErrorBound
from stepped_bounds import bounds_by_step
from tiny_models import MakeTiny

from .test_calibrated import KEY, moments, weights_of


def group(
    matrices: Mapping[str, Array], rows_of: Mapping[str, Array], bound: ErrorBound, n: int,
    transposed: bool = False, interleaved: bool = False,
) -> GroupView:  # fmt: skip
    roles = frozenset(matrices) if transposed else frozenset()
    bounds = dict.fromkeys(matrices, bound)
    view = ExpertView(KEY, matrices, bounds, roles, interleaved)  # type: ignore[arg-type]
    statistics = {f"{role}_rows": {KEY: rows} for role, rows in rows_of.items()}
    h = {KEY: moments(n)}
    return GroupView((view,), {"inputs": h, "hidden": h, "down_rows": {KEY: np.ones(n)},
                               **statistics})  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def drawn(rows: int, seed: int) -> Array:
    found: Array = np.exp(2 * np.random.default_rng(seed).standard_normal(rows))
    return found


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 90), seed=st.integers(0, 10**6),
    rate=st.floats(0.02, 20), dtype=st.sampled_from(["BF16", "F16", "F32"]),
    transposed=st.booleans(),
)  # fmt: skip
def test_every_weight_keeps_its_own_bound(
    rows: int, cols: int, seed: int, rate: float, dtype: DType, transposed: bool
) -> None:
    weights = weights_of(rows, cols, dtype, seed)
    stored = np.ascontiguousarray(weights.T) if transposed else weights
    seen = group({"up": stored}, {"up": drawn(rows, seed)}, ErrorBound(rate, "rate"), cols,
                 transposed)  # fmt: skip
    artifact = compress(Calibrated(), seen)
    error = np.abs(stored.astype(np.float64) - artifact.weights(KEY)["up"].astype(np.float64))
    parsed = parse(artifact.experts[KEY]["up"].data)
    own = bounds_by_step(parsed)
    certificate = artifact.experts[KEY]["up"].certificate
    assert certificate.abs_bound == pytest.approx(rate * np.abs(weights.astype(float)).mean())
    if own is None:  # an exact copy
        assert not error.any()
        return
    assert parsed.codec_version == 3
    assert own.shape == stored.shape
    assert own.max() <= certificate.abs_bound
    assert (error <= own).all()
    columns = certificate.columns
    assert columns is not None
    assert columns.kept <= 1
    assert columns.kept == pytest.approx((error / own).max())
    assert (columns.narrowest, columns.widest) == pytest.approx((own.min(), own.max()))
    outputs = certificate.outputs
    if outputs is not None:
        assert outputs.error <= outputs.promised


@pytest.mark.parametrize("by_row", [False, True])
def test_a_weight_at_its_very_bound_keeps_it(by_row: bool) -> None:
    """The step is the product that decoding multiplies by, and not what it is rounded from: half of
    these are a little less."""
    levels, factors = np.arange(40, dtype=np.uint8), np.arange(30, dtype=np.uint8)
    steps = Steps(levels, 2.0, by_row, factors)
    own = steps.of_weights(0.7)
    codes = np.random.default_rng(0).integers(0, 2, own.shape, np.int32)
    weights = (codes + 1).astype(np.float32) * own  # exact
    made = encode_codes(weights, codes, steps, ErrorBound(0.7, "abs"), 0.7)
    assert made.certificate.patched == 0
    bounds = Calibrated().column_bounds(parse(made.data))
    assert bounds is not None
    found = columns_kept(weights, made.decoded, bounds)
    assert found == Columns(float(own.min()), float(own.max()), 1.0)


def test_rows_that_weigh_more_are_kept_nearer() -> None:
    fisher = np.where(np.arange(64) < 32, 64.0, 1.0)
    weights = weights_of(64, 48)
    seen = group({"gate": weights}, {"gate": fisher}, ErrorBound(2.0, "rate"), 48)
    artifact = compress(Calibrated(), seen)
    error = np.square(weights.astype(float) - artifact.weights(KEY)["gate"].astype(float))
    assert error[:32].mean() < error[32:].mean() / 20
    found = steps_in(parse(artifact.experts[KEY]["gate"].data))
    assert found is not None
    # A step goes with the root of the weight: 64 times as much, an eighth, but for the damping.
    assert found.factors[0] / found.factors[-1] == pytest.approx(1 / 8, rel=0.2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_in_one_matrix(interleaved: bool) -> None:
    gate, up, fisher = weights_of(20, 48), weights_of(20, 48, seed=2), drawn(20, 1)
    both = np.stack([gate, up], 1).reshape(40, 48) if interleaved else np.concatenate([gate, up])
    seen = group({"gate_up": both}, {"gate": fisher, "up": 9 * fisher}, ErrorBound(1.0, "rate"), 48,
                 interleaved=interleaved)  # fmt: skip
    found = steps_in(parse(compress(Calibrated(), seen).experts[KEY]["gate_up"].data))
    assert found is not None
    of_gate = found.factors[::2] if interleaved else found.factors[:20]
    of_up = found.factors[1::2] if interleaved else found.factors[20:]
    np.testing.assert_allclose(of_up / of_gate, 1 / 3, rtol=0.2)


def test_down_has_steps_of_its_inputs_alone() -> None:
    seen = group({"down": weights_of(48, 48)}, {}, ErrorBound(1.0, "rate"), 48)
    assert parse(compress(Calibrated(), seen).experts[KEY]["down"].data).codec_version == 2


@pytest.fixture(scope="module")
def fisher(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    from calibrate.test_collect import TEXT, loaded

    folder = tiny("qwen3_moe")
    out = tmp_path_factory.mktemp("fisher") / "stats"
    return folder, collect(loaded(folder), TEXT, out, Settings(fisher=True))


def test_a_plan_has_one_lambda(fisher: tuple[Path, Statistics]) -> None:
    """Every matrix's bound is that at λ = 1 times the same number, where the grid has room."""
    folder, statistics = fisher
    checkpoint = open_checkpoint(folder)
    widest = store.fisher_bounds(checkpoint, statistics)
    sizes = store.measure_calibrated(checkpoint, statistics)
    plan = make_plan(
        sizes, Evidence(calibration=statistics), Budget(bpw=6.0), source="q", method="calibrated",
        widest=widest,
    )  # fmt: skip
    assert plan.scheme == "fisher"
    mean_abs = {one.key: one.mean_abs for one in sizes}
    found = {
        (expert.key, role): np.log2(bound.value * mean_abs[expert.key]) - widest[expert.key, role]
        for expert in plan.experts for role, bound in expert.bounds.items()
        if sizes[0].rates[0] < bound.value < sizes[0].rates[-1]
    }  # fmt: skip
    assert len(found) > 10
    assert np.ptp(list(found.values())) < 1e-6
    with pytest.raises(PlanError, match="--bpw or --ratio"):
        make_plan(sizes, Evidence(calibration=statistics), Budget(max_kl=0.1), source="q",
                  method="calibrated", widest=widest)  # fmt: skip
    with pytest.raises(PlanError, match="calibrate --fisher"):
        make_plan(sizes, Evidence(calibration=statistics), Budget(bpw=6.0), source="q",
                  method="calibrated", scheme="fisher")  # fmt: skip


def test_plan_compress_and_verify(
    fisher: tuple[Path, Statistics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, statistics = fisher
    stats, plan, out = str(statistics.folder), str(tmp_path / "plan.json"), str(tmp_path / "store")
    asked = ["plan", str(folder), "--calibration", stats, "--bpw", "6", "--no-measure"]
    assert main([*asked, "-o", plan]) == 0
    assert load_json(Path(plan))["scheme"] == "fisher"
    capsys.readouterr()
    assert main(["compress", str(folder), out, "--plan", plan, "--calibration", stats]) == 0
    assert "moebound plan" not in capsys.readouterr().out
    for more in (
        [],
        ["--against", str(folder)],
        ["--against", str(folder), "--calibration", stats],
    ):
        assert main(["verify", out, *more, "--json"]) == 0


def test_one_command_writes_the_bytes_of_two(
    fisher: tuple[Path, Statistics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, statistics = fisher
    stats, plan = str(statistics.folder), str(tmp_path / "plan.json")
    src, one, two, three = (str(path) for path in (folder, *map(tmp_path.joinpath, "123")))
    budget = ["--calibration", stats, "--bpw", "6"]
    assert main(["plan", src, *budget, "--no-measure", "-o", plan]) == 0
    assert main(["compress", src, two, "--plan", plan, "--calibration", stats]) == 0
    capsys.readouterr()
    assert main(["compress", src, one, *budget]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each matrix's own, planned by scheme fisher" in said
    assert "lose more than a plan" not in said
    store.compress(src, three, bits_per_weight=6.0, method="calibrated", calibration=stats)
    assert contents(Path(one)) == contents(Path(two)) == contents(Path(three))

    assert main(["inspect", one]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "planned by scheme fisher, for bpw 6, a bound for each matrix" in said
    assert (
        "scheme fisher, for bpw 6, a bound for each matrix" in (Path(one) / CARD_FILE).read_text()
    )


def test_a_size_without_a_plan_has_one_rate(
    fisher: tuple[Path, Statistics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where some experts are chosen, a scope is, or another method."""
    folder, statistics = fisher
    checkpoint = open_checkpoint(folder)
    for options in ({"layers": {0}}, {"experts": {0, 1}}, {"scope": "matrix"}, {"method": "bound"}):
        method, found = store.within(checkpoint, 6.0, calibration=statistics, **options)
        assert isinstance(found, ErrorBound)
        assert method == ("bounded:bound" if "method" in options else "calibrated")
    other = replace(statistics, of=replace(statistics.of, fisher=False))
    assert store.within(checkpoint, 6.0, calibration=other)[0] == "bounded:bound"
    asked = ["compress", str(folder), str(tmp_path / "store"), "--bpw", "6", "--layers", "0"]
    assert main([*asked, "--calibration", str(statistics.folder)]) == 0
    assert "for all routed experts, plans by itself" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(BoundError, match="expected one of them"):
        store.compress(checkpoint, tmp_path / "two", bits_per_weight=6.0, bound=ErrorBound(1.0))


def test_other_statistics_know_nothing_of_it(fisher: tuple[Path, Statistics]) -> None:
    folder, statistics = fisher
    other = replace(statistics, of=replace(statistics.of, fisher=False))
    with pytest.raises(MoeboundError, match="calibrate --fisher"):
        store.fisher_bounds(open_checkpoint(folder), other)


def test_a_wide_bound_is_not_said_to_leave_nothing(
    fisher: tuple[Path, Statistics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is that of the widest row and column alone."""
    folder, statistics = fisher
    asked = ["compress", str(folder), str(tmp_path / "store"), "--method", "calibrated"]
    assert main([*asked, "--rate", "40", "--calibration", str(statistics.folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "become 0" not in said
    assert "plans by itself" in said
