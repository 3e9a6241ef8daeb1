"""Memory between pages that end the process that touches them."""

from __future__ import annotations

import ctypes
import mmap

import torch


class Fenced:
    """A tensor of n_bytes that ends where the page behind cannot be read; nor can one before."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def __enter__(self) -> torch.Tensor:
        page = mmap.PAGESIZE
        inner = -(-self.n_bytes // page) * page
        self.memory = mmap.mmap(-1, inner + 2 * page)
        self.first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.fences = (self.first, self.first + page + inner)
        self._protect(0)
        at = page + inner - self.n_bytes
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=self.n_bytes, offset=at)

    def __exit__(self, *_: object) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, how: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in self.fences:
            assert libc.mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, how) == 0
