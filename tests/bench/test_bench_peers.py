"""Peers: the protocol with a program that rounds, what is refused, and the real ones where their
environments are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moebound.bench.quality as quality
from moebound.bench.peers import (
    CalibrationText,
    Peer,
    get_peer,
    is_answered,
    run_peer,
    text_of,
)
from moebound.bench.peers.environments import PACKAGES, SCRIPT
from moebound.bench.peers.settings import PROGRAMS
from moebound.bench.quality import Peers, QualityReport, run
from moebound.bench.quality_table import render_quality
from moebound.calibrate import collect, of_task
from moebound.checkpoint import open_checkpoint, read_tensor
from moebound.cli.main import main
from moebound.errors import (
    BackendUnavailable,
    MethodError,
    MoeboundError,
    UnsupportedArchitectureError,
)
from moebound.evaluate.loading import load
from moebound.files.formats.statistics import Statistics, read_statistics
from moebound.plan import Budget, Evidence, make_plan
from moebound.store import measure_sizes
from moebound.tasks import get_task
from moebound.wordmath.builtin import MODELS
from tiny_models import MakeTiny
from untrained import untrained

ENVIRONMENTS = os.environ.get("MOEBOUND_PEER_ENVIRONMENTS")
"""A folder that the script made, for the tests of real peers."""

ROUNDS = f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
from pathlib import Path
import numpy as np
from peer_exchange import main, read_weights, write_checkpoint

def run(request, answer):
    (Path(__file__).parent / "runs").open("a").write("x")
    made, top = {{}}, 2 ** (request.setting["bits"] - 1) - 1
    for name, values in read_weights(request, set(request.experts.values())):
        step = np.abs(values).max(axis=1, keepdims=True) / top
        made[name] = np.rint(values / step) * step
    if request.setting.get("fails"):
        raise SystemExit("it does not like " + next(iter(made)))
    if request.setting.get("forgets"):
        made.popitem()
    write_checkpoint(request, answer / "checkpoint", made)
    if request.setting.get("harms"):
        name, values = next(
            pair for pair in read_weights(request) if pair[0] not in made and "norm" in pair[0]
        )
        write_checkpoint(request, answer / "other", made | {{name: values + 1}})
        (answer / "checkpoint").rename(answer / "unused")
        (answer / "other").rename(answer / "checkpoint")
    n = sum(v.size for v in made.values())
    return {{
        "library": "rounding", "library_version": "1", "settings": dict(request.setting),
        "parts": {{"integers": n * request.setting["bits"] // 8,
                   "steps": sum(4 * len(v) for v in made.values())}},
        "remarks": [f"{{len(request.rows)}} sequences, {{len(request.importance())}} matrices"],
    }}

main(run)
"""


@pytest.fixture
def rounds(tmp_path: Path) -> Callable[..., tuple[Peer, Path]]:
    """A peer that rounds each row, and the folder with its environment: this interpreter."""
    program = tmp_path / "rounds.py"
    program.write_text(ROUNDS, encoding="utf-8")
    python = tmp_path / "environments" / "here" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)

    def make(setting: str = "rounds:int5", **asked: Any) -> tuple[Peer, Path]:
        return Peer(setting, "here", program, {"bits": 5, **asked}), tmp_path / "environments"

    return make


def _text(checkpoint: Any) -> CalibrationText:
    ones = {
        matrix.name: np.ones(matrix.shape[1], np.float32)
        for expert in checkpoint.experts()
        for matrix in expert.matrices
    }
    return CalibrationText("0" * 64, ((5, 6, 7), (8, 9)), ones)


