"""`moebound plan`, `compress --plan` and `card`: from a budget to a store that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.codec import stats
from moebound.plan import Plan
from moebound.types import TensorStats
from tiny_models import make_tiny
from untrained import untrained

from .conftest import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MoE layers of four tiny experts."""
    return make_tiny("deepseek_v3", tmp_path_factory.mktemp("plan") / "tiny")


@pytest.fixture(scope="module")
def measured(source: Path) -> dict[str, Path]:
    """Measurements of it: layer 1 hurts a hundred times as much; expert 0 is used most."""
    checkpoint = open_checkpoint(source)
    experts: list[dict[str, Any]] = []
    for expert in checkpoint.experts():
        whole = sum((stats(checkpoint.read(m)) for m in expert.matrices), TensorStats())
        c = 1e-2 if expert.key.layer == 1 else 1e-4
        experts.append(
            {"layer": expert.key.layer, "expert": expert.key.expert, "mean_abs": whole.mean_abs,
             "n_weights": expert.size, "bytes": None, "measured_kl": None,
             "predicted_kl": [c * 0.01, c * 0.25]}
        )  # fmt: skip
    layers = sorted({entry["layer"] for entry in experts})
    found = {
        "sensitivity": {"format": "moebound.sensitivity", "version": 1, "bounds": [0.1, 0.5],
                        "model": "tiny", "task": "t", "experts": experts},
        "profile": {"format": "moebound.profile", "version": 1,
                    "layers": [{"layer": n, "counts": [90, 5, 5, 0]} for n in layers]},
    }  # fmt: skip
    paths = {}
    for name, document in found.items():
        paths[name] = source.parent / f"{name}.json"
        paths[name].write_text(json.dumps(document))
    study = source.parent / "study"
    study.mkdir()
    (study / "rows.jsonl").write_text(
        '{"condition": "a", "task": "t", "layers": [1], "layer": 1, "source": "bound", "rate": 0.5,'
        ' "kl": 0.1}\n'
        '{"condition": "b", "task": "t", "layers": [2], "layer": 2, "source": "bound", "rate": 0.5,'
        ' "kl": 0.001}\n{"lay'
    )
    return {**paths, "study": study}


