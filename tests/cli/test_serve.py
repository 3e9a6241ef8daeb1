"""`moebound serve`: what is refused before a model is loaded. tests/text/serve has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import SRC, Run


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("moebound.offload.loading.load", fail)


def test_a_key_that_is_empty_does_not_open_the_server(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "API key" in run("serve", SRC, "--port", 0, "--api-key", "").stderr
    monkeypatch.setenv("MOEBOUND_API_KEY", "")
    ran = run("serve", SRC, "--port", 0)
    assert ran.code == 2
    assert "API key" in ran.stderr


def test_a_key_is_not_shown(run: Run) -> None:
    ran = run("serve", SRC, "--port", 0, "--api-key", "two words", "--json")
    assert ran.code == 2
    assert "two words" not in ran.stderr + ran.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"], ["--port", "-1"], ["--queue", "-1"], ["--max-tokens", "0"],
        ["--max-prompt-tokens", "0"], ["--max-body-bytes", "0"], ["--grace", "-1"],
        ["--grace", "nan"], ["--host", "no.such.host.invalid"], ["--chat-template", "nowhere"],
    ],
)  # fmt: skip
def test_options_that_are_wrong(run: Run, options: list[str]) -> None:
    ran = run("serve", SRC, *([] if "--port" in options else ["--port", "0"]), *options)
    assert ran.code == 2
    assert options[0].removeprefix("--").replace("-", "_").split("_")[0] in ran.stderr


def test_a_template_that_is_no_text(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_bytes(b"\xff\xfe")
    ran = run("serve", SRC, "--port", 0, "--chat-template", path)
    assert ran.code == 2
    assert str(path) in ran.stderr
