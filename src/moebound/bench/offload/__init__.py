"""`moebound bench offload`: what running with compressed experts costs, beside raw ones and peers.

model.py     a checkpoint with Moonlight's expert shapes and random weights
routing.py   a recorded or drawn trace in place of what random routers would choose
measure.py   one run: prompt, then token by token; times, hits, bytes, memory
cases.py     which runs, each in a process of its own, their rows
table.py     the rows for people
"""

from moebound.bench.offload.cases import OffloadReport, Settings, run
from moebound.bench.offload.table import render_offload

__all__ = ["OffloadReport", "Settings", "render_offload", "run"]
