"""Chat templates, rendered in a process of their own, with limits. See rendering.py."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moebound.errors import CheckpointError
from moebound.text.rendering import CPU_S, MEMORY_BYTES, TEXT_BYTES

PATIENCE_S = 120.0
"""By the clock, start included: for a machine so busy that processor time does not come."""

Message = Mapping[str, Any]


class Renderer:
    """One process, started when it is needed and again after a template has ended it.
    Thread-safe; a child of a fork starts one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, messages: Sequence[Message], special: Message) -> str:
        """The text up to where the model's answer begins. special: the special tokens by name.
        Raises CheckpointError for a template that fails, or goes beyond a limit."""
        request = {"template": template, "messages": list(messages), "special": dict(special)}
        with self._lock:
            found = self._ask(json.dumps(request).encode())
        if "text" in found:
            return str(found["text"])
        kind, error = found["kind"], found["error"]
        if kind == "MemoryError":
            raise CheckpointError(
                f"the chat template needs more than {MEMORY_BYTES >> 20} MiB of memory"
            )
        said = error if kind in ("TemplateError", "ValueError") else f"{kind}: {error}"
        raise CheckpointError(f"the chat template refuses the messages: {said}")

    def close(self) -> None:
        """Ends the process; the next `render` starts another. Idempotent."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.kill()
        process.wait()

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._running()
        if process.stdin is None or process.stdout is None:  # pipes were asked for
            raise CheckpointError("the process that renders chat templates has no pipes")
        try:
            process.stdin.write(len(request).to_bytes(8, "little") + request)
            process.stdin.flush()
            deadline = time.monotonic() + PATIENCE_S
            size = int.from_bytes(_read(process.stdout, 8, deadline), "little")
            if size > TEXT_BYTES:
                raise EOFError
            found: dict[str, Any] = json.loads(_read(process.stdout, size, deadline))
        except (OSError, EOFError, ValueError) as error:
            code = process.poll() if isinstance(error, TimeoutError) else process.wait(PATIENCE_S)
            self.close()
            if code == -signal.SIGVTALRM:
                why = f"runs for more than {CPU_S:.0f} s"
            else:
                why = f"ended the process that renders it (exit code {code})"
            raise CheckpointError(f"the chat template {why}") from error
        except BaseException:  # a key press: the answer that is on its way is nobody's
            self.close()
            raise
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            # A session of its own: Ctrl-C is for us. The paths are ours, whatever the folder is.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("rendering.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._process


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        part = os.read(pipe.fileno(), min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


RENDERER = Renderer()
atexit.register(RENDERER.close)
