"""Processes of this Python, forked from one that has imported torch and transformers already.

To import them takes longer than most processes of the tests work. Only the start of an interpreter
is left out: a process still is one of its own, with its own memory, arguments, environment and exit
code.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_IMPORTED = [
    "accelerate",
    "moebound.offload.loading",
    "moebound.store",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
]

_begun = subprocess.run
_context = multiprocessing.get_context


@contextmanager
def forked() -> Iterator[None]:
    """`subprocess.run` forks programs of this Python (`run`), and multiprocessing forks what it
    would spawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subprocess.run", run)
        patch.setattr("multiprocessing.get_context", context)
        yield


def context(method: str | None = None) -> Any:
    if method != "spawn":
        return _context(method)
    forking = _context("forkserver")
    forking.set_forkserver_preload(_IMPORTED)
    return forking


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """In the place of `subprocess.run`: forks `python -m MODULE ...` whose output is captured as
    text; anything else is begun as ever."""
    forked = {"capture_output": True, "text": True, "check": False}
    if list(command[:2]) != [sys.executable, "-m"] or not forked.items() <= options.items():
        return _begun(command, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").write_text(options.get("input", ""), encoding="utf-8")
        environment = dict(options.get("env", os.environ))
        process = context("spawn").Process(target=_program, args=(command[2:], environment, folder))
        process.start()
        process.join(options.get("timeout"))
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, options["timeout"])
        out, err = ((folder / said).read_text(encoding="utf-8") for said in ("out", "err"))
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess(command, code, out, err)


def _program(arguments: Sequence[str], environment: dict[str, str], folder: Path) -> None:
    writes = os.O_WRONLY | os.O_CREAT
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", writes), ("err", writes))):
        file = os.open(folder / name, flags)
        os.dup2(file, number)
        os.close(file)
    # multiprocessing has closed its own.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
