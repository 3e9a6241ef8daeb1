"""docs/serve.md: its examples run against the server that it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moebound.text.serve.app import create_app
from moebound.text.serve.config import ServeConfig
from moebound.text.serve.engine import PlainEngine
from moebound.text.serve.schema import IGNORED, MAX_STOPS, UNSUPPORTED
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
    section = TEXT.partition("**Carried out:**")[2].partition("\n\n")[0]
    carried, _, rest = section.partition("**Accepted")
    accepted, _, refused = rest.partition("**Refused")
    assert f"up to {MAX_STOPS}" in " ".join(carried.split())
    assert set(re.findall(r"`(\w+)`", accepted)) <= IGNORED
    assert set(re.findall(r"`(\w+)`", refused)) <= UNSUPPORTED.keys()


def test_the_routes_are_those_of_the_application(engine: PlainEngine) -> None:
    app = create_app(engine, ServeConfig("any"), Worker(engine, 0))
    found = {getattr(route, "path", "") for route in app.routes}
    table = TEXT.partition("| route |")[2].partition("\n\n")[0]
    written = re.findall(r"(/[\w/]+)", table)
    assert {path.replace("{name:path}", "NAME") for path in found} == set(written)