def test_a_peer_gives_a_checkpoint_and_its_bytes_and_is_not_run_twice(
    rounds: Callable[..., tuple[Peer, Path]], tmp_path: Path
) -> None:
    peer, environments = rounds()
    checkpoint = open_checkpoint(str(untrained(tmp_path / "model")))
    assert not is_answered(peer, tmp_path / "work")
    made = run_peer(
        peer, checkpoint, _text(checkpoint), tmp_path / "work", environments=environments
    )
    n_weights = sum(expert.size for expert in checkpoint.experts())
    rows = sum(m.shape[0] for expert in checkpoint.experts() for m in expert.matrices)
    assert made.n_bytes == n_weights * 5 // 8 + 4 * rows
    n_matrices = sum(len(expert.matrices) for expert in checkpoint.experts())
    assert made.about["remarks"] == [f"2 sequences, {n_matrices} matrices"]
    assert made.about["library"] == "rounding"
    # What it wrote is what it rounded, cast to the dtype of the checkpoint.
    changed = open_checkpoint(str(made.checkpoint))
    expert = checkpoint.experts()[3]
    before = checkpoint.read(expert.matrices[0]).astype(np.float32)
    step = np.abs(before).max(axis=1, keepdims=True) / 15
    after = read_tensor(changed.tensors[expert.matrices[0].name])
    np.testing.assert_array_equal(after, (np.rint(before / step) * step).astype(after.dtype))
    assert 0 < made.max_abs_error < 2 * step.max()

    # The same again, with no environment: it is kept. With another setting it is not.
    again = run_peer(peer, checkpoint, _text(checkpoint), tmp_path / "work")
    assert again == made
    other, _ = rounds(bits=4)
    run_peer(other, checkpoint, _text(checkpoint), tmp_path / "work", environments=environments)
    assert (tmp_path / "runs").read_text() == "xx"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"harms": True}, "which is no routed expert's: only experts may differ"),
        ({"fails": True}, r"ended with 1(?s:.)*it does not like"),
        ({"forgets": True}, "left out 1 of the matrices"),
    ],
)
def test_what_a_peer_must_not_do(
    rounds: Callable[..., tuple[Peer, Path]], tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    peer, environments = rounds(**asked)
    checkpoint = open_checkpoint(str(untrained(tmp_path / "model")))
    with pytest.raises(MethodError, match=message):
        run_peer(peer, checkpoint, _text(checkpoint), tmp_path / "work", environments=environments)


def test_bytes_that_are_none(rounds: Callable[..., tuple[Peer, Path]], tmp_path: Path) -> None:
    peer, environments = rounds()
    checkpoint = open_checkpoint(str(untrained(tmp_path / "model")))
    text, work = _text(checkpoint), tmp_path / "work"
    run_peer(peer, checkpoint, text, work, environments=environments)
    file = work / "rounds-int5" / "answer" / "peer.json"
    said = json.loads(file.read_text())
    for wrong in (0, "many", None):
        file.write_text(json.dumps({**said, "n_bytes": wrong}))
        with pytest.raises(MethodError, match="n_bytes: expected a whole number"):
            run_peer(peer, checkpoint, text, work)
    file.write_text(json.dumps({**said, "format": "other"}))
    with pytest.raises(MethodError, match="expected format"):
        run_peer(peer, checkpoint, text, work)


def test_an_environment_that_is_not_there_names_the_script(
    rounds: Callable[..., tuple[Peer, Path]], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(untrained(tmp_path / "model")))
    for setting, name in (("gptq:int4:g128", "llmcompressor"), ("gguf:iq3_s", "llamacpp")):
        with pytest.raises(BackendUnavailable, match=f"{SCRIPT} FOLDER {name}"):
            run_peer(get_peer(setting), checkpoint, _text(checkpoint), tmp_path / "work")
        with pytest.raises(BackendUnavailable, match=f"{SCRIPT} {tmp_path}/none {name}"):
            run_peer(
                get_peer(setting), checkpoint, _text(checkpoint), tmp_path / "work",
                environments=tmp_path / "none",
            )  # fmt: skip
        assert name in PACKAGES


def test_checkpoints_with_fused_experts_are_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny("gpt_oss")))
    with pytest.raises(UnsupportedArchitectureError, match="several matrices in one"):
        run_peer(get_peer("gguf:q4_k_m"), checkpoint, _text(checkpoint), tmp_path)


