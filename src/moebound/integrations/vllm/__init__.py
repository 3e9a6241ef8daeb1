"""`vllm serve STORE --load-format moebound`: vLLM with decoded weights.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`
(pyproject.toml). Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations


def register() -> None:
    """Enter loader and quantization config into vLLM's tables. Any number of times."""
    from moebound.integrations.vllm.loader import enter

    enter()


__all__ = ["register"]
