"""What a model would become: counts as published, sizes as written, memory as there is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.errors import CheckpointError, UnsupportedArchitectureError
from moebound.fit import (
    KNOWN,
    Estimate,
    Machine,
    all_running,
    estimate,
    estimate_store,
    shape_of,
)
from moebound.fit.estimate import ROOM, _encoded_other
from moebound.fit.experts import Linears, linears_like
from moebound.fit.running import measure_machine
from moebound.offload.codes import SLOTS, SlotsName
from moebound.offload.timing import LAYER_S
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import MakeTiny

# Billions of weights, as whoever published the model says.
PUBLISHED = {
    "Moonlight-16B-A3B": 16.0,
    "DeepSeek-V2-Lite": 15.7,
    "OLMoE-1B-7B": 6.92,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "GPT-OSS-20B": 20.9,
    "Qwen3-30B-A3B": 30.5,
    "Phi-3.5-MoE": 41.9,
    "Mixtral-8x7B": 46.7,
    "GLM-4.5-Air": 106,
    "GPT-OSS-120B": 117,
    "Qwen3-235B-A22B": 235,
    "DeepSeek-V3": 671,
    "Kimi-K2": 1026,
}


def test_every_known_model_has_a_published_size() -> None:
    assert PUBLISHED.keys() == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_weights_are_as_many_as_published(name: str) -> None:
    shape = shape_of(name.upper())
    assert shape.name == name
    assert shape.n_weights / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    assert 0.8 < shape.n_expert_weights / shape.n_weights < 1
    assert shape.n_expert_weights == shape.expert_size * shape.n_experts * shape.layers
    assert sum(rows * columns for rows, columns in shape.expert) == shape.expert_size
    assert shape.runs.how == "offloaded"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "jetmoe"])
def test_shapes_are_those_of_a_checkpoint(name: str, tiny: MakeTiny) -> None:
    folder = tiny(name)
    checkpoint = open_checkpoint(folder)
    shape = shape_of(folder)
    experts = checkpoint.experts()
    assert shape.n_expert_weights == sum(expert.size for expert in experts)
    assert shape.layers == len({expert.key.layer for expert in experts})
    assert shape_of(folder / "config.json") == replace(shape, name=str(folder / "config.json"))


def test_sizes_are_those_of_a_store(tmp_path: Path) -> None:
    """A built-in model's experts, trained, against random ones of their shape."""
    found = estimate(shape_of("builtin:wordmath-mixtral"), [0.3])[0]
    summary = compress("builtin:wordmath-mixtral", tmp_path / "s",
                       bound=ErrorBound(0.3, "rate", "expert"))  # fmt: skip
    assert found.bits == pytest.approx(summary.expert_bits_per_weight, abs=0.15)
    _, stored = estimate_store(tmp_path / "s", shape_of(tmp_path / "s"))
    for slots in SLOTS:
        everything = stored.experts.everything[slots]
        assert found.experts.everything[slots] == pytest.approx(everything, rel=0.02)


def fits(memory: float) -> Estimate:
    """Of a model with 12.8 GB of experts and 1.9 GB of the rest."""
    shape = replace(shape_of("OLMoE-1B-7B"), n_weights=7_350_000_000)
    return estimate(shape, [0.3], memory=int(memory))[0]


@pytest.mark.parametrize(
    ("gigabytes", "where"), [(3, "no"), (5, "disk"), (12, "memory"), (18, "decoded")]
)
def test_where_experts_lie_in_so_much_memory(gigabytes: float, where: str) -> None:
    found = fits(1e9 * gigabytes)
    assert found.fits is not None
    assert found.fits.where == where
    assert (found.fits.held == 1) == (where == "decoded")
    assert (found.fits.held == 0) == (where == "no")


def test_a_narrower_bound_is_larger() -> None:
    narrow, wide = estimate(shape_of("OLMoE-1B-7B"), [0.1, 0.8])
    assert narrow.bits > wide.bits + 2
    assert narrow.model_bytes > wide.model_bytes > wide.expert_bytes


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "olmoe-1b-7b", "--rate", "0.3", "--ram", "16GB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (model,) = document["models"]
    assert model["model"] == "OLMoE-1B-7B"
    assert model["rates"][0]["fits"]["where"] == "memory" or model["rates"][0]["fits"]["held"] == 1
    assert main(["fit", "olmoe-1b-7b", "--rate", "0.3"]) == 0
    assert "Computed, not tried" in capsys.readouterr().out


