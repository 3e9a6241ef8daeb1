"""The happy path of every command, for people and as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebound.types import ErrorBound
from tiny_models import MakeTiny

from .conftest import SRC, Run


def test_inspect_a_checkpoint(run: Run) -> None:
    ran = run("inspect", SRC)
    assert ran.code == 0
    for fact in ("deepseek_v3", "1664, 64 a layer", "1-26", "gate 32 x 64 BF16", "92.3 %"):
        assert fact in ran.stdout
    found = run("inspect", SRC, "--json").document
    assert found["kind"] == "checkpoint"
    assert found["n_experts"] == 1664
    assert found["layers"] == list(range(1, 27))
    assert found["experts_per_layer"] == [64]
    assert found["expert_bytes"] == 1664 * 3 * 2048 * 2
    assert found["shapes"][0] == {"role": "gate", "shape": [32, 64], "dtype": "BF16", "count": 1664}


def test_inspect_the_second_built_in_model(run: Run) -> None:
    ran = run("inspect", "builtin:wordmath-mixtral")
    assert ran.code == 0
    for fact in ("mixtral", "64, 8 a layer", "0-7", "gate 256 x 256 BF16", "88.3 %"):
        assert fact in ran.stdout
    found = run("inspect", "builtin:wordmath-mixtral", "--json").document
    assert found["layers"] == list(range(8))
    assert found["expert_bytes"] == 64 * 3 * 256 * 256 * 2
    assert found["n_shared_experts"] == 0


def test_inspect_a_store(run: Run, store: Path) -> None:
    ran = run("inspect", store)
    assert ran.code == 0
    assert "rate 0.3 per expert" in ran.stdout
    found = run("inspect", store, "--json").document
    assert found["kind"] == "store"
    assert found["bound"] == {"mode": "rate", "value": 0.3, "scope": "expert"}
    assert found["codecs"] == {"bound": 192}
    assert found["n_experts"] == 64
    assert 0 < found["worst"] <= 1
    assert found["ratio"] == found["expert_bytes_before"] / found["expert_bytes_after"]
    bits = 8 * found["expert_bytes_after"] / found["n_weights"]
    assert found["expert_bits_per_weight"] == pytest.approx(bits)


def test_inspect_a_lone_file(run: Run, store: Path) -> None:
    file = sorted(store.glob("*.safetensors"))[0]
    assert "single file" in run("inspect", file).stdout
    assert run("inspect", file, "--json").document["kind"] == "file"


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (["--rate", "0.3"], ErrorBound(0.3, "rate", "expert")),
        (["--rate", "0.3", "--scope", "matrix"], ErrorBound(0.3, "rate", "matrix")),
        (["--abs", "1e-2"], ErrorBound(0.01, "abs")),
        (["--range", "0.02"], ErrorBound(0.02, "range")),
        (["--rmse", "0.05"], ErrorBound(0.05, "rmse")),
    ],
)
def test_compress_with_each_bound(
    run: Run, tmp_path: Path, options: list[str], bound: ErrorBound
) -> None:
    dst = tmp_path / "store"
    ran = run("compress", SRC, dst, *options, "--layers", "2", "--experts", "0-2,7", "--json")
    assert ran.code == 0
    found = ran.document
    assert found["bound"] == bound.to_json()
    assert found["n_experts"] == 4
    assert 0 < found["worst"] <= 1
    assert run("verify", dst, "--against", SRC).code == 0


def test_average_promise_is_labelled(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "s", "--rmse", "0.1", "--layers", "1", "--experts", "0")
    assert "average promise" in ran.stdout


def test_compress_tells_both_sizes(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "s", "--rate", "0.5", "--layers", "1")
    assert ran.code == 0
    assert "bits per weight" in ran.stdout
    assert "whole model" in ran.stdout
    assert re.search(r"worst kept / asked +0\.", ran.stdout)


def test_exact_codec_needs_no_bound(run: Run, tmp_path: Path) -> None:
    dst = tmp_path / "store"
    ran = run("compress", SRC, dst, "--codec", "lossless", "--layers", "1", "--experts", "0")
    assert ran.code == 0
    assert "exact copy" in ran.stdout
    assert run("verify", dst, "--against", SRC, "--json").document["worst"] == 0


@pytest.mark.slow
def test_shared_experts_on_request(run: Run, tmp_path: Path) -> None:
    options = ["--rate", "0.3", "--layers", "1", "--json"]
    without = run("compress", SRC, tmp_path / "a", *options).document
    with_shared = run("compress", SRC, tmp_path / "b", *options, "--shared-experts").document
    assert with_shared["n_experts"] == without["n_experts"] + 1


def test_resume_takes_a_finished_store_as_it_is(run: Run, own_store: Path) -> None:
    again = ["compress", SRC, own_store, "--rate", "0.3", "--layers", "1", "--json"]
    assert run(*again).code == 2
    assert run(*again, "--resume").document["resumed"] is True
    assert run(*again, "--overwrite").document["resumed"] is False


def test_verify(run: Run, store: Path) -> None:
    ran = run("verify", store)
    assert ran.code == 0
    assert "good" in ran.stdout
    assert "as certified" in ran.stdout
    assert "measured again" in run("verify", store, "--against", SRC).stdout
    found = run("verify", store, "--json").document
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["n_experts"] == 64


def test_verify_by_statistics_that_are_not_there(run: Run, store: Path, tmp_path: Path) -> None:
    """That is a typing error, and no broken promise."""
    (tmp_path / "layer-0.safetensors").touch()
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "finishes it")):
        ran = run("verify", store, "--calibration", folder)
        assert ran.code == 2
        assert said in ran.stderr
    assert "moebound compress builtin:wordmath DST" in run("verify", SRC).stderr


def test_decompress(run: Run, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    found = run("decompress", store, out, "--json").document
    assert found["n_experts"] == 64
    assert run("inspect", out, "--json").document["kind"] == "checkpoint"
    again = run("decompress", store, out)
    assert again.code == 2
    assert str(out) in again.stderr
    assert run("decompress", store, out, "--overwrite").code == 0


def test_bench_gpu_needs_a_gpu(run: Run) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = run("bench", "gpu", "--json", "--rates", "0.3", "--experts", "1,2")
    assert ran.code == 2
    assert ran.document["ok"] is False
    assert "no CUDA device" in ran.stderr
    assert run("bench", "gpu", "--segments", "0").code == 2


@pytest.mark.slow
def test_bench_codec(run: Run) -> None:
    options = ["--limit", "1", "--rates", "0.3", "--codecs", "bound,sz3", "--seconds", "0.05"]
    ran = run("bench", "codec", "--input", SRC, *options, "--threads", "1")
    assert ran.code == 0
    assert "sz3" in ran.stdout
    found = run("bench", "codec", "--input", SRC, *options, "--json").document
    assert {row["asked"] for row in found["rows"]} == {"bound", "sz3"}


def test_quiet_says_nothing_but_the_result(run: Run, store: Path) -> None:
    ran = run("verify", store, "-q")
    assert ran.stderr == ""
    assert "good" in ran.stdout


def test_version(run: Run) -> None:
    from moebound import __version__

    ran = run("--version")
    assert ran.code == 0
    assert __version__ in ran.stdout


def test_inspect_says_what_runs_and_what_is_left_out(
    run: Run, tiny: MakeTiny, tmp_path: Path
) -> None:
    src = Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "src"))
    (src / "original").mkdir()
    document = run("inspect", src, "--json").document
    assert (document["runs"], document["why_not"]) == ("offloaded", None)
    assert list(document["left_out"]) == ["original"]
    config = json.loads((src / "config.json").read_text())
    changed = config | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "own.Config"}}
    (src / "config.json").write_text(json.dumps(changed))
    dst = tmp_path / "dst"
    compressed = run("compress", src, dst, "--rate", "1e9")
    assert compressed.code == 0
    assert "original: is a folder" in compressed.stdout
    assert "lets every weight of an expert become 0" in compressed.stdout
    for folder in (src, dst):
        ran = run("inspect", folder)
        assert (
            "never run: it can be compressed, verified and decompressed, but not run" in ran.stdout
        )
        assert "original: is a folder" in ran.stdout
        assert run("inspect", folder, "--json").document["runs"] == "no"


def test_a_config_that_is_a_pipe_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for command in (["inspect", tmp_path], ["verify", tmp_path]):
        ran = run(*command)
        assert ran.code == 2
        assert "internal error" not in ran.stderr
    assert "config.json (it is no ordinary file)" in run("inspect", tmp_path).stderr


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path, tiny: MakeTiny) -> None:
    folder = tmp_path / os.fsdecode(b"mod\xe8le")
    shutil.copytree(tiny("mixtral"), folder)
    done = subprocess.run(
        [sys.executable, "-m", "moebound", "inspect", folder],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"mod\udce8le" in done.stdout
