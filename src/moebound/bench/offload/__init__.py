"""`moebound bench offload`: what running with compressed experts costs, beside raw ones and peers.

settings.py      what to run
prepare.py       what runs need, made once:
  model.py         a checkpoint with Moonlight's expert shapes and random weights
  text.py          the tokens that all runs read
  routing.py       a recorded or drawn trace in place of what random routers would choose
  gguf_file.py     the checkpoint for llama.cpp
  gguf_quantized.py  the same in fewer bits, by its own quantizer
cases.py         which runs, one after the other
  launch.py        each in a process of its own
  memory_limit.py  within a limit that counts the page cache, if one is asked for
measure.py       one run: prompt, then token by token; times, hits, bytes, memory
  subjects.py      what is measured: ours, transformers, accelerate, llama.cpp
  memory.py        what a process holds and has read
clients.py       one run of several clients at a time, beside one
report.py        what was found, as it is stored
table.py         the rows for people
"""

from moebound.bench.offload.cases import run
from moebound.bench.offload.report import OffloadReport
from moebound.bench.offload.settings import OffloadSettings
from moebound.bench.offload.table import render_clients, render_offload

__all__ = ["OffloadReport", "OffloadSettings", "render_clients", "render_offload", "run"]
