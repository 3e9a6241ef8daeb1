"""Where the time of a token goes when all experts are in memory (docs/offload.md).

    OMP_WAIT_POLICY=PASSIVE python bench/cached_token.py WORK > rows.json

WORK: the folder of `moebound bench offload`, with its checkpoint, store, ids and trace. A text is
read token by token with the store in slots of codes (of four bits and of a byte) and of values,
with linear layers as codes where WORK has a store for it (`--linears codes4`), and
by stock transformers, each in a process of its own, in turns: with the linear layers outside of
experts by the native product and by torch's, and with experts computed together and one by one.
Checked first: the ways of computing experts give the same logits, to the bit. Then some tokens are
read once more with a clock around parts. Figures are medians, and least ones, of milliseconds a
token; CPU time is that of all threads. JSON, and a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebound.bench.environment import describe
from moebound.bench.offload.prepare import OTHERS_MARK
from moebound.bench.offload.subjects import SUBJECTS
from moebound.cache import load_trace
from moebound.model.few_rows import NativeLinear
from moebound.offload import compute, on_demand

SLOTS_LINEARS = {
    "codes4": ("codes4", "values"), "codes4, linear layers codes": ("codes4", "codes"),
    "codes4, linear layers codes4": ("codes4", "codes4"), "codes": ("codes", "values"),
    "codes, linear layers codes": ("codes", "codes"), "values": ("values", "values"),
}  # fmt: skip
SUBJECT_NAMES = (*SLOTS_LINEARS, "stock")


@contextmanager
def torch_linears(model: nn.Module) -> Iterator[None]:
    own = [(m, f) for m in model.modules() if isinstance(f := vars(m).get("forward"), NativeLinear)]
    for module, _ in own:
        del module.forward
    try:
        yield
    finally:
        for module, forward in own:
            module.forward = forward


@contextmanager
def one_by_one(_: nn.Module) -> Iterator[None]:
    before = compute.few_rows_outputs

    def alone(module: Any, experts: Any, dtype: torch.dtype, threads: int) -> torch.Tensor:
        found = [compute.expert_output(module, e.expert, e.slot, e.rows, dtype) for e in experts]
        return torch.cat(found)

    vars(on_demand)["few_rows_outputs"] = alone
    try:
        yield
    finally:
        vars(on_demand)["few_rows_outputs"] = before


@contextmanager
def as_is(_: nn.Module) -> Iterator[None]:
    yield


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "as it is": as_is, "torch's linear layers": torch_linears, "experts one by one": one_by_one,
}  # fmt: skip


@contextmanager
def clocks(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds in modules, by kind: linear layers outside of experts, and experts with what brings
    them; of attention, what is no linear layer."""
    spent = {"linear layers": 0.0, "experts": 0.0, "attention": 0.0}
    handles, begun = [], list[tuple[float, float]]()

    def before(*_: Any) -> None:
        begun.append((time.perf_counter(), spent["linear layers"]))

    def after(kind: str) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            begin, linear = begun.pop()
            inside = spent["linear layers"] - linear
            spent[kind] += time.perf_counter() - begin - inside

        return stop

    for name, module in model.named_modules():
        kind = ("linear layers" if isinstance(module, nn.Linear)
                else "experts" if name.endswith(".experts")
                else "attention" if name.endswith(".self_attn") else None)  # fmt: skip
        if kind is not None:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after(kind)))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def stores(work: Path, others: str | None) -> list[Path]:
    """others: the rate of the tensors that are no expert's; None where they are kept."""
    marks = ((store, store.name.partition(OTHERS_MARK)[2]) for store in work.glob("store-*"))
    return [store for store, mark in marks if mark == (others or "")]


def measure(work: Path, name: str, others: str, tokens: int, rounds: int) -> dict[str, Any]:
    ids = np.load(work / "ids.npy").tolist()
    options: dict[str, Any] = {}
    if name != "stock":
        slots, linears = SLOTS_LINEARS[name]
        options = {"ram_budget": "100%", "tier": "disk", "slots": slots, "linears": linears}
    store, *more = stores(work, others if "linear" in name else None)
    if more:
        raise ValueError(f"{work}: {store.name} and {more[0].name}: expected one store of a kind")
    spec = {
        "source": str(work / "raw" if name == "stock" else store), "options": options,
        "drop_cache": False, "top_k": 6,
    }  # fmt: skip
    subject: Any = SUBJECTS["stock" if name == "stock" else "offloaded"](
        spec, load_trace(work / "trace.npz")
    )
    model = subject._model

    def text() -> tuple[list[float], list[float], list[float]]:
        wall, cpu, sums = list[float](), list[float](), list[float]()
        subject.begin(0)
        subject.step(ids[:8])
        for at in range(8, 8 + tokens):
            begin = time.perf_counter(), time.process_time()
            sums.append(subject.step(ids[at : at + 1]))
            wall.append(1e3 * (time.perf_counter() - begin[0]))
            cpu.append(1e3 * (time.process_time() - begin[1]))
        return wall, cpu, sums

    text()  # everything is in memory from here on
    subject.stats(reset=True)
    ways = {k: v for k, v in WAYS.items() if name != "stock" or k == "as it is"}
    if "linear" in name:
        del ways["torch's linear layers"]
    times = {way: ([], []) for way in ways}  # type: dict[str, tuple[list[float], list[float]]]
    sums = dict[str, list[float]]()
    for _ in range(rounds):
        for way, switched in ways.items():
            with switched(model):
                wall, cpu, sums[way] = text()
            times[way][0].extend(wall)
            times[way][1].extend(cpu)
    if name.startswith("codes") and sums["as it is"] != sums["experts one by one"]:
        raise ValueError("experts together and one by one give other logits")
    with clocks(model) as spent:
        wall, _, _ = text()
    found: dict[str, Any] = {
        "name": name,
        "ways": {
            way: {
                "wall_ms": statistics.median(wall), "least_wall_ms": min(wall),
                "cpu_ms": statistics.median(cpu), "least_cpu_ms": min(cpu),
            }
            for way, (wall, cpu) in times.items()
        },
        # Of the prompt's eight tokens, too, which are one step of as many.
        "parts_ms": {kind: 1e3 * s / (tokens + 1) for kind, s in spent.items()},
        "of_ms": statistics.fmean(wall),
    }  # fmt: skip
    stats = subject.stats(reset=False)
    if stats is not None and stats["hit_ratio"] != 1:
        raise ValueError(f"{name}: not everything is in memory: {stats['hit_ratio']}")
    subject.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", default="0.3", help="rate of linear layers as codes")
    parser.add_argument("--only", choices=SUBJECT_NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.work, args.only, args.others, args.tokens, args.rounds)))
        return
    rows = []
    for name in SUBJECT_NAMES:
        if "linear" in name and not stores(args.work, args.others):
            continue
        command = [sys.executable, __file__, str(args.work), "--only", name,
                   "--others", args.others, "--tokens", str(args.tokens),
                   "--rounds", str(args.rounds)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        for way, one in rows[-1]["ways"].items():
            print(
                f"{name}, {way}: {one['wall_ms']:.1f} ms (least {one['least_wall_ms']:.1f}), CPU "
                f"{one['cpu_ms']:.1f} (least {one['least_cpu_ms']:.1f})",
                file=sys.stderr,
            )
        parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in rows[-1]["parts_ms"].items())
        print(f"  of {rows[-1]['of_ms']:.1f} ms: {parts}", file=sys.stderr)
    load = os.getloadavg()[0]
    print(json.dumps({"environment": describe(), "load_average": load, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
