"""One run, in a process of its own: a prompt, then token by token, with forced routing.

    python -m moebound.bench.offload.measure SPEC.json      # prints one JSON row

SPEC: how to load ("offloaded", "stock", "accelerate"), what, with which options, the trace, how
many tokens. Peak memory is this process's; the page cache is dropped for the files before, and
while it reads, where the spec says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebound.bench.offload.routing import ForcedRouting
from moebound.cache import load_trace


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """spec: how, source, options, trace, top_k, prompt, warm, tokens, drop_cache, vocab."""
    torch.manual_seed(0)
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    drop = drop_pages if spec["drop_cache"] else (lambda folder: None)
    drop(Path(spec["source"]))
    begin = time.perf_counter()
    model, stats, close = _LOADERS[spec["how"]](spec)
    loaded_s = time.perf_counter() - begin
    rss_loaded = _rss()
    routing = ForcedRouting(model, load_trace(Path(spec["trace"])), top_k=spec["top_k"])
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, spec["vocab"], (1, 4096)))
    with torch.inference_mode():
        _text(model, routing, ids, spec["prompt"], spec["warm"], 0)
        if stats is not None:
            stats(reset=True)
        drop(Path(spec["source"]))
        before = _disk_bytes()
        ttft, times, out = _text(
            model, routing, ids, spec["prompt"], spec["tokens"], spec["prompt"] + spec["warm"]
        )
    row = {
        "load_s": loaded_s,
        "ttft_s": ttft,
        "tpot_s": times,
        "tpot_p50_s": statistics.median(times),
        "tpot_p99_s": float(np.percentile(times, 99)),
        "tpot_mean_s": statistics.fmean(times),
        "rss_loaded_bytes": rss_loaded,
        "rss_peak_bytes": _rss_peak(),
        "disk_bytes": _disk_bytes() - before,
        "logits_sum": out,
    }
    if torch.cuda.is_available() and spec.get("device", "cpu") != "cpu":
        row["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    if stats is not None:
        row["stats"] = stats(reset=False)
    close()
    return row


def _text(
    model: Any, routing: ForcedRouting, ids: torch.Tensor, n_prompt: int, n_new: int, at: int
) -> tuple[float, list[float], float]:
    """Seconds to the first token, of each token after it, and the sum of the last logits."""
    from transformers import DynamicCache

    routing.begin(at)
    past, times = DynamicCache(), []
    tokens = ids[:, :n_prompt].to(model.device)
    for i in range(n_new + 1):
        begin = time.perf_counter()
        logits = model(tokens, past_key_values=past, use_cache=True).logits[:, -1]
        total = float(logits.double().sum())  # waits for the device
        times.append(time.perf_counter() - begin)
        tokens = ids[:, n_prompt + i : n_prompt + i + 1].to(model.device)
    return times[0], times[1:], total


Stats = Callable[..., dict[str, Any]]


def _offloaded(spec: dict[str, Any]) -> tuple[Any, Stats, Callable[[], None]]:
    from moebound.runtime.loading import load

    offloaded = load(spec["source"], drop_cache=spec["drop_cache"], **spec["options"])

    def stats(*, reset: bool) -> dict[str, Any]:
        found = offloaded.stats()
        if reset:
            offloaded.meter.reset()
        return found

    return offloaded.model, stats, offloaded.close


def _stock(spec: dict[str, Any]) -> tuple[Any, None, Callable[[], None]]:
    from transformers import AutoModelForCausalLM

    options = dict(spec["options"])
    implementation = options.pop("experts", None)
    model = AutoModelForCausalLM.from_pretrained(spec["source"], dtype="auto", **options)
    if implementation:
        model.set_experts_implementation(implementation)
    return model, None, lambda: None


def _accelerate(spec: dict[str, Any]) -> tuple[Any, None, Callable[[], None]]:
    """transformers' own disk offload: experts modules on disk, all else in memory."""
    import tempfile

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec["source"])
    folder = tempfile.mkdtemp(dir=Path(spec["source"]).parent)
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu",
                              "model.rotary_emb": "cpu"}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        if layer < config.first_k_dense_replace:
            places[stem] = "cpu"
            continue
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate",
                     "mlp.shared_experts"):  # fmt: skip
            places[f"{stem}.{part}"] = "cpu"
        places[f"{stem}.mlp.experts"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        spec["source"], dtype="auto", device_map=places, offload_folder=folder
    )

    def close() -> None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)

    return model, None, close


_LOADERS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any, Callable[[], None]]]] = {
    "offloaded": _offloaded,
    "stock": _stock,
    "accelerate": _accelerate,
}


def drop_pages(folder: Path) -> None:
    """Have the operating system forget what it keeps of these files."""
    for file in folder.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError), open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _rss_peak() -> int:
    """Of this program: what getrusage says is inherited from whoever started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _disk_bytes() -> int:
    """Bytes that this process had read from a disk; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/io", encoding="ascii") as file:
        for line in file:
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
