"""How far from the least there can be? Bytes of method `calibrated` against rate-distortion theory.

    moebound calibrate builtin:wordmath-mixtral --task wordmath-hard --limit 384 -o stats
    python bench/rate_distortion.py builtin:wordmath-mixtral stats --json

Of weights that are independent Gaussians of variance s, a row w costs (w - v) H (w - v)ᵀ when it is
replaced by v. In the eigenbasis of H, eigenvalues λ_i, it is N Gaussians of variance s λ_i under a
squared error, and no code of any kind that leaves D a row on average takes fewer bits a weight than

    R(D) = 1/N Σ_i max(0, ½ log2(s λ_i / θ))     with θ such that Σ_i min(θ, s λ_i) = D

(reverse water-filling; Cover and Thomas, Elements of Information Theory, theorem 10.3.3; it is what
WaterSIC, 2603.04956, calls the limit, and it proves 0.255 bit above it for entropies of its own
whole numbers at high rates: ½ log2(2πe/12), the price of a lattice of cubes). D is measured on the
decoded weights with the statistics' H, shrunk by nothing, damped by nothing. Three figures:

    gap        real bits a weight, headers and all, less R(D), s the variance of the weights
    gap_rows   the same, with a variance of its own for each row and one θ for all: rows of trained
               weights differ in scale, which a code may use
    overhead   real bits less the order-0 entropy of the whole numbers that are coded; below 0 where
               the coder knows more than their counts
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moebound.bench.environment import describe
from moebound.checkpoint import open_checkpoint
from moebound.codec import parse
from moebound.files.formats.statistics import read_statistics
from moebound.methods import compress, get_method
from moebound.methods.blob import is_blob, parse_matrix
from moebound.methods.outputs import side_of
from moebound.store.recipe import Recipe
from moebound.types import Array, ErrorBound

RATES = "0.35,0.7,1.4"


def least_bits(variances: Array, distortion: float) -> float:
    """R(D) in bits a value. variances: of independent Gaussians, any shape. distortion: summed over
    all of them."""
    v = np.sort(variances.reshape(-1))[::-1]
    v = v[v > 0]
    if not len(v) or distortion >= v.sum():
        return 0.0
    # θ lies below the k largest and not below the others: sums from the end say for which k.
    rest = np.concatenate([np.cumsum(v[::-1])[::-1][1:], [0.0]])
    levels = (distortion - rest) / np.arange(1, len(v) + 1)
    k = int(np.flatnonzero(levels <= v)[-1]) + 1
    theta = levels[k - 1]
    return float(0.5 * np.log2(v[:k] / theta).sum() / variances.size)


def entropy(codes: Array) -> float:
    _, counts = np.unique(codes, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def rows(src: str, stats: Path, method: str, rates: Sequence[float], every: int) -> Iterator[Any]:
    """One for each matrix at each rate."""
    checkpoint, statistics, made = open_checkpoint(src), read_statistics(stats), get_method(method)
    for expert in list(checkpoint.experts())[::every]:
        eigen: dict[str, Array] = {}
        for rate in rates:
            recipe = Recipe.of(ErrorBound(rate, "rate", "expert"), method, statistics)
            view = recipe.seen(checkpoint, [expert], made, certify=True)
            artifact = compress(made, view)
            for role, matrix in artifact.experts[expert.key].items():
                side, outputs, data = side_of(role), matrix.certificate.outputs, matrix.data
                bounds = made.column_bounds(parse_matrix(data) if is_blob(data) else parse(data))
                if bounds is None or outputs is None or not outputs.power:
                    continue  # an exact copy, or nothing came there
                if side not in eigen:
                    moments = view.seen[expert.key].moments[side]
                    found = moments if moments.ndim == 1 else np.linalg.eigvalsh(moments)
                    eigen[side] = np.maximum(found, 0)
                w = view.experts[0].matrices[role].astype(np.float64)
                decoded = matrix.decoded.astype(np.float64)
                if bounds.transposed:
                    w, decoded = w.T, decoded.T
                real, n_rows = 8 * len(data) / w.size, len(w)
                by_row = np.square(w).mean(1)[:, None] * eigen[side]
                yield {
                    "layer": expert.key.layer,
                    "expert": expert.key.expert,
                    "role": role,
                    "rate": rate,
                    "bits_per_weight": real,
                    "relative_error": outputs.relative,
                    "gap": real - least_bits(
                        np.square(w).mean() * eigen[side], outputs.error / n_rows
                    ),
                    "gap_rows": real - least_bits(by_row, outputs.error),
                    "overhead": real - entropy(np.rint(decoded / bounds.steps)),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src")
    parser.add_argument("stats", type=Path)
    parser.add_argument("--method", default="calibrated")
    parser.add_argument("--rates", default=RATES, help=f"separated by commas [{RATES}]")
    parser.add_argument("--every", type=int, default=1, help="only every so many experts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rates = [float(rate) for rate in args.rates.split(",")]
    found = list(rows(args.src, args.stats, args.method, rates, args.every))
    if args.json:
        print(json.dumps({"environment": describe(), "src": args.src, "rows": found}, indent=1))
        return
    print("| rate | matrices | bits a weight | gap, median | worst | by rows | overhead |")
    print("|---|---|---|---|---|---|---|")
    for rate in rates:
        some = [row for row in found if row["rate"] == rate]
        names = ("bits_per_weight", "gap", "gap_rows", "overhead")
        bits, gap, by_row, over = (np.array([row[name] for row in some]) for name in names)
        print(
            f"| {rate:g} | {len(some)} | {bits.mean():.3f} | {np.median(gap):.3f} | "
            f"{gap.max():.3f} | {np.median(by_row):.3f} | {np.median(over):.3f} |"
        )


if __name__ == "__main__":
    main()
