"""One run, in a process of its own: a prompt, then token by token.

    python -m moebound.bench.offload.measure SPEC.json      # prints one JSON row

SPEC: how to load ("offloaded", "clients", "stock", "accelerate", "llama.cpp"), what, with which
options; the token ids, the trace or None for the model's own routing, how many tokens. Peak memory
is this process's; the page cache is dropped for the files before, and while it reads, where the
spec says so.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebound.bench.offload.clients import measure_clients
from moebound.bench.offload.memory import (
    disk_bytes,
    drop_pages,
    peak_resident_bytes,
    resident_bytes,
)
from moebound.bench.offload.subjects import SUBJECTS, Subject
from moebound.cache import load_trace


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """spec: how, source, options, trace, top_k, ids, prompt, warm, tokens, drop_cache, device,
    and scratch, a folder.

    The warming text and the measured one are different pieces of the ids. "stats" are of the
    measured tokens alone, "prompt_stats" of their prompt. Of several clients: `measure_clients`.
    """
    torch.manual_seed(0)
    if spec["how"] == "clients":
        return measure_clients(spec)
    source, n_prompt, at = Path(spec["source"]), spec["prompt"], spec["prompt"] + spec["warm"]
    trace = None if spec["trace"] is None else load_trace(Path(spec["trace"]))
    ids = np.load(spec["ids"], allow_pickle=False).tolist()
    if spec["drop_cache"]:
        drop_pages(source)
    begin = time.perf_counter()
    subject = SUBJECTS[spec["how"]](spec, trace)
    loaded_s = time.perf_counter() - begin
    loaded_bytes = resident_bytes()

    subject.begin(0)
    for _ in _feed(subject, ids[:at], n_prompt):
        pass
    subject.stats(reset=True)
    if spec["drop_cache"]:
        drop_pages(source)
    subject.begin(at)
    before = disk_bytes()
    steps = _feed(subject, ids[at : at + n_prompt + spec["tokens"]], n_prompt)
    ttft, _ = next(steps)
    prompt_stats, before_tokens = subject.stats(reset=True), disk_bytes()
    found = list(steps)
    times = [seconds for seconds, _ in found]
    row = {
        "load_s": loaded_s,
        "ttft_s": ttft,
        "tpot_s": times,
        "tpot_p50_s": statistics.median(times),
        "tpot_p99_s": float(np.percentile(times, 99)),
        "tpot_mean_s": statistics.fmean(times),
        "rss_loaded_bytes": loaded_bytes,
        "rss_peak_bytes": peak_resident_bytes(),
        "disk_bytes": disk_bytes() - before,
        "disk_bytes_per_token": (disk_bytes() - before_tokens) / len(times),
        "logits_sum": found[-1][1],
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available() and spec["device"] != "cpu":
        row["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    stats = subject.stats(reset=False)
    if stats is not None:
        row |= {"stats": stats, "prompt_stats": prompt_stats}
    subject.close()
    return row


def _feed(subject: Subject, ids: list[int], n_prompt: int) -> Iterator[tuple[float, float]]:
    """The prompt, then a token at a time: seconds of each step, and its sum of logits."""
    for start in (0, *range(n_prompt, len(ids))):
        tokens = ids[start : start + 1] if start else ids[:n_prompt]
        begin = time.perf_counter()
        total = subject.step(tokens)
        yield time.perf_counter() - begin, total


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
