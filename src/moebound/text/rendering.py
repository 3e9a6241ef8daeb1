"""The process that renders chat templates: a program of its own, which imports nothing of ours.

A template is a program that came with a checkpoint. It may run for ever or make a text of any
size, also within one operation that Python cannot break off. So it runs here, where the kernel ends
it: processor time and memory have limits. `templates.py` starts this file and speaks to it.

A message is 8 bytes with its length, little-endian, and so many bytes of JSON. One comes with
{"template", "messages", "special"}, and one goes back: {"text"}, or {"kind", "error"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

CPU_S = 5.0
"""Processor time that one rendering may take."""
MEMORY_BYTES = 512 << 20
"""What this process may need more than it has once it is ready."""
TEXT_BYTES = 32 << 20
"""The longest text that is taken."""


def main() -> None:
    # Errors of the template are answers. Nothing else is written to where answers go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while head := sys.stdin.buffer.read(8):
        request = json.loads(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)  # its signal ends the process
        answer = rendered(render_jinja_template, request)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def rendered(render: Any, request: dict[str, Any]) -> bytes:
    try:
        texts, _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["special"],
        )
        found = {"text": texts[0]}
        data = json.dumps(found).encode()
        if len(data) > TEXT_BYTES:
            raise ValueError(f"it makes a text of more than {TEXT_BYTES >> 20} MiB")
    except Exception as error:
        return json.dumps({"kind": type(error).__name__, "error": str(error)[:2000]}).encode()
    return data


if __name__ == "__main__":
    main()
