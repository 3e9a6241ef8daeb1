"""The tables of `moebound fit`, and the words under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moebound.cli import wording

if TYPE_CHECKING:
    from moebound.fit import Estimate, Gpu, Host, Machine, Placed, Running, Shape, Step

WORDS = (
    "Computed, not tried: random experts of these shapes were compressed here, and everything else "
    "as --others says.\nTime to compress is of this machine as it is now; "
    "that on two idle cores, and the memory, are by what\ncompressing 4.4 billion weights at rate "
    "0.3 took on an AMD EPYC (bench/results/compress_checkpoint.json). A rate\nbounds every "
    "weight's error, in mean |weight| of its expert."
)


def rate_json(shape: Shape, estimate: Estimate) -> dict[str, Any]:
    """One rate, for --json."""
    from moebound.fit import road

    if estimate.rate is None:  # a store is compressed already
        return {**estimate.to_json(), "two_cores_s": None, "compress_memory": None}
    step = road(shape, estimate)[0]
    return {**estimate.to_json(), "two_cores_s": step.seconds, "compress_memory": step.memory}


def table_lines(found: list[tuple[Shape, list[Estimate]]]) -> Any:
    """Sizes, and what it takes to get there."""
    from moebound.fit import road

    columns = ["model", "weights", "in experts", "in bfloat16", "rate",
               "bits a\nweight", "whole\nmodel", "bits a\nweight", "experts",
               "time to\ncompress", "two idle\ncores", "memory", "decode\nan expert"]  # fmt: skip
    rows = []
    for shape, estimates in found:
        first = [shape.name, f"{shape.n_weights / 1e9:.1f} B",
                 wording.percent(shape.n_expert_weights, shape.n_weights),
                 wording.n_bytes(2 * shape.n_weights)]  # fmt: skip
        for e in estimates:
            road_there = ["-", "-", "-"]
            if e.rate is not None:
                step = road(shape, e)[0]
                road_there = [_time(e.compress_s), _time(step.seconds or 0),
                              wording.n_bytes(step.memory)]  # fmt: skip
            row = [*first, "as stored" if e.rate is None else f"{e.rate:g}", f"{e.model_bits:.2f}",
                   wording.n_bytes(e.model_bytes), f"{e.bits:.2f}",
                   wording.n_bytes(e.expert_bytes), *road_there,
                   f"{1e3 * e.decode_s:.1f} ms"]  # fmt: skip
            rows.append(row)
            first = [""] * len(first)
    return wording.grid(columns, rows)


ROAD_WORDS = (
    "Computed, not tried: by rates measured on two cores (bench/results), with disks that keep up. "
    "A dash: not\nmeasured at such a size."
)


def road_lines(shape: Shape, rate: str, machines: int, steps: list[Step]) -> Any:
    """What each command would take."""
    number = "one machine" if machines == 1 else f"{machines} machines"
    rows = [
        (step.name, "-" if step.seconds is None else _time(step.seconds),
         wording.n_bytes(step.memory), wording.n_bytes(step.disk) if step.disk else "-",
         str(step.parts), step.remark)
        for step in steps
    ]  # fmt: skip
    columns = [f"{shape.name}, {rate}, {number}", "time", "memory of\none", "writes",
               "parts", ""]  # fmt: skip
    return wording.grid(columns, rows)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def running_lines(shape: Shape, ways: list[Running]) -> Any:
    """On a CPU."""
    columns = [f"{shape.name} in {wording.n_bytes(ways[0].memory)}", "slots", "experts", "ready",
               "a token", "tokens\na second", "least\nmemory"]  # fmt: skip
    rows = []
    for way in ways:
        said = [way.name, way.slots, _WHERE[way.where]]
        if way.seconds is None:
            said += ["-", "-", "-"]
        else:
            each = way.seconds
            said += [f"{100 * way.held:.0f} %", f"{1e3 * each:.0f} ms", f"{1 / each:.1f}"]
        rows.append([*said, wording.n_bytes(way.floor_bytes)])
    return wording.grid(columns, rows, text_columns=3)


def running_words(machine: Machine) -> str:
    """What that is computed from."""
    from moebound.offload.timing import LAYER_S

    products = ", ".join(f"{1e3 * s:.2f} ms ({kind})" for kind, s in machine.compute_s.items())
    return (
        f"Computed, not tried, from what was measured now on this machine ({machine.cpu}, "
        f"{machine.threads} threads):\nan expert's products {products},\ndecoding as above, memory "
        f"{wording.n_bytes(machine.memory)}/s. Assumed: a disk of {wording.n_bytes(machine.disk)}"
        f"/s (--disk), {1e3 * LAYER_S:g} ms a layer for\nall that is no product, and as many hits "
        "as experts are ready. Slots of codes (--slots codes) take half of the memory of\nvalues, "
        "so twice the experts are ready. Those of four bits (--slots codes4) take a quarter, and "
        "need a rate at\nwhich nearly all weights have one of sixteen codes: products are timed "
        "without the few that have another."
    )


def linear_words(shape: Shape, sizes: Estimate) -> str:
    """What linear layers that are no expert's are in its rows."""
    held = sizes.linears
    kinds = ", ".join(f"{n / 1e9:.2f} billion weights {kind}" for kind, n in held.weights.items())
    return (
        f"Linear layers that are no expert's: {kinds or 'values, none can be codes'}; they take "
        f"{wording.n_bytes(held.n_bytes)} in place of "
        f"{wording.n_bytes(shape.plain_bytes * held.n_weights)}.\nThe model as it is has values."
    )


