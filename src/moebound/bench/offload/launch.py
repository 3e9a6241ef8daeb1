"""Start one run as a process of its own, and take its row, or why there is none."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moebound.bench.offload.memory import drop_pages
from moebound.bench.offload.memory_limit import memory_group

_KILLED = -9


def launch(
    spec: dict[str, Any], work: Path, *, timeout_s: float, memory_limit: int | None = None
) -> dict[str, Any]:
    """The row of `measure` for this spec, or {"error": ...}: a run that fails ends nobody else's.

    memory_limit: bytes that the process may have, page cache included; the row then has
    "memory_limit_bytes" and "memory_peak_bytes". Raises BackendUnavailable where no limit can be
    set.
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
        file = scratch / "spec.json"
        file.write_text(json.dumps({**spec, "scratch": str(scratch)}), encoding="utf-8")
        command = [sys.executable, "-m", "moebound.bench.offload.measure", str(file)]
        # Threads of torch that spin while they wait would keep our loading threads from their work,
        # and the wish not to is for the whole benchmark. Those of llama.cpp are meant to spin.
        spared = "OMP_WAIT_POLICY" if spec["how"] == "llama.cpp" else ""
        environment = {name: value for name, value in os.environ.items() if name != spared}
        if memory_limit is None:
            return _run(command, environment, timeout_s)
        group = stack.enter_context(memory_group(memory_limit))
        # What others have read counts for them: it must not be there, nor wait to be written.
        os.sync()
        drop_pages(Path(spec["source"]))
        row = _run(group.command(command), environment, timeout_s)
        if group.kills:
            row = {
                "error": f"killed: more memory was needed than the limit of {memory_limit / 1e9:g} "
                "GB"
            }
        return row | {"memory_limit_bytes": memory_limit, "memory_peak_bytes": group.peak_bytes}


def _run(command: list[str], environment: dict[str, str], timeout_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True,
                              timeout=timeout_s, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"stopped: not done after {timeout_s:g} s"}
    if done.returncode == _KILLED:
        return {"error": "killed, probably because memory ran out"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
