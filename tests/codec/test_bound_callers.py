"""Codec `bound`, whoever calls it: threads, forked children, an FPU that flushes to zero."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec import measure
from moebound.codec.base import ArraySpec
from moebound.codec.bound import BoundCodec
from moebound.types import NUMPY_DTYPES

from .weights import gaussian


def test_flush_to_zero_changes_nothing() -> None:
    """A caller may have asked its FPU for flush-to-zero: bounds below 1.2e-38 must still hold."""
    torch = pytest.importorskip("torch")
    x = np.arange(1, 200, dtype=np.uint16).view(NUMPY_DTYPES["BF16"])
    expected = encode(x, 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero")
    try:
        data = encode(x, 1e-40)
        decoded = decode(data)
        assert isinstance(decoded, np.ndarray)
        found = measure(x, decoded, 1e-40)
    finally:
        torch.set_flush_denormal(False)
    assert data == expected
    assert found.broken == 0


def test_many_callers_share_the_helper_threads() -> None:
    x = gaussian((256, 1024), "BF16")
    codec = BoundCodec(segment_weights=1 << 12)
    spec = ArraySpec(x.shape, "BF16", "BF16", 1e-3)
    expected = codec.compress(x, spec, threads=1).data

    def job(n_threads: int) -> bool:
        return codec.compress(x, spec, threads=n_threads).data == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, [1 + i % 5 for i in range(64)]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_helpers_of_its_own() -> None:
    program = """
import os, sys, numpy as np, moebound
x = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
data = moebound.encode(x, 0.01, codec="bound:segment=4096")
child = os.fork()
if child == 0:
    os._exit(0 if moebound.encode(x, 0.01, codec="bound:segment=4096") == data else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "MOEBOUND_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == 0
