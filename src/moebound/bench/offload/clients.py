"""Several clients at a time: tokens a second of N, beside one alone, in one process.

Each client reads a prompt of its own and then token by token, as fast as it gets them; its keys and
values are its own. What is timed is from the first prompt to the last token of all: `alone` one
client by itself, `one` the same as the only one of a server of several, `together` N of them.
`decode` counts from when the last prompt has been read, tokens behind that.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebound.bench.offload.memory import drop_pages, peak_resident_bytes
from moebound.bench.offload.routing import ForcedRouting
from moebound.cache import load_trace
from moebound.model.joined import JoinedLinears
from moebound.model.strands import Strand, Strands
from moebound.offload.loading import load
from moebound.text.growing_cache import GrowingCache
from moebound.text.one_pass import OnePass


class _Client:
    """Feeds its tokens, a pass after another; rests before each."""

    def __init__(self, model: Any, ids: list[int], n_prompt: int) -> None:
        self._model, self._ids, self._n_prompt = model, ids, n_prompt
        self.strand: Strand | None = None
        self.times = list[float]()
        self.total = 0.0

    def work(self) -> None:
        cache = GrowingCache(self._model.config).cache
        for start in (0, *range(self._n_prompt, len(self._ids))):
            tokens = self._ids[start : start + 1] if start else self._ids[: self._n_prompt]
            assert self.strand is not None
            self.strand.rest()
            batch = torch.tensor([tokens], device=self._model.device)
            logits = self._model(
                input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            self.total = float(logits.double().sum())  # waits for the device
            self.times.append(time.perf_counter())


def measure_clients(spec: dict[str, Any]) -> dict[str, Any]:
    """spec: as of `measure`, with clients. Stats are of all tokens together, prompts included."""
    n, n_prompt, n_tokens = spec["clients"], spec["prompt"], spec["tokens"]
    source = Path(spec["source"])
    trace = None if spec["trace"] is None else load_trace(Path(spec["trace"]))
    ids = np.load(spec["ids"], allow_pickle=False)
    length = n_prompt + n_tokens
    own = [np.take(ids, range(i * length, (i + 1) * length), mode="wrap").tolist()
           for i in range(n)]  # fmt: skip
    row: dict[str, Any] = {"clients": n, "threads": torch.get_num_threads()}
    with load(spec["source"], drop_cache=spec["drop_cache"], **spec["options"]) as offloaded:
        model, routing = offloaded.model, None
        if trace is not None:
            routing = ForcedRouting(model, trace, top_k=spec["top_k"])
        apart = 0 if trace is None else len(trace.layers[0].index) // n

        def run(texts: list[list[int]], *, joins: bool) -> dict[str, Any]:
            offloaded.meter.reset()
            if spec["drop_cache"]:
                drop_pages(source)
            strands = Strands(joins=joins)
            clients = [_Client(model, text, n_prompt) for text in texts]
            for i, client in enumerate(clients):
                client.strand = strands.start(client.work)
                if routing is not None:
                    routing.begin(i * apart, strand=client.strand)
            alive = [client.strand for client in clients if client.strand is not None]
            strands.advance(alive)  # to where each rests before its first pass
            begin = time.perf_counter()
            while alive := [strand for strand in alive if not strand.dead]:
                strands.advance(alive)
            for client in clients:
                if client.strand is not None and client.strand.error is not None:
                    raise client.strand.error
            end = max(client.times[-1] for client in clients)
            first = max(client.times[0] for client in clients)
            return {
                "tokens_per_s": n_tokens * len(texts) / (end - begin),
                "decode_tokens_per_s": n_tokens * len(texts) / (end - first),
                "ttft_s": first - begin,
                "logits": [client.total for client in clients],
                "stats": offloaded.stats(),
            }

        with torch.no_grad():
            run([own[0][: n_prompt + spec["warm"]]], joins=False)
        row["alone"] = run(own[:1], joins=False)
        linears = JoinedLinears(model)
        one_pass = OnePass(model)
        row["joined_linears"] = len(linears)
        row["one"] = run(own[:1], joins=True)
        run([text[: n_prompt + 2] for text in own], joins=True)  # tried out what is new
        row["together"] = run(own, joins=True)
        row["one_pass"] = {"passes": one_pass.taken, "why_not": one_pass.why_not}
        one_pass.remove()
        linears.remove()
    row["ratio"] = row["together"]["tokens_per_s"] / row["alone"]["tokens_per_s"]
    row["decode_ratio"] = (
        row["together"]["decode_tokens_per_s"] / row["alone"]["decode_tokens_per_s"]
    )
    row["same_alone"] = row["one"]["logits"][0] == row["together"]["logits"][0]
    row["rss_peak_bytes"] = peak_resident_bytes()
    return row
