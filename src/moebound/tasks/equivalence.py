"""Whether two mathematical answers are the same, by the library math-verify.

It may take for ever (`10^{10^{10}}` is enough), and its own time limit is a signal, which works in
main threads only and not at all inside of one long multiplication. So it runs in a process beside
this one, which is put to an end where it does not answer in time; an answer that cannot be
checked is not equal.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
import time

from moebound.errors import MoeboundError
from moebound.extras import unavailable

SECONDS = 10.0
START_SECONDS = 120.0
LONGEST = 20_000
"""Characters of a text that are looked at, from its end."""


class Checker:
    """Asks the process, starts it when it is first needed. Thread safe; one question at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._rest = b""

    def same(self, answer: str, text: str) -> tuple[bool, str | None]:
        """Whether the answer that `text` gives equals `answer`, and that answer as it was read
        (None where none was found, or in time).

        answer: LaTeX. text: with LaTeX between dollars, or in a box. Raises BackendUnavailable if
        math-verify is not installed.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._ask([answer[-LONGEST:], text[-LONGEST:]])
            if reply is None:
                self.close()
                return False, None
            return bool(reply[0]), None if reply[1] is None else str(reply[1])

    def close(self) -> None:
        """End the process. The next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process, self._rest = None, b""

    def _start(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moebound.tasks.equivalence"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        ready = self._read(START_SECONDS)
        if ready is None or ready == ["missing"]:
            self.close()
            if ready is None:
                raise MoeboundError("the process that compares answers does not start")
            raise unavailable("comparing mathematical answers", "math_verify")

    def _ask(self, question: list[str]) -> list[object] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._read(self._seconds)

    def _read(self, seconds: float) -> list[object] | None:
        """The next line, or None where it does not come in time, or the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                return None
            data = self._process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        found: list[object] = json.loads(line)
        return found


_SHARED = Checker()
atexit.register(_SHARED.close)


def same(answer: str, text: str) -> tuple[bool, str | None]:
    """`Checker.same` by a process that all share."""
    return _SHARED.same(answer, text)


def serve() -> None:
    """The process: a question a line, an answer a line, until there are no more."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for a reply
    try:
        from math_verify import parse, verify
    except ImportError:
        print('["missing"]', file=replies, flush=True)
        return
    print('["ready"]', file=replies, flush=True)
    for line in sys.stdin:
        answer, text = json.loads(line)
        try:
            gold = parse(answer, parsing_timeout=None)
            found = parse(text, parsing_timeout=None)
            equal = verify(gold, found, timeout_seconds=None) if gold and found else False
            reply = [bool(equal), str(found[-1]) if found else None]
        except Exception:  # whatever it trips over in a model's answer is no right answer
            reply = [False, None]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
