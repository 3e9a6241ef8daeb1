"""CPU time of an expert's miss beside the native kernel's for its payloads (docs/offload.md).

    python bench/miss.py STORE > rows.json

STORE: a store of Moonlight's shapes, as `moebound bench offload` leaves in its folder, or any other
whose experts are of codec `bound`. One thread brings experts into slots that were used before: from
RAM, from disk through the system's cache and around it, and from RAM with envelopes taken apart in
Python. All ways take turns with the kernel, in one process, and each is divided by the kernel's
time for the same expert just before. Hashes have been compared before, but for the row that has
them alone. A table on stderr, JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from moebound import _native
from moebound.bench.environment import describe
from moebound.codec.bound import DTYPE_CODES
from moebound.offload.codes import code_kinds, in_four_bits
from moebound.offload.delivery import Arrival, CpuDelivery
from moebound.offload.entries import DiskEntries, DiskEntry, open_entries
from moebound.offload.meter import Load
from moebound.offload.slots import CodeSlot, Slot, SlotKind
from moebound.offload.tiers import DiskTier, RamTier, Tier
from moebound.store import reader

CPU = torch.device("cpu")
now = time.thread_time


def kernel(entry: DiskEntry, data: memoryview, slot: Slot) -> float:
    """Seconds in the kernel alone, for what `fill` decodes."""
    taken, scratch = 0.0, np.empty(max(part.size for part in entry.matrices), np.uint8)
    for part in entry.matrices:
        assert part.stored is not None
        found = part.stored.parse(data[part.start : part.stop]).envelope
        out, spec = slot.array(part), found.spec
        assert out is not None
        source, output = DTYPE_CODES[spec.source_dtype], DTYPE_CODES[spec.dtype]
        if isinstance(slot, CodeSlot):
            if slot.kind.bits == 4:  # which come of bytes
                out = scratch[: spec.size]
            begin = now()
            _native.bound_codes(found.payload, out, source, output, spec.abs_bound, 1)
        else:
            patterns = out.reshape(-1).view("u2" if spec.dtype == "BF16" else out.dtype)
            begin = now()
            _native.bound_decode(found.payload, patterns, source, spec.abs_bound, 1)
        taken += now() - begin
    return taken


def measure(entries: DiskEntries, kind: SlotKind, experts: int, rounds: int) -> dict[str, Any]:
    some = list(entries)[:experts]
    tiers: dict[str, Tier] = {
        "from RAM": RamTier(some), "from the system's cache": DiskTier(some),
        "around the system's cache": DiskTier(some, drop_cache=True),
    }  # fmt: skip
    bring = {name: (CpuDelivery(tier, cores=1), tier.buffer()) for name, tier in tiers.items()}
    slots = [kind.empty(CPU) for _ in range(3)]
    times = defaultdict[str, list[float]](list)

    def timed(work: Callable[[], Any]) -> float:
        begin = now()
        work()
        return now() - begin

    for turn in range(rounds + 1):  # the first is not counted: hashes, pages, buffers
        for at, entry in enumerate(some):
            slot = slots[(at + turn) % len(slots)]
            data = tiers["from RAM"].bytes_of(entry, memoryview(b""))
            taken = {"kernel": kernel(entry, data, slot)}

            def miss(name: str, entry: DiskEntry = entry, slot: Slot = slot) -> float:
                delivery, buffer = bring[name]
                load = Load(entry.key, entry.n_bytes, entry.n_weights, False)
                return timed(lambda: delivery.bring([Arrival(entry, slot, load)], buffer))

            taken |= {name: miss(name) for name in tiers}
            with (
                mock.patch.object(reader, "decode_certified", return_value=False),
                mock.patch.object(reader, "codes_certified", return_value=None),
            ):
                taken["from RAM, taken apart in Python"] = miss("from RAM")
            taken["hashes"] = timed(partial(entry.check, data))
            if turn:
                for name, seconds in taken.items():
                    times[name].append(seconds)
    return {
        name: {
            "median_ms": 1e3 * statistics.median(found), "least_ms": 1e3 * min(found),
            "over_kernel": statistics.median(
                a / b for a, b in zip(found, times["kernel"], strict=True)
            ),
        }
        for name, found in times.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    entries = open_entries(args.store)
    first = next(iter(entries))
    shapes = {part.role: part.shape for part in first.matrices}
    inner, hidden = shapes["gate"]
    values = SlotKind(
        (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))),
        torch.bfloat16, gated=True, transposed=False, interleaved=False,
    )  # fmt: skip
    found = code_kinds(entries, dict.fromkeys((entry.key for entry in entries), values), CPU)
    packed = in_four_bits(entries, found)
    kinds = {
        "values": values, "codes": found.kinds[first.key], "codes4": packed.kinds[first.key],
    }  # fmt: skip
    rows = {name: measure(entries, kind, args.experts, args.rounds) for name, kind in kinds.items()}
    for slots, row in rows.items():
        for name, one in row.items():
            print(
                f"{slots}, {name}: {one['median_ms']:.2f} ms (least {one['least_ms']:.2f}), "
                f"{one['over_kernel']:.2f} of the kernel",
                file=sys.stderr,
            )
    load = os.getloadavg()[0]
    print(json.dumps({"environment": describe(), "load_average": load, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