@pytest.mark.parametrize("evidence", ["sensitivity", "study"])
@pytest.mark.slow
def test_plan_compress_verify_card(
    run: Run, source: Path, measured: dict[str, Path], tmp_path: Path, evidence: str
) -> None:
    out, dst = tmp_path / "plan.json", tmp_path / "dst"
    cheap = ["--no-measure"] if evidence == "sensitivity" else []
    ran = run("plan", source, f"--{evidence}", measured[evidence], "--bpw", 6, "-o", out, "--json",
              *cheap)  # fmt: skip
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert found["measured"] is None
    assert found["scheme"] == "sensitivity"
    assert found["predicted"]["bits_per_weight"] <= 6
    assert found["source"] == "tiny"
    rates = {e.key.layer: e.bounds["down"].value for e in Plan.load(out).experts}
    assert rates[1] < rates[2]
    ran = run("compress", source, dst, "--plan", out, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["expert_bytes_after"] == found["predicted"]["bytes"]
    assert run("verify", dst, "--against", source).code == 0
    assert run("compress", source, dst, "--plan", out, "--resume").code == 0
    assert "as planned" in run("inspect", dst).stdout or "rate" in run("inspect", dst).stdout
    evaluation = tmp_path / "eval.json"
    evaluation.write_text('{"task": "wordmath", "kl": 0.01}')
    ran = run("card", dst, "--measured", evaluation, "--json")
    assert ran.document["path"] == str(dst / "README.md")
    assert "| kl | 0.01 |" in (dst / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["uniform", "frequency", "rfid"])
def test_schemes_for_people(
    run: Run, source: Path, measured: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    ran = run("plan", source, "--profile", measured["profile"], "--scheme", scheme,
              "--ratio", "2.5", "-o", tmp_path / "p.json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert scheme in ran.stdout
    assert "2.5" in ran.stdout
    assert Plan.load(tmp_path / "p.json").ratio >= 2.5


@pytest.mark.slow
def test_limit_of_predicted_loss(
    run: Run, source: Path, measured: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--sensitivity", measured["sensitivity"], "--no-measure", "--max-kl", "0.001",
               "-o", tmp_path / "p.json"]  # fmt: skip
    ran = run("plan", source, *options, "--json")
    assert ran.code == 0, ran.stderr
    assert 0.0005 < ran.document["predicted"]["kl"] <= 0.001
    assert "not measured" in run("plan", source, *options).stdout


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that can be tried, and its map of two problems."""
    folder = untrained(tmp_path_factory.mktemp("mapped") / "model")
    out = folder.parent / "map.json"
    options = ["--task", "wordmath", "--rates", "0.1,0.5", "--limit", "2", "--measure", "none",
               "--ties", "0"]  # fmt: skip
    assert main(["sensitivity", str(folder), *options, "-o", str(out), "-q"]) == 0
    return folder, out


@pytest.mark.slow
def test_plans_are_measured(run: Run, mapped: tuple[Path, Path], tmp_path: Path) -> None:
    folder, sensitivity = mapped
    out = tmp_path / "plan.json"
    options = ["--sensitivity", sensitivity, "--problems", 3, "-o", out]
    ran = run("plan", folder, *options, "--bpw", 3, "--json")
    assert ran.code == 0, ran.stderr
    at_3 = ran.document["measured"]
    assert at_3["kl"] > 0
    assert at_3["stderr"] > 0
    assert (at_3["task"], at_3["n_problems"], at_3["n_tried"]) == ("wordmath", 3, 1)
    assert Plan.load(out).to_json()["measured"] == at_3
    limit = at_3["kl"] / 2
    ran = run("plan", folder, *options, "--max-kl", limit, "--json")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert found["measured"]["kl"] <= limit
    assert found["predicted"]["bits_per_weight"] > 3
    assert ran.stderr.count("measured") == found["measured"]["n_tried"]
    ran = run("plan", folder, *options, "--bpw", 3)
    assert "measured KL" in ran.stdout
    assert "3 other problems of wordmath" in ran.stdout


def test_what_cannot_be_measured(
    run: Run, mapped: tuple[Path, Path], measured: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    folder, sensitivity = mapped
    for src, options, message in (
        (source, ["--sensitivity", measured["sensitivity"]], "does not say which problems"),
        (folder, ["--problems", 3], "--problems is for measuring with a map"),
        (folder, ["--sensitivity", sensitivity, "--problems", 3, "--no-measure"], "--no-measure"),
        (folder, ["--sensitivity", sensitivity, "--problems", 1], "--problems"),
        (folder, ["--sensitivity", sensitivity, "--problems", 3, "--max-kl", "1e-30"], "--max-kl"),
    ):
        budget = [] if "--max-kl" in options else ["--bpw", "4"]
        ran = run("plan", src, *options, *budget, "-o", tmp_path / "plan.json")
        assert ran.code == 2, options
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr
    ran = run("plan", source, "--sensitivity", measured["sensitivity"], "--bpw", 4,
              "-o", tmp_path / "plan.json")  # fmt: skip
    assert "--no-measure plans without measuring" in ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def calibrated(mapped: tuple[Path, Path]) -> Path:
    out = mapped[0].parent / "stats"
    told = ["--task", "wordmath", "--limit", "4", "-o", str(out), "-q"]
    assert main(["calibrate", str(mapped[0]), *told]) == 0
    return out


@pytest.mark.slow
def test_calibrated_plans(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, tmp_path: Path
) -> None:
    """Statistics in, a plan of method calibrated out; the store takes what the plan says."""
    folder, sensitivity = mapped
    out, dst = tmp_path / "plan.json", tmp_path / "store"
    options = ["--calibration", calibrated, "--problems", 3, "--search-problems", 3, "--search", 6]
    ran = run("plan", folder, *options, "--bpw", 4, "-o", out, "--json")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert (found["method"], found["scheme"]) == ("calibrated", "search")
    assert 3.8 < found["predicted"]["bits_per_weight"] <= 4
    assert found["measured"]["tokens"] == "all"
    assert found["measured"]["n_problems"] == 3
    assert found["measured"]["kl"] == found["measured"]["score"]["kl_nats"]
    assert found["made"]["calibration"]["text"] == "wordmath"
    assert found["made"]["search"]["n_measured"] <= 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
    ran = run("compress", folder, dst, "--plan", out)
    assert ran.code == 2
    assert "needs statistics of the model's inputs" in ran.stderr
    assert not dst.exists()
    ran = run("compress", folder, dst, "--plan", out, "--calibration", calibrated, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["expert_bytes_after"] == found["predicted"]["bytes"]
    assert run("verify", dst, "--against", folder).code == 0
    # Answers only, with a map for what tells experts apart; a ratio; no search.
    ran = run("plan", folder, *options, "--sensitivity", sensitivity, "--tokens", "answers",
              "--ratio", 4, "-o", out, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert found["measured"]["tokens"] == "answers"
    assert found["measured"]["kl"] == found["measured"]["score"]["answer_kl_nats"]
    ran = run("plan", folder, "--calibration", calibrated, "--no-measure", "--bpw", 4,
              "-o", out, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert (ran.document["scheme"], ran.document["measured"]) == ("uniform", None)
    assert 3.8 < ran.document["predicted"]["bits_per_weight"] <= 4


def test_statistics_that_are_missing_or_wrong(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, source: Path, tmp_path: Path
) -> None:
    folder, out = mapped[0], tmp_path / "plan.json"
    for src, options, message in (
        (folder, ["--method", "calibrated"], "needs statistics of the model's inputs"),
        (source, ["--calibration", calibrated], "has other weights"),
        (folder, ["--calibration", tmp_path / "none"], "no such folder"),
        (folder, ["--calibration", calibrated, "--codec", "sz3"], "--codec rounds without"),
        (folder, ["--calibration", calibrated, "--method", "bounded:bound"], "at no statistics"),
        (folder, ["--calibration", calibrated, "--scheme", "layer"], "none of method 'calibrated'"),
        (folder, ["--method", "rtn:int4:g64"], "knows no bound, and plans choose bounds"),
        (folder, ["--scheme", "search"], "--task"),
        (folder, ["--search", "3"], "--search is for scheme search"),
    ):
        ran = run("plan", src, "--bpw", 4, *options, "-o", out)
        assert ran.code == 2, options
        assert message in ran.stderr, ran.stderr
        assert "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["pmq_re", "mxmoe_re", "edgemoe_re", "mptqs_re", "milo_re"])
def test_plans_of_widths(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, tmp_path: Path, scheme: str
) -> None:
    """Of a grid method, whose store has the plan's bytes, and of bounds."""
    folder, out, dst = mapped[0], tmp_path / "plan.json", tmp_path / "dst"
    options = ["--scheme", scheme, "--calibration", calibrated, "--bpw", 4, "-o", out, "--json"]
    ran = run("plan", folder, *options, "--method", "rtn:g64", "--no-measure")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert found["scheme"] == scheme
    assert 3.5 < found["predicted"]["bits_per_weight"] <= 4
    assert found["made"]["calibration"]["text"] == "wordmath"
    assert all(method.startswith("rtn:int") for method in Plan.load(out).methods)
    ran = run("compress", folder, dst, "--plan", out, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["expert_bytes_after"] == found["predicted"]["bytes"]
    assert run("verify", dst, "--against", folder).code == 0
    ran = run("plan", folder, *options, "--codec", "bound", "--no-measure")
    assert ran.code == 0, ran.stderr
    assert 3.9 < ran.document["predicted"]["bits_per_weight"] <= 4
    assert (ran.document["method"], ran.document["made"]["widths_of"]) == (
        "bounded:bound", "rtn:g128",
    )  # fmt: skip


@pytest.mark.slow
def test_plans_of_widths_are_measured(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    for method in ("rtn", "bounded:bound", "calibrated"):
        ran = run("plan", mapped[0], "--scheme", "pmq_re", "--calibration", calibrated, "--bpw", 4,
                  "--method", method, "--problems", 3, "-o", out, "--json")  # fmt: skip
        assert ran.code == 0, ran.stderr
        assert ran.document["measured"]["kl"] > 0
        assert ran.document["measured"]["n_problems"] == 3


def test_what_plans_of_widths_need(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, measured: dict[str, Path], source: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder, out = mapped[0], tmp_path / "plan.json"
    stats = ["--calibration", calibrated, "--no-measure"]
    for src, options, message in (
        (folder, ["--scheme", "pmq_re", "--method", "rtn"], "does to outputs: give --calibration"),
        (folder, ["--scheme", "milo_re", "--method", "rtn"], "give --profile or --calibration"),
        (folder, ["--scheme", "rfid", "--method", "rtn"], "give --profile or --calibration"),
        (source, ["--scheme", "pmq_re", "--method", "rtn", *stats], "has other weights"),
        (folder, ["--scheme", "layer", "--method", "rtn"], "knows no bound"),
        (folder, ["--scheme", "mxmoe_re", "--method", "hqq", *stats], "each linear block a width"),
        (folder, ["--scheme", "pmq_re", "--widths", "9", "--method", "rtn", *stats], "width 9"),
        (folder, ["--scheme", "pmq_re", "--seed", "1", *stats], "--seed is for scheme mptqs_re"),
        (folder, ["--widths", "2-3"], "--widths is for schemes of widths"),
    ):
        ran = run("plan", src, "--bpw", 4, *options, "-o", out)
        assert ran.code == 2, options
        assert message in ran.stderr, ran.stderr
        assert "Traceback" not in ran.stderr
    assert not out.exists()
    # Counts alone are enough for RFID's score, and for the control nothing is needed.
    for options in (["--scheme", "rfid", "--profile", measured["profile"]],
                    ["--scheme", "mptqs_re", "--seed", 3, "--widths", "2,4"]):  # fmt: skip
        ran = run("plan", source, "--bpw", 4, "--method", "rtn", *options, "-o", out, "--json")
        assert ran.code == 0, ran.stderr


@pytest.mark.slow
def test_a_budget_that_rounding_cannot_meet(
    run: Run, mapped: tuple[Path, Path], calibrated: Path, tmp_path: Path
) -> None:
    """Found out when a search begins: nothing of it is left."""
    ran = run("plan", mapped[0], "--calibration", calibrated, "--bpw", 0.2, "--problems", 3,
              "-o", tmp_path / "plan.json")  # fmt: skip
    assert ran.code == 2
    assert "--bpw 0.2 cannot be met" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_bad_input(run: Run, source: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert run("plan", source, "--bpw", "6", "-o", out).code == 0
    written = out.read_bytes()
    sensitivity = measured["sensitivity"]
    for options, message in (
        (["--bpw", "3", "--ratio", "2"], "--bpw and --ratio"),
        ([], "expected one of --bpw, --ratio, --max-kl, found none"),
        (["--bpw", "0"], "--bpw"),
        (["--bpw", "0.01"], "bits per weight"),
        (["--max-kl", "1"], "give --sensitivity or --study"),
        (["--bpw", "6", "--scheme", "rfid"], "give --profile"),
        (["--bpw", "6", "--profile", sensitivity], "expected format 'moebound.profile'"),
        (["--bpw", "6", "--sensitivity", tmp_path / "none"], "none"),
        (["--bpw", "6", "--study", tmp_path], "rows.jsonl: cannot be read"),
        (["--bpw", "6", "--sensitivity", sensitivity, "--study", tmp_path], "one of them"),
    ):
        ran = run("plan", source, *options, "-o", out)
        assert ran.code == 2, options
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr
    assert out.read_bytes() == written
    for option in (["--rate", "0.1"], ["--scope", "matrix"], ["--layers", "1"],
                   ["--experts", "1"], ["--shared-experts"]):  # fmt: skip
        ran = run("compress", source, tmp_path / "dst", "--plan", out, *option)
        assert ran.code == 2
        assert option[0] in ran.stderr
    ran = run("compress", source, tmp_path / "dst", "--plan", sensitivity)
    assert ran.code == 2
    assert "expected format 'moebound.plan'" in ran.stderr
    document = json.loads(written)
    del document["experts"][2]
    out.write_text(json.dumps(document))
    ran = run("compress", source, tmp_path / "dst", "--plan", out)
    assert ran.code == 2
    assert "the plan does not fit the checkpoint: it lacks layer 1 expert 2" in ran.stderr
    assert not (tmp_path / "dst").exists()
    assert run("card", source).code == 2
