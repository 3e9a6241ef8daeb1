"""`moebound.load`: a store (or a checkpoint) and a memory budget become a model that runs.

open the experts -> a model without them -> measure this machine, choose source and tier -> cache,
loading threads, predictor -> each experts module is told where its experts come from
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from moebound.cache import ExpertCache
from moebound.checkpoint import local_folder
from moebound.checkpoint.gguf_source import gguf_file
from moebound.codec import thread_count
from moebound.errors import CacheError, CheckpointError, MoeboundError
from moebound.model.attention import fuse_attention
from moebound.model.dtypes import check_device, parse_dtype
from moebound.model.few_rows import multiply_few_rows
from moebound.model.live import LiveExperts, live_experts
from moebound.model.native_routers import route_few_rows
from moebound.model.pretrained import load_tokenizer
from moebound.model.routers import find_routers
from moebound.model.skip_policies import Policy, get_policy
from moebound.offload.choose import catalog_of, choose, open_delivery, open_path, open_tier
from moebound.offload.codes import SLOTS, SlotsName, code_kinds, in_four_bits
from moebound.offload.device_tier import check_tier
from moebound.offload.entries import DiskEntries, open_entries
from moebound.offload.fallback import CoarseCopies, Grades
from moebound.offload.fetcher import Fetcher
from moebound.offload.joint import JointExperts
from moebound.offload.linears import fill_linears, plan_linears
from moebound.offload.loader import Held, Loader
from moebound.offload.meter import Meter
from moebound.offload.offloaded import Choice, Offloaded
from moebound.offload.on_demand import NAME, register_on_demand
from moebound.offload.predictors import PREDICTORS, Foresight, Layers, Predictor
from moebound.offload.slots import SlotKind, SlotPool
from moebound.offload.tiers import TierName
from moebound.offload.whole import guard_whole
from moebound.types import ExpertKey
from moebound.wordmath.builtin import resolve


def load(
    source: str | os.PathLike[str],
    *,
    ram_budget: int | str | None = None,
    tier: TierName | Literal["auto"] = "auto",
    slots: SlotsName | Literal["auto"] = "values",
    linears: SlotsName = "values",
    device: str = "cpu",
    dtype: str = "auto",
    policy: str = "hobbit",
    predictor: str = "none",
    raw: str | os.PathLike[str] | None = None,
    coarse: str | os.PathLike[str] | None = None,
    coarse_above: float = 0.6,
    skip_above: float | None = None,
    skip: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    drop_cache: bool = False,
) -> Offloaded:
    """Load a model whose experts are fetched and decoded when they are needed.

    source: a store, or an ordinary checkpoint folder, whose experts are then read as they are.
    ram_budget: bytes for experts, decoded and compressed together ("4GiB", "20%" of all experts
        decoded); None for 70 % of what is free. On a GPU, of its memory: what waits on the host is
        not counted. Everything else comes on top: the other weights, the KV cache, and the loading
        threads' buffers (`choice.buffer_bytes`).
    tier: where experts wait: "disk", "ram" (compressed, within the budget), "device" (compressed in
        a GPU's memory, within the budget: as many as it holds, the rest on the host), or "auto" for
        the fastest by prediction. dtype: "auto" for the checkpoint's own. policy: of the cache.
    predictor: "none", or one of `PREDICTORS`. raw: an ordinary checkpoint of the same model, to be
        used where reading it is predicted to be faster than decoding. threads: native threads, None
        for all CPUs. device: "cpu", or a CUDA device. drop_cache: keep the operating system from
        caching what was read.

    slots: what memory holds of an expert: "values", its weights in `dtype`; "codes", a byte a
        weight, and computing from those (`codes.py`): twice the experts of bfloat16 in a budget;
        "codes4", four bits a weight: four times; "auto" for the fastest by measurement. Experts
        that cannot be so are codes of a byte, or values; `choice.not_codes` says how many, and
        why. On a CPU.
    linears: the same of linear layers that are no expert's (attention, dense and shared layers, the
        head): "codes" and "codes4" keep the codes of a store that was compressed with a rate for
        `others`, and never the weights. Layers that cannot be so are values (`linears.py`);
        `choice.linears` says how many are what, and `choice.not_code_linears` why.
    coarse, coarse_above, skip_above: graded fallback on a miss, off by default (`fallback.py`):
        `coarse` is a store of the same model under a wider bound.

    skip, calibration: a policy by which experts of little weight are left out ("lu_re", "odp_re",
        "modes_re:target0.4", "hobbit_re"; `model/skip_policies.py`), and the file or folder with
        its thresholds. Texts still do not depend on what is in memory.

    Guarantee: logits are those of the decoded weights; bit for bit the same whatever the budget,
    tier, policy, predictor, timing and `threads`, with the same number of torch's threads
    (`torch.set_num_threads`, OMP_NUM_THREADS), which is not moebound's to choose; within float
    rounding those of stock transformers. With slots of codes the experts' products are moebound's
    own, but for many tokens in bfloat16 (`few_rows.MANY_ROWS`): the same weights, summed in another
    order, the same for any number of torch's threads; so logits differ by rounding from those of
    slots of values; the same of linear layers. Gradients, of all that is not experts,
    are right too: a copy of each expert is kept for them until `backward`. With a graded fallback
    none of this holds, beyond the bound of the coarse store.

    Raises MoeboundError for a policy whose thresholds are missing or of another model;
    CacheError for a budget below the least (the message has it), and for codes of linear layers
    where there are none, CheckpointError and
    UnsupportedArchitectureError for a model that cannot be run so, and what opening a damaged
    store raises.
    """
    from moebound.integrations.transformers.skeleton import load_skeleton

    computed_in = parse_dtype(dtype)
    check_device(device)
    place = torch.device(device)
    if tier == "device":
        check_tier(place)
    guess = _predictor(predictor)
    if slots not in (*SLOTS, "auto"):
        raise CacheError(f"slots {slots!r}: expected {', '.join(SLOTS)} or auto")
    if linears not in SLOTS:
        raise CacheError(f"linears {linears!r}: expected {', '.join(SLOTS)}")
    chosen_policy = _policy(skip, calibration)
    named = Path(resolve(os.fspath(source)))
    # Of a GGUF file, `local_folder` has config and tokenizer alone.
    path = local_folder(named) if gguf_file(named) is None else named
    cores = thread_count() if threads is None else threads
    entries = open_entries(path)
    grades, coarser = None, None
    if coarse is not None:
        coarser = _same_sizes(
            entries, open_entries(local_folder(resolve(os.fspath(coarse)))), "coarse"
        )
    if coarse is not None or skip_above is not None:
        grades = Grades(None if coarse is None else coarse_above, skip_above)
    sources = {"compressed" if entries.compressed else "raw": entries}
    if raw is not None:
        sources["raw"] = _same_model(entries, open_entries(local_folder(resolve(os.fspath(raw)))))
    plan = plan_linears(entries, linears, place)
    model = load_skeleton(
        path,
        routed=entries.tensors,
        weights=entries.others,
        codes=plan.dtypes,
        dtype=computed_in,
        device=device,
    )
    held = fill_linears(model, entries, plan, threads=cores)
    multiply_few_rows(model)
    route_few_rows(model)
    fuse_attention(model)
    register_on_demand()
    model.set_experts_implementation(NAME)
    live = live_experts(model)
    _check_experts(path, entries, live)
    kinds = slot_kinds(live, model.dtype)
    ways, refused = slot_ways(slots, entries, kinds, place)
    load_paths = choose(
        sources,
        kinds,
        model,
        ways=ways,
        budget=ram_budget,
        tier=tier,
        device=place,
        cores=cores,
        drop_cache=drop_cache,
    )
    chosen, waiting = open_path(load_paths[0], place, cores=cores, drop_cache=drop_cache)
    load_paths[0] = chosen
    meter = Meter()
    cache = ExpertCache[Held](
        catalog_of(chosen.entries, chosen.kinds),
        chosen.cache_bytes,
        policy=policy,
        working=chosen.costs.top_k + 1 + chosen.entries.most_shared,
    )
    delivery = open_delivery(waiting, chosen.entries, place, cores=cores)
    copies = None
    if coarser is not None:
        disk = open_tier("disk", coarser, place, drop_cache=drop_cache)
        copies = CoarseCopies(
            coarser.by_key, kinds, open_delivery(disk, coarser, place, cores=cores), place
        )
    layers = _layers(model, live, chosen.costs.top_k)
    tokenizer = _load_tokenizer(entries.path)  # of a GGUF file the folder made of its metadata
    # Its threads begin here: what may fail stands before, and what ends them behind.
    loader = Loader(
        cache,
        {entry.key: entry for entry in chosen.entries.everything},
        chosen.kinds,
        delivery,
        SlotPool(chosen.cache_bytes, place, set(chosen.kinds.values())),
        meter,
        n_threads=delivery.threads,
    )
    fetcher = Fetcher(
        cache,
        loader,
        meter,
        Foresight(guess, layers, cache, meter, loader.expect),
        grades=grades,
        coarse=copies,
    )
    for owner in live.stacks:
        owner.module.moebound = JointExperts(  # type: ignore[assignment]  # no submodule
            owner.layer,
            owner.first,
            fetcher,
            chosen.entries.edits.get(owner.layer),
            device=place,
            dtype=model.dtype,
        )
    buffers = delivery.threads * delivery.buffer_bytes + delivery.kept_bytes
    choice = Choice.of(
        load_paths,
        policy=policy,
        predictor=predictor,
        buffer_bytes=buffers,
        not_codes=refused,
        linears=held,
        waiting=waiting,
    )
    guard_whole(model, live, loader, choice)
    found = Offloaded(model, tokenizer, fetcher, choice)
    if chosen_policy is not None:
        try:
            found.skip(chosen_policy)
        except MoeboundError:
            found.close()
            raise
    return found


def _policy(skip: str | None, calibration: str | os.PathLike[str] | None) -> Policy | None:
    if skip is None:
        if calibration is not None:
            raise MoeboundError("calibration has thresholds of a skipping policy: give skip, too")
        return None
    return get_policy(skip, None if calibration is None else Path(calibration))


def _predictor(name: str) -> Predictor | None:
    if name == "none":
        return None
    if name not in PREDICTORS:
        raise CacheError(f"predictor {name!r}: expected none, {', '.join(PREDICTORS)}")
    return PREDICTORS[name]()


def _same_model(store: DiskEntries, plain: DiskEntries) -> DiskEntries:
    """`plain`, if it has the same experts of the same sizes."""
    if plain.compressed:
        raise CheckpointError(f"{plain.path}: raw: expected an ordinary checkpoint, found a store")
    return _same_sizes(store, plain, "raw")


def _same_sizes(entries: DiskEntries, others: DiskEntries, option: str) -> DiskEntries:
    sizes = [{entry.key: entry.n_weights for entry in found} for found in (entries, others)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{others.path}: {option}: its experts are not those of {entries.path} (number or "
            "sizes)"
        )
    return others


def _check_experts(path: Path, entries: DiskEntries, live: LiveExperts) -> None:
    missing = [key for key in live if key not in entries.by_key]
    surplus = [key for key in entries.by_key if key not in live]
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the model has not"
        raise CheckpointError(f"{path}: {what}")


def slot_kinds(live: LiveExperts, dtype: torch.dtype) -> Mapping[ExpertKey, SlotKind]:
    """Of every expert of a model, as values of this dtype."""
    known = dict[SlotKind, SlotKind]()  # one object for all that are alike
    found = dict[ExpertKey, SlotKind]()
    for owner in live.stacks:
        kind = SlotKind.of(owner.module, dtype)
        kind = known.setdefault(kind, kind)
        for index in range(owner.stack.n_experts):
            found[ExpertKey(owner.layer, owner.first + index)] = kind
    return found


def slot_ways(
    slots: SlotsName | Literal["auto"],
    entries: DiskEntries,
    kinds: Mapping[ExpertKey, SlotKind],
    device: torch.device,
) -> tuple[Mapping[SlotsName, Mapping[ExpertKey, SlotKind]], Mapping[str, int]]:
    """What slots may hold, the most compact first, and how many experts are otherwise, by why.
    kinds: of slots of values."""
    found = dict[SlotsName, Mapping[ExpertKey, SlotKind]]()
    if slots == "values":
        return {"values": kinds}, {}
    codes = code_kinds(entries, kinds, device)
    refused = codes.refused
    if slots != "codes" and codes.any_codes:
        packed = in_four_bits(entries, codes)
        refused = packed.refused
        if packed.any_of_four_bits:
            found["codes4"] = packed.kinds
    if codes.any_codes and (slots != "codes4" or not found):
        found["codes"] = codes.kinds
    if slots == "auto" or not found:
        found["values"] = kinds
    return found, refused


def _layers(model: Any, live: LiveExperts, top_k: int) -> Layers:
    names = {owner.layer: owner.stack.name for owner in reversed(live.stacks)}
    return Layers(
        live.layers,
        {layer: len(live.in_layer(layer)) for layer in live.layers},
        top_k,
        find_routers(model, names, top_k),
    )


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "tekken.json",
)  # fmt: skip
"""A folder with none of these has no tokenizer."""


def _load_tokenizer(path: Path) -> Any:
    """None without one; for one that cannot be read the error, which `Offloaded` raises to whoever
    asks for it: logits need none."""
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None  # checkpoints of tests and benchmarks have none; who needs one says so
    try:
        return load_tokenizer(path)
    except CheckpointError as error:
        return error
