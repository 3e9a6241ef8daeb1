"""What lies where with a GPU: counts that add up, and rows that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from moebound.cli.main import main
from moebound.fit import (
    H200,
    H200_LINK,
    LINK,
    Estimate,
    Host,
    Shape,
    estimate,
    known,
    place,
    place_all,
    shape_of,
    tiers_of,
)
from moebound.offload.choose import FREE_SHARE, preferred
from moebound.offload.tiers import TierName
from moebound.offload.timing import LAYER_S

RESULTS = Path(__file__).parents[2] / "bench" / "results"
GPU = known(link=None)
HOST = Host(ram=32_000_000_000, cores=2)


@cache
def olmoe() -> tuple[Shape, Estimate]:
    shape = shape_of("OLMoE-1B-7B")
    return shape, estimate(shape, [0.3], codec="bound:segment=gpu")[0]


@pytest.mark.parametrize("tier", ["device", "ram", "disk"])
@pytest.mark.parametrize("host", [HOST, Host(cores=2)])
def test_bytes_add_up_and_the_least_is_the_least(tier: TierName, host: Host) -> None:
    shape, sizes = olmoe()
    least = place(shape, sizes, tier, GPU, 0, host).floor_bytes
    for memory in (least, least + 1, least + 500_000_000, 8_000_000_000, 40_000_000_000):
        found = place(shape, sizes, tier, GPU, memory, host)
        assert found.seconds is not None
        taken = found.other_bytes + found.room_bytes + found.buffer_bytes + found.budget_bytes
        assert taken <= memory
        assert found.cache_bytes >= sizes.experts.floor["values"]
        if found.decoded < 1 and found.compressed in (0, 1):
            assert taken == memory  # nothing is left over
        n = sizes.experts.n_asked
        if tier == "device":
            assert found.compressed >= 1 / n
            waiting = n - round(found.compressed * n)
            assert found.rest_bytes == waiting * sizes.experts.largest
            assert found.rest == ("ram" if found.rest_bytes <= host.pinned else "disk")
    below = place(shape, sizes, tier, GPU, least - 1, host)
    assert (below.seconds, below.budget_bytes, below.decoded, below.compressed) == (None, 0, 0, 0)


def seconds_of(
    tier: TierName, memory: int, *, link: float | None = None, speed: float = 1
) -> float:
    found = place(*olmoe(), tier, known(link=link, speed=speed), memory, HOST).seconds
    assert found is not None
    return found


def test_more_memory_and_a_faster_link_never_cost() -> None:
    tiers: tuple[TierName, ...] = ("device", "ram", "disk")
    for tier in tiers:
        seconds = [seconds_of(tier, memory * 500_000_000) for memory in range(6, 36, 3)]
        # A launch is for more experts where more are missing, so steps are not quite downwards.
        assert all(b <= 1.03 * a for a, b in pairwise(seconds))
    slow = seconds_of("ram", 6_000_000_000, link=10e9)
    fast = seconds_of("ram", 6_000_000_000, link=55e9)
    half = seconds_of("ram", 6_000_000_000, link=55e9, speed=0.5)
    assert fast < min(slow, half)
    there = place(*olmoe(), "device", GPU, 9_000_000_000, HOST)
    assert there.compressed == 1
    # A miss crosses no bus.
    assert there.seconds == seconds_of("device", 9_000_000_000, link=1.0)


def test_where_experts_can_wait() -> None:
    shape, sizes = olmoe()
    assert tiers_of(shape, sizes, HOST) == ("disk", "ram", "device")
    assert tiers_of(shape, sizes, Host()) == ("disk", "device")
    assert tiers_of(shape, None, HOST) == ("disk", "ram")
    assert HOST.pinned == int(30.5e9 * FREE_SHARE)
    alone = replace(sizes, experts=replace(sizes.experts, device=None))  # of another codec
    assert tiers_of(shape, alone, Host()) == ("disk",)
    [[whole], ways] = place_all(shape, [sizes], GPU, 6_000_000_000, Host(cores=2))
    assert (whole.tier, whole.rate) == ("disk", None)
    assert [way.tier for way in ways] == ["device", "disk"]
    seconds = [way.seconds or 0 for way in ways]
    assert seconds == sorted(seconds)
    # All decoded is as fast anywhere: then as load has it, on disk.
    assert place_all(shape, [sizes], GPU, 40_000_000_000, HOST)[1][0].tier == "disk"


def test_all_decoded_is_products_and_the_rest() -> None:
    shape, sizes = olmoe()
    found = place(shape, sizes, "disk", GPU, 40_000_000_000, HOST)
    assert found.decoded == 1
    products = shape.layers * shape.top_k * GPU.compute_s(2 * shape.expert_size)
    other = 2 * shape.n_read / GPU.memory + shape.layers * LAYER_S
    assert found.seconds == pytest.approx(products + other)


def test_the_first_way_is_left_for_one_that_is_faster_by_the_margin() -> None:
    assert preferred([1.0, 0.99, 1.5]) == 0
    assert preferred([1.0, 0.97, 0.96]) == 2


def test_rows_are_those_that_were_measured() -> None:
    document = json.loads((RESULTS / "gpu.json").read_bytes())
    assert document["environment"]["gpu"]["name"] == H200.name
    expert = 3 * 2048 * 1408
    for segment, points in H200.decode.items():
        rows = {
            row["n_experts"] * expert: row["expand"]["p50_s"] + row["decode"]["p50_s"]
            for row in document["decode"]
            if (row["kind"], row["rate"], row["segment_weights"], row["aligned"])
            == ("gaussian-rows-cols", 0.3, segment, True)
            and row["schedule"] == {"together": 1, "wide": None}
        }
        assert dict(points) == pytest.approx(rows, rel=1e-4)
    host = {r["n_experts"]: r for r in document["host"] if r["kind"] == "gaussian-rows-cols"}
    assert dict(H200.launch) == pytest.approx(
        {n: row["resident"]["p50_s"] for n, row in host.items()}, rel=1e-4
    )
    heads = host[1]["read"]["p50_s"] + host[1]["plan"]["p50_s"]
    assert pytest.approx(heads, rel=1e-4) == H200.parse_s
    copies = {(r["what"], r["rate"], r["n_experts"]): r for r in document["transfer"]}
    assert copies["compressed copy", 0.3, 1]["n_bytes"] == H200.parse_bytes
    raw = copies["raw copy", 0.3, 64]
    assert pytest.approx(raw["n_bytes"] / raw["total"]["p50_s"], rel=0.01) == H200_LINK
    assert LINK < H200_LINK


@pytest.mark.parametrize(
    ("file", "n_bytes", "weights", "together"),
    [("moonlight", 3_390_000, 3 * 2048 * 1408, 8), ("mixtral", 69_100_000, 3 * 4096 * 14336, 3)],
)
def test_misses_are_as_load_measured_them(
    file: str, n_bytes: int, weights: int, together: int
) -> None:
    """On that H200, of a store in `gpu` segments, in pinned memory: the speeds that a load found,
    and the products that it timed."""
    document = json.loads((RESULTS / f"offload_gpu-{file}.json").read_bytes())
    [row] = [r for r in document["rows"] if r["source"] == "compressed"]
    found = row["stats"]["choice"]
    gpu = known(link=H200_LINK)
    computed = gpu.over_s(n_bytes) + gpu.miss_s(together, weights, 1 << 14)
    assert computed == pytest.approx(found["speeds"]["decode_s"], rel=0.15)
    [raw] = [r for r in document["rows"] if r["source"] == "raw"]
    measured = raw["stats"]["choice"]["costs"]["compute_s"]
    assert gpu.compute_s(2 * weights) == pytest.approx(measured, rel=1e-3)


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "fit.png"
    command = ["fit", "OLMoE-1B-7B", "--rate", "0.3", "--device", "6GB", "--device-speed", "1"]
    assert main([*command, "--ram", "16GB", "--plot", str(plot), "--json"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert [(way["rate"], way["tier"]) for way in model["placing"]][:2] == [
        (None, "disk"),
        (0.3, "device"),
    ]
    assert (model["gpu"]["name"], model["gpu"]["measured"]) == ("NVIDIA H200", False)
    assert model["rates"][0]["device_beside_bytes"] > 0
    assert "running" not in model
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--link", "55GB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Times are computed, not tried, from rows measured on one NVIDIA H200" in shown
    assert "a link of 55.0 GB/s (--link)" in shown
    assert "No RAM is counted on" in shown
    assert main(["fit", "OLMoE-1B-7B", "--link", "55GB"]) == 2
    assert main(["fit", "OLMoE-1B-7B", "--device", "large"]) != 0
    assert "--device 'large': expected a size" in capsys.readouterr().err