def test_what_cannot_be_said(tmp_path: Path, tiny: MakeTiny) -> None:
    with pytest.raises(CheckpointError, match="Known by name are Moonlight"):
        shape_of(tmp_path / "nowhere")
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedArchitectureError, match="is dense"):
        shape_of(dense)
    shutil.copytree(tiny("qwen3_moe"), tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CheckpointError, match="no_such_model"):
        shape_of(tmp_path / "other")
    assert main(["fit"]) == main(["fit", "--known", "Kimi-K2"]) == 2


RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_rates_of_the_road_are_those_that_were_measured() -> None:
    road = import_module("moebound.fit.road")  # the name is the function's, too
    found = json.loads((RESULTS / "compress_checkpoint.json").read_bytes())
    assert found["n_weights"] == road.CHECKPOINT_WEIGHTS
    for name, seconds, mib in (
        ("compress", road.COMPRESS_S, road.COMPRESS_MIB),
        ("verify_against", road.VERIFY_S, road.VERIFY_MIB),
        ("decompress", road.DECOMPRESS_S, road.DECOMPRESS_MIB),
    ):
        assert (found[name]["seconds"], found[name]["peak_mib"]) == (seconds, mib)
    layer = json.loads((RESULTS / "calibrate_layer.json").read_bytes())
    assert layer["n_weights"] == road.CALIBRATED_WEIGHTS
    assert layer["compress"]["cpu_seconds"] == road.CALIBRATED_CPU_S
    assert layer["compress"]["peak_mib"] == road.CALIBRATED_MIB


