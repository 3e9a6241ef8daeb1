"""What the server tells about itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.text.serve import stats as stats_module
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.stats import Outcome, Record, ServeStats

from .live import chat_body, running


def record(outcome: Outcome = "completed", ttft_s: float | None = 0.5, n_new: int = 3) -> Record:
    return Record(outcome, "stop", 10, n_new, 0.25, ttft_s, 0.125, 1.25)


def test_times_of_a_real_request(engine: PlainEngine) -> None:
    with running(engine) as live, live.client() as client:
        client.post("/v1/chat/completions", json=chat_body())
        client.post("/v1/chat/completions", json=chat_body(max_tokens=1))
        found = client.get("/stats").json()
    server = found["server"]
    assert server["requests"] == {"completed": 2, "cancelled": 0, "failed": 0, "refused": 0}
    assert (server["prompt_tokens"], server["new_tokens"]) == (62, 15)
    assert (server["ttft_s"]["n"], server["tpot_s"]["n"]) == (2, 1)  # one token has no next
    assert 0 < server["ttft_s"]["p50"] <= server["ttft_s"]["max"]
    assert server["tpot_s"]["p50"] > 0
    assert found["engine"]["kind"] == "builtin"
    first = live.records[0]
    assert first.ttft_s is not None
    assert first.queued_s <= first.ttft_s <= first.total_s


def test_before_the_first_request() -> None:
    found = ServeStats().to_json()
    assert found["ttft_s"] == {"n": 0, "p50": None, "p95": None, "max": None}
    json.dumps(found, allow_nan=False)


def test_counts() -> None:
    stats = ServeStats()
    for outcome in ("completed", "completed", "cancelled", "failed"):
        stats.add(record(outcome))
    stats.add(record("cancelled", None, 0))  # nothing of its prompt was read
    stats.refuse()
    found = stats.to_json()
    assert found["requests"] == {"completed": 2, "cancelled": 2, "failed": 1, "refused": 1}
    assert (found["prompt_tokens"], found["new_tokens"]) == (40, 12)
    assert found["ttft_s"]["n"] == 4
    assert stats.mean_s() == 1.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_quantiles_are_values_that_were_seen(values: list[float]) -> None:
    stats = ServeStats()
    for value in values:
        stats.add(record(ttft_s=value))
    found = stats.to_json()["ttft_s"]
    assert found["p50"] in values
    assert sum(value <= found["p50"] for value in values) * 2 >= len(values)
    assert sum(value >= found["p50"] for value in values) * 2 >= len(values)
    assert found["p50"] <= found["p95"] <= found["max"] == max(values)


def test_old_times_are_forgotten_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "RECENT", 2)
    stats = ServeStats()
    for value in (9.0, 1.0, 2.0):
        stats.add(record(ttft_s=value))
    assert stats.to_json()["ttft_s"]["max"] == 2.0
    assert stats.to_json()["requests"]["completed"] == 3


def test_a_line_of_the_log() -> None:
    assert record().line() == (
        "completed (stop): 10 + 3 tokens, waited 0.25 s, first token after 0.50 s, "
        "then 125.0 ms a token"
    )
    assert record(ttft_s=None).line().count("first token") == 0
