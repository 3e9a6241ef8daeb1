"""docs/serve.md: its examples run against the server that it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moebound.text.generation import MAX_TOP_LOGPROBS
from moebound.text.serve.app import create_app
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.prompts import MOST_LOGPROBS
from moebound.text.serve.schema import (
    IGNORED,
    MAX_CHOICES,
    MAX_COMPLETION_LOGPROBS,
    MAX_STOPS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
)
from moebound.text.serve.worker import Worker

from .live import Live

TEXT = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(shared: Live, code: str) -> None:
    exec(code.replace(ADDRESS, shared.root), {})


def test_the_curl_lines_run(shared: Live) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (script,) = [block for block in blocks("sh") if "curl" in block]
    done = subprocess.run(
        ["sh", "-e", "-c", script.replace(ADDRESS, shared.root)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert '"error"' not in done.stdout
    models, end = json.JSONDecoder().raw_decode(done.stdout)
    assert models["object"] == "list"
    chat, _ = json.JSONDecoder().raw_decode(done.stdout, end)
    assert chat["choices"][0]["message"]["content"] == r"42 - 17 = 25. \boxed{25}"
    assert "data: [DONE]" in done.stdout
    assert '"ttft_s"' in done.stdout


def test_the_fields_are_those_of_the_code() -> None:
    table = TEXT.partition("| field |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    for column, request in ((1, ChatRequest), (2, CompletionRequest)):
        written = {
            field: row[column].strip() for row in rows for field in re.findall(r"`(\w+)`", row[0])
        }
        assert len(written) == sum(len(re.findall(r"`(\w+)`", row[0])) for row in rows)
        known = dict.fromkeys(IGNORED, "ignored") | dict.fromkeys(UNSUPPORTED, "refused")
        known |= dict.fromkeys(request.model_fields, "accepted")
        assert {f: how for f, how in written.items() if how != "unknown"} == known
    assert f"up to {MAX_STOPS} texts" in table
    assert f"up to {MAX_CHOICES} texts" in table
    assert f"0 to {MAX_COMPLETION_LOGPROBS}" in table
    assert f"0 to {MAX_TOP_LOGPROBS}" in table
    assert f"{MOST_LOGPROBS // 1_000_000} million" in TEXT


def test_the_metrics_are_those_of_the_code(shared: Live) -> None:
    pytest.importorskip("prometheus_client", reason="pip install '.[serve]'")
    with shared.client() as client:
        found = set(re.findall(r"^# TYPE moebound_(\w+)", client.get("/metrics").text, re.M))
    section = TEXT.partition("## Metrics")[2].partition("\n## ")[0]
    names = {name for name in re.findall(r"`(\w+)`", section) if name != "moebound_"}
    assert found == {name for name in names if not name.startswith("expert_")}


def test_the_routes_are_those_of_the_application(engine: PlainEngine) -> None:
    app = create_app(engine, ServeConfig("any"), Worker(engine, 0))
    found = {getattr(route, "path", "") for route in app.routes}
    table = TEXT.partition("| route |")[2].partition("\n\n")[0]
    written = re.findall(r"`(?:\w+ )?(/[\w/]*)", table)
    written += re.findall(r", `(/[\w/]+)`", table)
    assert {path.replace("{name:path}", "NAME") for path in found} == set(written)