def test_more_machines_take_less_time(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for machines in ("1", "8"):
        command = ["fit", "DeepSeek-V2-Lite", "--rate", "0.3", "--steps", "--json"]
        assert main([*command, "--machines", machines]) == 0
        [model] = json.loads(capsys.readouterr().out)["models"]
        steps = {step["name"]: step for step in model["steps"]}
        assert steps["compress --rate"]["disk"] == model["rates"][0]["model_bytes"]
        seconds.append(steps["compress --rate"]["seconds"])
        # The moments of every expert: half of two matrices, in float32.
        n = model["layers"] * model["experts_per_layer"]
        out, inner = model["expert_shapes"][-1]
        one = 2 * (out * (out + 1) + inner * (inner + 1))
        assert steps["calibrate"]["disk"] == n * one
    assert seconds[0] == pytest.approx(8 * seconds[1])


MACHINE = Machine("a processor", 2, {"values": 1e-3, "codes": 8e-4, "codes4": 6e-4}, 20e9, 1e9)


def test_codes_hold_twice_or_four_times_the_experts_and_need_less() -> None:
    shape = shape_of("OLMoE-1B-7B")
    sizes = estimate(shape, [0.3])
    memory = int(ROOM) + 2 * shape.n_other_weights + 3_000_000_000  # a quarter of all experts
    whole, *ways = all_running(shape, sizes, MACHINE, memory)
    assert (whole.slots, whole.rate, whole.where) == ("values", None, "disk")
    assert [(way.slots, way.rate) for way in ways] == [(slots, 0.3) for slots in SLOTS]
    values, codes, codes4 = ways
    assert codes.held == pytest.approx(2 * values.held, rel=0.02)
    assert 3.5 * values.held < codes4.held < 4 * values.held  # patches stand beside
    # One token's experts and one more, and one in each of the other layers.
    working = (shape.top_k + shape.layers) * shape.expert_size
    assert values.floor_bytes - codes.floor_bytes == pytest.approx(working, rel=0.02)
    assert codes.floor_bytes - codes4.floor_bytes == pytest.approx(working / 2, rel=0.2)
    assert None not in (whole.seconds, *(way.seconds for way in ways))
    for way in ways:
        [at] = [w for w in all_running(shape, sizes, MACHINE, way.floor_bytes)
                if (w.rate, w.slots) == (0.3, way.slots)]  # fmt: skip
        assert at.where == "disk"
        [below] = [w for w in all_running(shape, sizes, MACHINE, way.floor_bytes - 1)
                   if (w.rate, w.slots) == (0.3, way.slots)]  # fmt: skip
        assert (below.where, below.seconds) == ("no", None)


def test_a_rate_that_is_too_fine_has_no_codes() -> None:
    shape = shape_of("OLMoE-1B-7B")
    rates: dict[float, list[SlotsName]] = {
        0.02: ["values"],
        0.1: ["values", "codes"],
        0.3: [*SLOTS],
    }
    sizes = estimate(shape, list(rates))
    for found, kinds in zip(sizes, rates.values(), strict=True):
        assert list(found.experts.everything) == list(found.experts.floor) == kinds
        for slots in SLOTS:
            assert (found.decode_of(slots) > 0) == (slots in kinds)
    ways = all_running(shape, sizes, MACHINE, 8_000_000_000)
    assert [(way.rate, way.slots) for way in ways[1:]] == [
        (rate, slots) for rate, kinds in rates.items() for slots in kinds
    ]


def test_more_memory_takes_less_time_until_all_is_there() -> None:
    shape = shape_of("OLMoE-1B-7B")
    sizes = estimate(shape, [0.3])
    seconds = []
    for memory in (4e9, 8e9, 12e9, 20e9, 40e9):
        way = all_running(shape, sizes, MACHINE, int(memory))[1]
        assert way.seconds is not None
        seconds.append(way.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert way.where == "decoded"
    other = 2 * shape.n_read / MACHINE.memory + LAYER_S * shape.layers
    assert way.seconds == pytest.approx(other + shape.layers * shape.top_k * 1e-3)


def test_a_layout_that_has_no_codes() -> None:
    shape = shape_of("GPT-OSS-20B")
    assert not shape.codes
    ways = all_running(shape, estimate(shape, [0.3]), MACHINE, 16_000_000_000)
    assert {way.slots for way in ways} == {"values"}


def test_seconds_of_a_layer_are_those_that_were_measured() -> None:
    document = json.loads((RESULTS / "offload-codes.json").read_bytes())
    [row] = [r for r in document["rows"] if (r["name"], r["budget"]) == ("raw, disk", 1.0)]
    stats, layers, top_k = row["stats"], 4, 6
    expert = 2 * 3 * 2048 * 1408
    n = stats["steps"]
    speed = layers * top_k * expert * n / stats["compute_s"]
    outside = (stats["step_s"] - stats["experts_s"]) / n - 186e6 / speed
    handling = (stats["experts_s"] - stats["compute_s"] - sum(stats["stall_s"].values())) / n
    assert pytest.approx(outside / 5 + handling / 4, rel=0.35) == LAYER_S


def test_memory_and_plot_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "fit.png"
    command = ["fit", "OLMoE-1B-7B", "--rate", "0.3", "--ram", "8GB", "--disk", "2GB"]
    assert main([*command, "--plot", str(plot), "--json"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert model["machine"]["disk"] == 2e9
    assert [way["slots"] for way in model["running"]] == ["values", *SLOTS]
    assert model["rates"][0]["codes4_s"] > 0
    assert model["rates"][0]["two_cores_s"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Computed, not tried, from what was measured now on this machine" in shown
    assert "disk of 2.0 GB/s" in shown
    assert main(["fit", "OLMoE-1B-7B", "--plot", str(tmp_path / "fit.txt")]) == 2


def test_products_are_measured_with_weights_and_codes() -> None:
    found = measure_machine(shape_of("OLMoE-1B-7B"))
    assert tuple(found.compute_s) == SLOTS
    assert min(*found.compute_s.values(), found.memory) > 0


def test_linear_layers_as_codes() -> None:
    """Less memory and less to read, by what one random matrix takes; as it is, nothing changes."""
    shape = shape_of("Moonlight-16B-A3B")
    assert 0.8 * shape.n_read < shape.n_linear < shape.n_read
    [sizes] = estimate(shape, [0.3], others=0.3, linears="codes4")
    held = {"codes4": sizes.linears}
    other = _encoded_other(0.3, 0)
    assert other is not None
    held["codes"] = linears_like(other, shape.n_linear, "codes")
    assert all(found.weights == {kind: shape.n_linear} for kind, found in held.items())
    plain, *_ = values = all_running(shape, [replace(sizes, linears=Linears())], MACHINE, 16 << 30)
    for kind, share in (("codes", 1), ("codes4", 0.5)):
        ways = all_running(shape, [replace(sizes, linears=held[kind])], MACHINE, 16 << 30)
        assert ways[0] == plain
        saved = values[1].floor_bytes - ways[1].floor_bytes
        assert (1.9 - share) * shape.n_linear < saved < (2 - share) * shape.n_linear
        assert (ways[1].seconds or 9) < (values[1].seconds or 0)
    fine = _encoded_other(0.1, 0)
    assert fine is not None
    assert linears_like(fine, 10**9, "codes4").weights == {"codes": 10**9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ram", "16GB"], "--others is a rate"),
        (["--others", "0.3"], "is for --ram"),
        (["--others", "0.3", "--device", "24GB", "--ram", "16GB"], "on a CPU"),
    ],
)
def test_where_linear_layers_have_no_codes(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "olmoe-1b-7b", "--linears", "codes", *options]) == 2
    assert message in capsys.readouterr().err
