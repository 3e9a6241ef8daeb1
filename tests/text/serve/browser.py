"""A real browser without a window, spoken to through pipes: Chromium and its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .live import PATIENCE_S

# It reads orders from file 3 and answers on file 4.
_START = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for theirs, fd in zip((3, 4), ours):
    os.dup2(fd, theirs)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
]


class Browser:
    """One page. events: what the browser told meanwhile."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers = orders, answers
        self._n, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._n += 1
        order: dict[str, Any] = {"id": self._n, "method": method, "params": params}
        if self._session:
            order["sessionId"] = self._session
        message = json.dumps(order).encode() + b"\0"
        while message:
            message = message[os.write(self._orders, message) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._n:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.run(script):
            assert time.monotonic() < deadline, f"never: {script}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def press(self, key: str, *, code: int, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                     windowsVirtualKeyCode=code, modifiers=modifiers)  # fmt: skip

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def wrong(self) -> list[Any]:
        """What scripts and the policy of the page complained of."""
        return [
            event["params"]
            for event in self.events
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        ]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._answers, 1 << 16)
            assert got, "the browser has ended"
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Skips the test where there is none. folder: for its profile."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium to try the page in")
    theirs_in, orders = os.pipe()
    answers, theirs_out = os.pipe()
    command = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), program, *_FLAGS,
               f"--user-data-dir={folder}", "--window-size=900,1000"]  # fmt: skip
    process = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(orders, answers)
    finally:
        os.close(orders)
        os.close(answers)
        process.terminate()
        process.wait(PATIENCE_S)
