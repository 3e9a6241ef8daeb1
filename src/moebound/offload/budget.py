"""Memory budgets: how they are written, and what this machine has."""

from __future__ import annotations

import os
import re

import torch

from moebound.errors import CacheError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*")


def parse_budget(budget: int | str, *, of: int) -> int:
    """Bytes: a number of them, a size ("4GiB", "500MB"), or a share of `of` bytes ("20%").

    Raises CacheError for anything else.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        if budget > 0:
            return budget
    else:
        match = _SIZE.fullmatch(str(budget))
        if match is not None:
            amount, unit = float(match[1]), match[2].upper()
            if unit == "%" and amount > 0:
                return int(of * min(1.0, amount / 100))
            n_bytes = _bytes(match)
            if n_bytes > 0:
                return int(n_bytes)
    raise CacheError(
        f"budget {budget!r}: expected a size, as 4GiB, or a share of all experts, as 20%"
    )


def parse_size(size: str, *, what: str) -> int:
    """Bytes of a size as "4GiB" or "500MB". Raises CacheError that names `what` for anything else,
    a share included."""
    match = _SIZE.fullmatch(size)
    n_bytes = 0 if match is None else int(_bytes(match))
    if n_bytes > 0:
        return n_bytes
    raise CacheError(f"{what} {size!r}: expected a size, as 4GiB or 500MB")


def _bytes(match: re.Match[str]) -> float:
    """Of what _SIZE has found; 0 if its unit is none of bytes."""
    return float(match[1]) * _UNITS.get(match[2].upper(), 0)


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; on the CPU, without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
