"""What Prometheus reads: the counters of /stats in its text format, through its own client."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moebound.extras import need
from moebound.text.serve.stats import HISTOGRAMS, ServeStats

_HELP = {
    "queued_s": ("queue_time_seconds", "What requests waited before their turn."),
    "ttft_s": ("time_to_first_token_seconds", "From a request to its first token, waiting too."),
    "tpot_s": ("time_per_output_token_seconds", "Of the tokens behind the first of a request."),
    "total_s": ("request_time_seconds", "From a request to its end."),
}


def exposition(
    stats: ServeStats, state: Mapping[str, int | bool], engine: Mapping[str, Any]
) -> tuple[bytes, str]:
    """(body, content type). state: `Worker.state`. engine: `Engine.stats`; what it tells of
    offloaded experts is among the metrics. Raises BackendUnavailable without prometheus_client."""
    client = need("prometheus_client", "/metrics")
    core = need("prometheus_client.core", "/metrics")
    registry = client.CollectorRegistry()
    registry.register(_Collector(core, stats, state, engine))
    return client.generate_latest(registry), client.CONTENT_TYPE_LATEST


class _Collector:
    """Of one moment."""

    def __init__(
        self,
        core: Any,
        stats: ServeStats,
        state: Mapping[str, int | bool],
        engine: Mapping[str, Any],
    ) -> None:
        self._core, self._stats, self._state, self._engine = core, stats, state, engine

    def collect(self) -> Iterator[Any]:
        core, found = self._core, self._stats.to_json()
        requests = core.CounterMetricFamily(
            "moebound_requests", "Requests that have left.", labels=["outcome"]
        )
        for outcome, count in found["requests"].items():
            requests.add_metric([outcome], count)
        yield requests
        yield self._counter("prompt_tokens", "Tokens of prompts read.", found["prompt_tokens"])
        yield self._counter("generated_tokens", "Tokens generated.", found["new_tokens"])
        for name, what in (
            ("running", "Requests that are being answered."),
            ("waiting", "Requests in the queue."),
            ("reading", "Requests whose body is being read."),
        ):
            yield core.GaugeMetricFamily(f"moebound_requests_{name}", what, self._state[name])
        for name, what, key in (
            ("queue_size", "Requests that may wait.", "queue"),
            ("sequences_running", "Texts that are being generated.", "sequences"),
            ("sequences_paused", "Texts of these that wait for memory.", "sequences_paused"),
            ("sequences_limit", "Texts that may be generated at a time.", "max_sequences"),
            ("kv_cache_bytes", "Keys, values and states of running texts.", "kv_bytes"),
            ("kv_cache_budget_bytes", "What they may take; 0 for no limit.", "kv_budget_bytes"),
        ):
            yield core.GaugeMetricFamily(f"moebound_{name}", what, self._state[key])
        for name, histogram in self._stats.histograms().items():
            metric, what = _HELP[name]
            yield core.HistogramMetricFamily(
                f"moebound_{metric}",
                what,
                buckets=[
                    ("+Inf" if bound == math.inf else f"{bound:g}", count)
                    for bound, count in zip(HISTOGRAMS[name], histogram.cumulative, strict=True)
                ],
                sum_value=histogram.total,
            )
        yield from self._experts()

    def _experts(self) -> Iterator[Any]:
        """Of an engine that offloads; any other has none of this."""
        tiers = self._engine.get("tiers")
        if not isinstance(tiers, Mapping):
            return
        hits = tiers.get("decoded", 0)
        yield self._counter("expert_hits", "Experts found decoded in memory.", hits)
        yield self._counter(
            "expert_misses", "Experts that had to be fetched.", sum(tiers.values()) - hits
        )
        for name, key, what in (
            ("expert_loads", "loads", "Experts fetched, ahead of time too."),
            ("expert_read_bytes", "bytes_moved", "Bytes of experts that were fetched."),
            ("expert_evictions", "evictions", "Experts that made room for others."),
        ):
            yield self._counter(name, what, self._engine[key])
        stalls = self._core.CounterMetricFamily(
            "moebound_expert_stall_seconds", "Waited for experts.", labels=["cause"]
        )
        for cause, seconds in self._engine["stall_s"].items():
            stalls.add_metric([cause], seconds)
        yield stalls
        skipping = self._engine.get("skipping")
        if isinstance(skipping, Mapping):
            for name, key, what in (
                ("expert_pairs", "pairs", "Pairs of a token and an expert that it was sent to."),
                ("expert_pairs_skipped", "skipped", "Of these, what the policy left out."),
            ):
                yield self._counter(name, what, skipping[key])

    def _counter(self, name: str, what: str, value: float) -> Any:
        return self._core.CounterMetricFamily(f"moebound_{name}", what, value)
