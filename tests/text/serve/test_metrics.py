"""/metrics: read by Prometheus' own parser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moebound.text.serve.engine import PlainEngine

from .live import Live, chat_body, running


def samples(text: str) -> dict[tuple[str, ...], float]:
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install '.[serve]'")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_tokens_times_and_the_queue(engine: PlainEngine) -> None:
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    with running(engine, queue=3) as live, live.client() as client:
        client.post("/v1/chat/completions", json=chat_body())
        client.post("/v1/chat/completions", json=chat_body(max_tokens=1))
        answer = client.get("/metrics")
        stats = live.stats()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    assert found["moebound_requests_total", "completed"] == 2
    assert found["moebound_prompt_tokens_total",] == stats["prompt_tokens"] == 62
    assert found["moebound_generated_tokens_total",] == stats["new_tokens"] == 15
    assert found["moebound_queue_size",] == 3
    assert found["moebound_requests_waiting",] == found["moebound_requests_running",] == 0
    assert found["moebound_time_to_first_token_seconds_count",] == 2
    assert found["moebound_time_to_first_token_seconds_bucket", "+Inf"] == 2
    assert found["moebound_time_per_output_token_seconds_count",] == 1
    assert found["moebound_request_time_seconds_sum",] == pytest.approx(
        sum(record.total_s for record in live.records)
    )
    assert not any(name.startswith("moebound_expert") for name, *_ in found)


def test_what_offloaded_experts_did(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    from moebound.offload.loading import load

    with load("builtin:wordmath", ram_budget="20%") as offloaded:
        with running(offloaded) as live, live.client() as client:
            client.post("/v1/chat/completions", json=chat_body())
            found = samples(client.get("/metrics").text)
        stats = offloaded.stats()
    hits, misses = found["moebound_expert_hits_total",], found["moebound_expert_misses_total",]
    assert misses > 0
    assert hits / (hits + misses) == pytest.approx(stats["hit_ratio"])
    assert found["moebound_expert_read_bytes_total",] == stats["bytes_moved"] > 0
    assert found["moebound_expert_loads_total",] == stats["loads"]


def test_without_the_package_the_command_that_installs_it(
    shared: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with shared.client() as client:
        answer = client.get("/metrics")
    assert answer.status_code == 501
    assert ".[serve]" in answer.json()["error"]["message"]


def test_what_a_policy_skipped() -> None:
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    from moebound.offload.loading import load

    with load("builtin:wordmath-mixtral", skip="hobbit_re:above0.5") as offloaded:
        with running(offloaded) as live, live.client() as client:
            client.post("/v1/chat/completions", json=chat_body())
            found = samples(client.get("/metrics").text)
        stats = offloaded.stats()["skipping"]
    assert found["moebound_expert_pairs_total",] == stats["pairs"] > 0
    assert found["moebound_expert_pairs_skipped_total",] == stats["skipped"] > 0
