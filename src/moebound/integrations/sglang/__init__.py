"""`python -m sglang.launch_server --model-path STORE`: SGLang with decoded weights.

SGLang calls `register` in each of its processes, by the entry point group `sglang.srt.plugins`
(pyproject.toml). Importing this package imports neither SGLang nor torch.
"""

from __future__ import annotations


def register() -> None:
    """Enter quantization config and loader into SGLang. Any number of times."""
    from moebound.integrations.sglang.loader import enter

    enter()


__all__ = ["register"]
