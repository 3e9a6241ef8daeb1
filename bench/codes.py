"""Matrices as codes, beside weights of bfloat16: decoding, and products with few and many tokens.

    python bench/codes.py > bench/results/codes.json          one thread; JSON, a table on stderr

One matrix of Moonlight's experts, [1408, 2048], of Gaussian weights, by codec `bound` (a table) and
by method `calibrated` (steps). Checked first: codes of a byte, and of four bits, stand for the
weights that decoding gives, to the bit. Then, timed in turns, for each instruction set that runs
here: decoding to codes and to bfloat16; the product of codes, and torch's of the decoded weights;
what slots of codes do with many tokens, writing the weights out and torch's product.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from moebound import _native, encode
from moebound.bench.environment import describe
from moebound.bench.timing import interleaved
from moebound.codec import parse
from moebound.codec.arrays import to_torch
from moebound.codec.at_once import codes_at_once
from moebound.codec.bound import BoundCodec
from moebound.codec.codes import Bits, CodeMatrix, code_bytes
from moebound.types import Array, ErrorBound
from steps import LARGE, calibrated, decoding, weights

BITS: tuple[Bits, Bits] = (8, 4)
TOKENS = (1, 2, 4, 8, 24, 64, 512)


def row(name: str, data: bytes, seconds: float) -> dict[str, Any]:
    parsed = parse(data)
    codes, packed = (np.empty(code_bytes(LARGE, bits), np.uint8) for bits in BITS)
    matrices = {name: _codes(data, out, bits) for name, out, bits in
                (("codes", codes, BITS[0]), ("codes4", packed, BITS[1]))}  # fmt: skip
    decoded: Array = np.empty(parsed.spec.size, parsed.spec.numpy_dtype)
    BoundCodec().decompress(parsed.payload, parsed.spec, decoded)
    decoded[parsed.misses.astype(np.int64)] = parsed.values
    for kind, matrix in matrices.items():
        if not np.array_equal(matrix.weights().reshape(-1), decoded.view(np.uint16)):
            raise ValueError(f"{name}: {kind} do not stand for the weights that decoding gives")
    dense = to_torch(decoded).reshape(LARGE)
    found: dict[str, Any] = {
        "name": name, "bits_per_weight": 8 * len(data) / decoded.size,
        "aside": {kind: len(matrix.patched) for kind, matrix in matrices.items()}, "isas": {},
    }  # fmt: skip
    before = _native.isa()
    for isa in _native.runnable_isas():
        _native.use_isa(isa)
        timed = interleaved(
            {
                "codes": lambda: _codes(data, codes, BITS[0]),
                "codes4": lambda: _codes(data, packed, BITS[1]),
                "values": decoding(data),
            },
            seconds,
        )
        one: dict[str, Any] = {
            "decode_ms": {key: 1e3 * t.p50_s for key, t in timed.items()},
            "product_ms": {},
        }
        for n in TOKENS:
            x = torch.randn(n, LARGE[1]).bfloat16()
            out = torch.empty(n, LARGE[0], dtype=torch.bfloat16)
            flat, into = (t.reshape(-1).view(torch.uint16).numpy() for t in (x, out))

            def product(kind: str, flat: Array = flat, into: Array = into) -> None:
                matrices[kind].product(flat, into, stride=LARGE[0])

            def written_out(x: torch.Tensor = x) -> torch.Tensor:
                written = torch.from_numpy(matrices["codes"].weights())
                return linear(x, written.view(torch.bfloat16))

            def dense_product(x: torch.Tensor = x) -> torch.Tensor:
                return linear(x, dense)

            ways: dict[str, Callable[[], object]] = {
                "codes": partial(product, "codes"), "codes4": partial(product, "codes4"),
                "written_out": written_out, "torch": dense_product,
            }  # fmt: skip
            timed = interleaved(ways, seconds)
            one["product_ms"][n] = {key: 1e3 * t.p50_s for key, t in timed.items()}
        found["isas"][isa] = one
    _native.use_isa(before)
    return found


def _codes(data: bytes, out: Array, bits: Bits) -> CodeMatrix:
    found = codes_at_once(data, out, LARGE, "BF16", bits=bits, threads=1)
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    args = parser.parse_args()
    torch.set_num_threads(1)
    w = weights(LARGE)
    rows = [
        row("bound, rate 0.3", encode(w, ErrorBound(0.3, "rate")), args.seconds),
        row("calibrated, rate 1", calibrated(w, 1.0), args.seconds),
    ]
    for found in rows:
        for isa, one in found["isas"].items():
            decode = one["decode_ms"]
            said = ", ".join(
                f"{n} tokens {t['codes']:.2f} / {t['codes4']:.2f} / {t['written_out']:.2f} / "
                f"{t['torch']:.2f}"
                for n, t in one["product_ms"].items()
            )
            print(
                f"{found['name']}, {isa}: decoding {decode['codes']:.2f} / {decode['codes4']:.2f} "
                f"/ {decode['values']:.2f} ms; codes / codes4 / written out / torch: {said}",
                file=sys.stderr,
            )
    print(json.dumps({"environment": describe(), "shape": LARGE, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
