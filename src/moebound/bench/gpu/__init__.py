"""`moebound bench gpu`: what decoding on a GPU gives, on this one.

In this order:

    cases.py       experts of full size, encoded
    verify.py      every kind of payload decodes to the CPU's bits, and damage is found
    throughput.py  kernels alone, by segment size and rate
    transfer.py    copies, and decoding behind them, over the experts of a layer
    benchmark.py   all of it: start reading there
    table.py       as text
    cuszp.py       the stream of cuSZp, apart: `python -m moebound.bench.gpu.cuszp`
"""

from moebound.bench.gpu.benchmark import FORMAT, GpuSettings, run
from moebound.bench.gpu.table import render_gpu

__all__ = ["FORMAT", "GpuSettings", "render_gpu", "run"]