def test_settings() -> None:
    assert get_peer("gptq:int4:g128").asked == {
        "method": "gptq", "symmetric": True, "routed": False, "bits": 4, "group": 128,
    }  # fmt: skip
    assert not get_peer("awq:int3:g64").asked["symmetric"]
    assert get_peer("awq:int3:g64:sym:routed").asked["routed"]
    assert get_peer("autoround:int2:g64:i1000").asked["iters"] == 1000
    assert get_peer("gguf:iq2_xxs").asked == {"type": "iq2_xxs"}
    for wrong in ("exl3:4", "gptq", "gptq:int9:g64", "gptq:int4:g64:odd", "gguf:", "gguf:../x"):
        with pytest.raises(MethodError, match=r"expected"):
            get_peer(wrong)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Statistics]:
    """The second model, untrained, and statistics of a few problems."""
    folder = tmp_path_factory.mktemp("calibrated")
    source = str(untrained(folder / "model", MODELS[1]))
    loaded, task = load(source), get_task("wordmath")
    return source, collect(loaded, of_task(loaded, task, 4, skip=7), folder / "stats")


def test_the_text_of_statistics_is_found_again(
    calibrated: tuple[str, Statistics], tmp_path: Path
) -> None:
    source, statistics = calibrated
    loaded, checkpoint = load(source), open_checkpoint(source)
    text = text_of(loaded, checkpoint, statistics)
    assert text.rows == of_task(loaded, get_task("wordmath"), 4, skip=7).rows
    assert text.sha256 == statistics.of.text_sha256
    expert = checkpoint.experts()[5]
    down = expert.matrices[-1]
    n = statistics.tokens()[expert.key]
    expected = np.diagonal(statistics.moments(expert.key, "hidden")) / max(n, 1)
    np.testing.assert_allclose(text.importance[down.name], expected if n else 1, rtol=1e-6)

    file = tmp_path / "text.txt"
    file.write_text("What is 3 plus 4?\n" * 400, encoding="utf-8")
    with pytest.raises(MoeboundError, match=r"is not in .*text\.txt"):
        text_of(loaded, checkpoint, statistics, file)


def _run(source: str, statistics: Statistics, peers: Peers, **more: Any) -> QualityReport:
    return run(
        source, get_task("wordmath"), quantizers=(), peers=peers, calibration=statistics,
        **{"limit": 4, "rows": peers.work, **more},
    )  # fmt: skip


