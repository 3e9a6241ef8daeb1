"""Attention of one token whose values are narrower than its keys: transformers' way, and ours.

    OMP_WAIT_POLICY=PASSIVE python bench/narrow_values.py > bench/results/narrow_values.json

Shapes of one layer of Moonlight: 16 heads, keys of 192 numbers, values of 128, bfloat16, behind a
text of so many tokens. Checked first: both give the same up to rounding. Then, in turns: `sdpa` of
transformers, which is torch's attention; the same with values made as wide as keys
(`moebound.model.attention`). Milliseconds, medians; JSON, and a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moebound.bench.environment import describe
from moebound.bench.timing import interleaved
from moebound.model.attention import padded_attention

LENGTHS = (32, 128, 512, 2048)
HEADS, KEYS, VALUES = 16, 192, 128


def row(length: int, seconds: float) -> dict[str, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def drawn(n: int, width: int) -> torch.Tensor:
        return torch.randn(1, HEADS, n, width).bfloat16()

    module = nn.Module()
    given = module, drawn(1, KEYS), drawn(length, KEYS), drawn(length, VALUES), None
    ways: dict[str, Callable[[], Any]] = {
        "torch": partial(sdpa_attention_forward, *given),
        "padded": partial(padded_attention, *given),
    }
    with torch.inference_mode():
        outputs = [way()[0].float() for way in ways.values()]
        if (outputs[0] - outputs[1]).abs().max() > 2e-2:
            raise ValueError(f"{length} tokens: padded attention gives another result")
        timed = interleaved(ways, seconds)
    return {"length": length, "ms": {name: 1e3 * t.p50_s for name, t in timed.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [row(length, args.seconds) for length in LENGTHS]
    for one in rows:
        ms = one["ms"]
        print(
            f"{one['length']} tokens: torch {ms['torch']:.2f} ms, padded {ms['padded']:.2f}",
            file=sys.stderr,
        )
    print(json.dumps({"environment": describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
