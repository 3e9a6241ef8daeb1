"""The page at /, where a person tries the model: one file, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope


class Page:
    """The same for every model, and nothing of it is secret: what it shows it asks the server."""

    def __init__(self) -> None:
        self._text, self._policy = _page()

    def response(self, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        return Response(
            self._text,
            status,
            {
                **(headers or {}),
                "Content-Security-Policy": self._policy,
                "Cache-Control": "no-cache",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
            },
            "text/html",
        )

    def wanted(self, scope: Scope) -> bool:
        """Whether a browser asks for it, as a page."""
        accepted = Headers(scope=scope).get("accept", "")
        return scope["method"] == "GET" and scope["path"] == "/" and "text/html" in accepted


@cache
def _page() -> tuple[str, str]:
    """(the page, its policy: its own script and style run, and it speaks to its own server)"""
    text = files("moebound.text.serve").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
