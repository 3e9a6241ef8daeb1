"""The page at /, in a real browser, against the real server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moebound.text.serve.engine import PlainEngine

from .browser import Browser, browser
from .live import QUESTION, Gate, Live, running, until

KEY = "secret"
SHOWN = r"42 - 17 = 25. \boxed{25}"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def test_what_the_page_may_do(shared: Live) -> None:
    with shared.client() as client:
        found = client.get("/")
    assert found.headers["content-type"].startswith("text/html")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = found.text
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text


def test_a_person_asks_with_the_keyboard(tab: Browser, shared: Live) -> None:
    tab.events.clear()
    tab.open(f"{shared.root}/")
    tab.until("document.getElementById('model').textContent === 'wordmath'")
    tab.run("document.getElementById('prompt').focus()")
    tab.write(QUESTION)
    tab.press("Enter", code=13, modifiers=2)  # with Ctrl
    tab.until("document.getElementById('state').textContent.includes('ended by the model')")
    assert tab.run("document.getElementById('answer').textContent") == SHOWN
    state = tab.run("document.getElementById('state').textContent")
    assert "14 tokens" in state
    assert "tokens/s" in state
    tab.until("document.getElementById('facts').textContent.includes('Requests answered')")
    assert tab.run("document.getElementById('answer').getAttribute('aria-busy')") == "false"
    # Tab reaches the other kind, and it continues the text.
    tab.run("document.querySelector('input[value=completion]').click()")
    tab.run("document.getElementById('send').click()")
    tab.until(f"document.getElementById('answer').textContent === {' ' + SHOWN!r}")
    if path := os.environ.get("MOEBOUND_SCREENSHOT"):
        tab.screenshot(Path(path))
    assert tab.wrong() == []
    # Nothing but this server was asked.
    asked = [
        event["params"]["request"]["url"]
        for event in tab.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert all(url.startswith((shared.root, "data:")) for url in asked)


def test_everything_has_a_name_that_is_read_out(tab: Browser, shared: Live) -> None:
    tab.open(f"{shared.root}/")
    tab.until("document.getElementById('model').textContent === 'wordmath'")
    nodes = tab.ask("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value")
        in {"textbox", "button", "radio", "spinbutton", "log", "table"}
    ]
    assert len(controls) >= 6
    assert all(node["name"]["value"] for node in controls)
    # Nothing is wider than a phone.
    tab.ask("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1,
            mobile=True)  # fmt: skip
    assert tab.run("document.documentElement.scrollWidth") <= 360
    tab.ask("Emulation.clearDeviceMetricsOverride")


def test_the_text_comes_token_by_token_and_can_be_stopped(
    tab: Browser, engine: PlainEngine, gate: Gate
) -> None:
    with running(engine) as live:
        tab.open(f"{live.root}/")
        tab.until("document.getElementById('model').textContent === 'wordmath'")
        gate.close()
        gate.allow(3)
        tab.run(f"document.getElementById('prompt').value = {QUESTION!r}")
        tab.run("document.getElementById('send').click()")
        tab.until("document.getElementById('answer').textContent")
        assert SHOWN.startswith(tab.run("document.getElementById('answer').textContent"))
        assert tab.run("document.getElementById('send').disabled")
        tab.run("document.getElementById('stop').click()")
        tab.until("document.getElementById('state').textContent.startsWith('Stopped')")
        gate.open()
        until(lambda: live.stats()["requests"]["cancelled"] == 1)


def test_an_error_is_shown(tab: Browser, shared: Live) -> None:
    tab.open(f"{shared.root}/")
    tab.until("document.getElementById('model').textContent === 'wordmath'")
    tab.run("document.getElementById('prompt').value = ' coins'.repeat(300)")
    tab.run("document.getElementById('send').click()")
    tab.until("document.getElementById('state').textContent.includes('256 positions')")
    assert not tab.run("document.getElementById('send').disabled")


def test_a_server_with_a_key_asks_for_it(tab: Browser, engine: PlainEngine) -> None:
    with running(engine, api_key=KEY) as live:
        with live.client() as client:
            assert client.get("/", headers={"Accept": "text/html"}).status_code == 401
        tab.open(f"{live.root}/")
        tab.until("!document.getElementById('key-form').hidden")
        assert "wordmath" not in tab.run("document.documentElement.outerHTML")
        tab.write("wrong")  # it has the focus
        tab.press("Enter", code=13)
        tab.run("document.getElementById('key-form').requestSubmit()")
        tab.until("document.getElementById('state').textContent.includes('not the server')")
        tab.run(f"document.getElementById('key').value = {KEY!r}")
        tab.run("document.getElementById('key-form').requestSubmit()")
        tab.until("document.getElementById('model').textContent === 'wordmath'")
        tab.run(f"document.getElementById('prompt').value = {QUESTION!r}")
        tab.run("document.getElementById('send').click()")
        tab.until(f"document.getElementById('answer').textContent === {SHOWN!r}")
