"""What a measurement was made on: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moebound import _native

_PACKAGES = ("moebound", "numpy", "ml_dtypes", "torch", "pysz", "zfpy")
_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vbmi2")


def describe(*packages: str) -> dict[str, Any]:
    """JSON-ready facts; versions of these packages too. What cannot be found out is None."""
    model, flags = _cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "kernel": _native.isa(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
        "commit": _commit(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MOEBOUND_")},
    }


def _cpu() -> tuple[str | None, set[str]]:
    """Model name and flags, where the system says them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, set()
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name"), set(flags.split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this file runs from, with "+" if the tree has changes; None if not in git."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository: this file must be tracked.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
