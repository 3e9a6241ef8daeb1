"""A store that is here: its own bytes, and its own experts decoded, where `estimate` has random
ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moebound.checkpoint.shards import read_json
from moebound.codec import thread_count
from moebound.codec.device.resident import resident_bytes
from moebound.fit.estimate import Estimate, fits_in
from moebound.fit.experts import Experts, Linears, OnDevice, segment_of
from moebound.fit.shape import Shape
from moebound.integrations.transformers.skeleton import leave_codes
from moebound.model.live import live_experts
from moebound.model.pretrained import empty_model, read_config
from moebound.offload.choose import catalog_of, open_delivery, open_tier
from moebound.offload.codes import SLOTS, SlotsName, most_held, stored_outside
from moebound.offload.costs import measure_speeds, sample, sample_of
from moebound.offload.decoding import read_streams
from moebound.offload.device_tier import candidates
from moebound.offload.entries import DiskEntries, DiskEntry, open_entries
from moebound.offload.linears import plan_linears
from moebound.offload.loading import slot_kinds, slot_ways
from moebound.store.format import read_settings

CPU = torch.device("cpu")


def is_store(src: Path | str) -> bool:
    """Whether a folder is a store, by its config."""
    config = Path(src) / "config.json"
    return config.is_file() and read_settings(read_json(config)) is not None


def estimate_store(
    path: Path | str, shape: Shape, *, memory: int | None = None, linears: SlotsName = "values"
) -> tuple[Shape, Estimate]:
    """The store's sizes, counted, and what decoding some of its experts takes here. Also the shape
    again, with the dtype that the store decodes to, and whether some of its experts can be codes.
    linears: as for `load`.

    Raises as `open_entries` and `plan_linears`, and what reading damaged experts raises.
    """
    entries, config = open_entries(path), read_config(path)
    dtype = _dtype(config)
    model = empty_model(config, str(path))
    kinds = slot_kinds(live_experts(model), dtype)
    kinds = {entry.key: kinds[entry.key] for entry in entries}
    allowed, _ = slot_ways("auto", entries, kinds, CPU)
    ways = {slots: allowed[slots] for slots in SLOTS if slots in allowed}
    shape = replace(shape, plain_bytes=dtype.itemsize, codes="codes" in ways)
    working = shape.top_k + 1 + entries.most_shared
    experts = Experts(
        len(entries.asked_for),
        entries.n_bytes,
        max(entry.n_bytes for entry in entries),
        {slots: sum(kind.n_bytes for kind in of.values()) for slots, of in ways.items()},
        {
            slots: catalog_of(entries, of).smallest_budget(floor=1, working=working)
            for slots, of in ways.items()
        },
        _on_device(entries),
    )
    threads, probe = thread_count(), sample(entries)
    delivery = open_delivery(
        open_tier("ram", probe, CPU, drop_cache=False), entries, CPU, cores=threads
    )
    seconds = {slots: _decode_s(probe, delivery, of) for slots, of in ways.items()}
    n_bytes = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    found = Estimate(
        None,
        8 * entries.n_bytes / shape.n_expert_weights,
        entries.n_bytes,
        n_bytes,
        threads,
        0.0,
        seconds["values"],
        None if memory is None else fits_in(shape, experts, memory),
        8 * n_bytes / shape.n_weights,
        seconds.get("codes", 0.0),
        seconds.get("codes4", 0.0),
        experts,
        _linears(model, entries, linears),
    )
    return shape, found


def _linears(model: Any, entries: DiskEntries, linears: SlotsName) -> Linears:
    """Those that are codes, by their certificates. Changes the model."""
    plan = plan_linears(entries, linears, CPU)
    weights, n_bytes = Counter[SlotsName](), 0
    for name in leave_codes(model, plan.dtypes):
        certificate, bits = entries.coded[name].record.certificate, plan.bits[name]
        weights["codes" if bits == 8 else "codes4"] += certificate.n_weights
        outside = stored_outside(entries.coded[name]) if bits == 4 else None
        n_bytes += most_held(certificate, bits, outside or 0)
    return Linears(weights, n_bytes)


def expert_of(path: Path | str) -> list[bytes]:
    """The envelopes of one of a store's experts that a GPU decodes; none where it has none."""
    for entry in candidates(open_entries(path).asked_for)[:1]:
        data = bytearray(entry.n_bytes)
        entry.read(memoryview(data))
        return [bytes(data[part.start : part.stop]) for part in entry.matrices]
    return []


def _decode_s(probe: list[DiskEntry], delivery: Any, kinds: Any) -> float:
    """Of an expert that was read and checked before."""
    measure_speeds(probe, delivery, kinds, CPU)
    return measure_speeds(probe, delivery, kinds, CPU).decode_s


def _on_device(entries: DiskEntries) -> OnDevice | None:
    """By some of its experts, as `plan_device` finds it."""
    found = candidates(entries.asked_for)
    if not found:
        return None
    streams = []
    for entry in sample_of(found):
        data = bytearray(entry.n_bytes)
        entry.read(memoryview(data))
        streams.append(read_streams(entry, memoryview(data)))
    return OnDevice(
        found,
        max(map(resident_bytes, streams)),
        max(resident_bytes(some, tables=False) for some in streams),
        segment_of(streams[0]),
    )


def _dtype(config: Any) -> torch.dtype:
    """What a model is loaded in if nobody says more."""
    for one in (config, config.get_text_config()):
        dtype = getattr(one, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32
