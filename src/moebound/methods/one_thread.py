"""Linear algebra whose last bits do not depend on how many CPUs there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_inside = [0, 0]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread meanwhile: how a product is cut up decides its last bits, and
    the bytes may not depend on the machine's CPUs. Several may be inside."""
    import torch

    with _lock:
        if _inside[0] == 0:
            _inside[1] = torch.get_num_threads()
        _inside[0] += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            if _inside[0] == 0:
                torch.set_num_threads(_inside[1])