_WHERE = {
    "decoded": "all in memory",
    "memory": "in memory",
    "disk": "on disk",
    "no": "does not fit",
}


STORE_WORDS = (
    "A store's own bytes and headers were counted, and some of its own experts decoded here."
)


def placing_lines(shape: Shape, placed: Sequence[Sequence[Placed]]) -> Any:
    """On a GPU: what lies where. The tier that is taken by itself stands first."""
    first = placed[0][0]
    columns = [f"{shape.name}\n{wording.n_bytes(first.device_bytes)} of GPU memory", "tier",
               "decoded\non the GPU", "compressed\non the GPU", "all else\non the GPU",
               "waits in\nRAM", "waits\non disk", "a token", "tokens\na second",
               "--ram-\nbudget", "least GPU\nmemory"]  # fmt: skip
    rows = []
    for ways in placed:
        name = ways[0].name
        for way in ways:
            row = [name, way.tier]
            if way.seconds is None:
                row += ["does not fit", *["-"] * 7]
            else:
                there = _share(way.cache_bytes, way.decoded)
                row += [there, _share(way.compressed_bytes, way.compressed),
                        wording.n_bytes(way.other_bytes + way.room_bytes + way.buffer_bytes),
                        *(_n(way.rest_bytes if way.rest == at else 0) for at in ("ram", "disk")),
                        f"{1e3 * way.seconds:.0f} ms", f"{1 / way.seconds:.1f}",
                        wording.n_bytes(way.budget_bytes)]  # fmt: skip
            rows.append([*row, wording.n_bytes(way.floor_bytes)])
            name = ""
    return wording.grid(columns, rows, text_columns=2)


def _share(n_bytes: int, share: float) -> str:
    return f"{wording.n_bytes(n_bytes)}, {100 * share:.0f} %" if n_bytes else "-"


def _n(n_bytes: int) -> str:
    return wording.n_bytes(n_bytes) if n_bytes else "-"


def placing_words(gpu: Gpu, host: Host, *, stored: bool, link_said: bool) -> str:
    """What that is computed from."""
    from moebound.fit import H200_LINK
    from moebound.offload.timing import LAYER_S

    sizes = (
        "the store's own sizes"
        if stored
        else "sizes of one random expert (--codec bound:segment=gpu)"
    )
    ram = (
        f"{wording.n_bytes(host.pinned)} of {wording.n_bytes(host.ram)} of RAM are taken for "
        "experts at most (70 % of what is free)"
        if host.ram
        else "no RAM is counted on (--ram SIZE)"
    )
    if gpu.measured:
        rows = f"from what was measured now on the GPU of this machine ({gpu.name})"
        link = f"its link {wording.n_bytes(gpu.link)}/s"
    else:
        rows = (
            f"from rows measured on one {gpu.name}\n(bench/results/gpu.json, offload_gpu-*.json: "
            "experts of 8.65 million weights, rate 0.3)"
        )
        if gpu.speed != 1:
            rows += f", times 1 / {gpu.speed:g} (--device-speed)"
        link = f"a link of {wording.n_bytes(gpu.link)}/s (--link"
        link += ")" if link_said else f"; PCIe 4 x16, about; PCIe 5: {H200_LINK / 1e9:g} GB/s)"
    return (
        f"Memory is counted, by the code that divides it at load, with {sizes}.\nAll else is what "
        "is no expert's, 1.5 GB for the program and a short text's cache, and buffers.\n"
        f"{ram[0].upper()}{ram[1:]}.\nTimes are computed, not tried, {rows},\n{link}, a disk of "
        f"{wording.n_bytes(int(host.disk))}/s (--disk),\n{1e3 * LAYER_S:g} ms a layer for Python, "
        "attention and the like, as on a CPU, and as many hits as experts are decoded.\n"
        "By them --tier auto would take the first tier of each. No GPU has run tier device."
    )