@pytest.mark.slow
def test_rows_of_a_peer_and_ours_at_its_bytes_go_on_after_an_interruption(
    rounds: Callable[..., tuple[Peer, Path]],
    calibrated: tuple[str, Statistics],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, statistics = calibrated
    known = {f"rounds:{name}": rounds(f"rounds:{name}")[0] for name in ("a", "b")}
    _, environments = rounds()
    monkeypatch.setattr(quality, "get_peer", known.__getitem__)
    peers = Peers(tuple(known), tmp_path / "work", environments)

    # Interrupted while the second row is made.
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(quality, "stored", stop)
        with pytest.raises(KeyboardInterrupt):
            _run(source, statistics, peers)
    said: list[str] = []
    report = _run(source, statistics, peers, say=lambda what, *_: said.append(what))
    assert (tmp_path / "runs").read_text() == "xx"  # each once
    assert [(row.method, row.size_of) for row in report.rows] == [
        (method, of) for of in known for method in (of, "bound", "calibrated")
    ]
    peer, bound, ours = report.rows[:3]
    for row in (bound, ours):
        assert row.n_bytes_whole == pytest.approx(peer.n_bytes_whole, rel=1e-3)
    # The second peer has the same bytes: ours are not made twice.
    assert [row.score for row in report.rows[4:]] == [row.score for row in report.rows[1:3]]
    assert any("left" in text for text in said)

    document = report.to_json()
    assert document["calibration"]["text_sha256"] == statistics.of.text_sha256
    rest = sum(tensor.n_bytes for tensor in open_checkpoint(source).passthrough())
    for row in document["rows"]:
        assert row["n_bytes_whole"] == row["n_bytes"] + rest
        assert row["bits_per_weight"] < row["whole_bits_per_weight"] < 16
        fidelity = row["fidelity"]
        for kind in ("kl", "answer_kl"):
            assert 0 < fidelity[f"{kind}_nats"] < 1
            quantiles = [fidelity[f"{kind}_{name}_nats"] for name in ("median", "p99", "p999")]
            assert quantiles == sorted(quantiles)
            assert {f"{kind}_{name}_stderr" for name in ("median", "p99", "p999")} <= set(fidelity)
    assert document["rows"][0]["peer"]["library"] == "rounding"
    assert "peer" not in document["rows"][1]
    assert render_quality(report).row_count == 7

    sizes = measure_sizes(open_checkpoint(source))
    plans = [
        make_plan(sizes, Evidence(), Budget(bpw=bits), source=source)
        for bits in (bound.bits_per_weight, 3.0)
    ]
    monkeypatch.setattr(quality, "OF_THE_WHOLE", 0.05)  # a plan is not made to fit
    again = _run(source, statistics, peers, plans=plans)
    *before, first, second, apart = again.to_json()["rows"]
    assert before == document["rows"]
    assert [row["method"] for row in (first, second, apart)] == ["bound"] * 3
    assert [row["size_of"] for row in (first, second)] == list(known)
    assert apart["size_of"].startswith("plan ")
    assert apart["bits_per_weight"] < 3.01
    with pytest.raises(MoeboundError, match="rows are of another limit"):
        _run(source, statistics, peers, limit=3)


def test_what_is_asked_wrongly(
    calibrated: tuple[str, Statistics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, statistics = calibrated
    peers = Peers(("gptq:int4:g128",), tmp_path, tmp_path)
    with pytest.raises(BackendUnavailable, match="llmcompressor"):
        _run(source, statistics, peers)
    with pytest.raises(MoeboundError, match="give --calibration"):
        run(source, get_task("wordmath"), quantizers=(), peers=peers)
    with pytest.raises(MoeboundError, match="asked twice"):
        _run(source, statistics, Peers(("hqq:int4:g64",) * 2, tmp_path, tmp_path))
    words = ["bench", "quality", source, "--task", "wordmath", "--peers", "gguf:q4_k_m"]
    assert main(words) == 2
    assert "--work" in capsys.readouterr().err


REAL = (
    "gptq:int4:g128", "awq:int4:g128", "autoround:int4:g128", "hqq:int3:g64", "gguf:q4_k_m",
    "gguf:iq3_s",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("setting", REAL)
def test_real_peers(calibrated: tuple[str, Statistics], tmp_path: Path, setting: str) -> None:
    peer = get_peer(setting)
    if ENVIRONMENTS is None or not (Path(ENVIRONMENTS) / peer.environment).exists():
        pytest.skip(
            f"no environment {peer.environment}: make it with `{SCRIPT} FOLDER "
            f"{peer.environment}`, and name FOLDER in MOEBOUND_PEER_ENVIRONMENTS"
        )
    source, statistics = calibrated
    checkpoint = open_checkpoint(source)
    text = text_of(load(source), checkpoint, read_statistics(statistics.folder))
    made = run_peer(peer, checkpoint, text, tmp_path, environments=Path(ENVIRONMENTS))
    n_weights = sum(expert.size for expert in checkpoint.experts())
    bits = 8 * made.n_bytes / n_weights
    assert peer.asked.get("bits", 3) < bits < peer.asked.get("bits", 4.5) + 0.8
    # Every matrix is near what it was, and not the same.
    changed = open_checkpoint(str(made.checkpoint))
    for expert in checkpoint.experts():
        for matrix in expert.matrices:
            before = checkpoint.read(matrix).astype(np.float64)
            off = read_tensor(changed.tensors[matrix.name]).astype(np.float64) - before
            assert 0 < np.sqrt((off**2).sum() / (before**2).sum()) < 0.35
