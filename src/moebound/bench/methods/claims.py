"""What papers claim of their methods beside others, and whether it holds here, at the same bytes.

A claim is that one method loses less than another. It is looked at wherever both have rows of the
same size: KL over all tokens of the same problems, in pairs. The interval is of the difference of
the two means, problems being the sample (`ratio_stderr`); a p is two-sided, of the normal
distribution, and all of them together are corrected for their number (Holm). What a paper reports
is of its model, its text and its share of parameters: here is only whether the order holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.evaluate.evaluation import compare_to
from moebound.score.statistics import CONFIDENCE, Interval, Paired, holm, ratio_stderr

Verdict = Literal["holds", "does not hold", "depends on the size", "cannot be told", "not measured"]
SIGNIFICANT = 0.05
RFID_ORDER = ("rfid_re", "mobe_fixed", "d2_moe_fixed", "svd")
"""The order that the RFID-MoE paper finds, the best first."""


@dataclass(frozen=True)
class Claim:
    """better, worse: methods, as they are asked for. says: in words, as the paper has it."""

    paper: str
    says: str
    better: str
    worse: str


def _claims() -> tuple[Claim, ...]:
    found: list[Claim] = []

    def add(paper: str, says: str, better: str, *worse: str) -> None:
        found.extend(Claim(paper, says, better, other) for other in worse)

    for end, base, how in (("", "", ""), (":f8", ":f8:base5", ", numbers in 8 bits")):
        d2, resmoe = f"d2_moe_fixed{base}", f"resmoe_fixed{base}"
        mobe, rfid, svd = f"mobe_fixed{end}", f"rfid_re{end}", f"svd{end}"
        add("RFID-MoE, 2602.09316", f"better than MoBE{how}", rfid, mobe)
        add("RFID-MoE, 2602.09316", f"better than D2-MoE and SVD{how}", rfid, d2, svd)
        add("MoBE, 2508.05257", f"better than D2-MoE and MoE-I²{how}", mobe, d2, f"moe_i2_re{end}")
        add("D2-MoE, 2502.17298", f"better than plain SVD and MoE-I²{how}", d2, svd,
            f"moe_i2_re{end}")  # fmt: skip
        add("MoE-I², 2411.01016", f"ranks by importance beat equal ones{how}", f"moe_i2_re{end}",
            svd)  # fmt: skip
        add("SoCo, 2502.15092", f"chosen components beat the largest{how}", f"soco_lite{end}", svd)
        add("ResMoE, 2503.06881", f"better than SVD of the experts{how}", resmoe, svd)
    add("MoDeGPT, 2408.09632", "better than SVD", "modegpt_re", "svd")
    add("MiLo, 2504.02658", "better than rounding, and than HQQ", "milo_fixed", "rtn", "hqq")
    add("GPTQ, 2210.17323", "better than rounding to nearest", "gptq_re", "rtn")
    add("AWQ, 2306.00978", "better than rounding to nearest, and than GPTQ", "awq_re", "rtn",
        "gptq_re")  # fmt: skip
    add("MoEQuant, 2505.03804", "affinity-guided, better than GPTQ", "moequant_re", "gptq_re")
    add("HQQ", "better than rounding to nearest", "hqq", "rtn")
    coded = (("", ""), ("+rtn", ", kept experts in integers"), ("+bound", ", kept experts bounded"))
    for end, how in coded:
        frequency, reap, lu = f"frequency{end}", f"reap_re{end}", f"lu_re{end}"
        hc, m = f"hc_smoe_fixed{end}", f"m_smoe_re{end}"
        add("Lu et al., 2402.14800", f"better than pruning by frequency{how}", lu, frequency)
        add("REAP, 2510.13999", f"better than pruning by frequency{how}", reap, frequency)
        add("REAP, 2510.13999", f"better than merging{how}", reap, hc, m)
        add("MoNE, 2507.00390", f"better than pruning{how}", f"mone_re{end}", frequency, lu)
        add("HC-SMoE, 2410.08589", f"better than M-SMoE, and than frequency{how}", hc, m, frequency)
        add("M-SMoE, 2310.01334", f"merging beats pruning by frequency{how}", m, frequency)
        add("Sub-MoE, 2506.23266", f"better than HC-SMoE and M-SMoE{how}", f"sub_moe_re{end}", hc,
            m)  # fmt: skip
    add("PuzzleMoE, 2511.04805", "better than HC-SMoE, Sub-MoE and REAP", "puzzle_moe_re:seed0",
        "hc_smoe_fixed", "sub_moe_re", "reap_re")  # fmt: skip
    ours = "ours"
    add(ours, "rounding by inputs beats rounding without, under the same kind of bound",
        "calibrated", "bound")  # fmt: skip
    add(ours, "planned and rounded by what the loss feels, better than by inputs alone, and than "
        "without", "plan:fisher", "calibrated", "bound", "gptq_re", "awq_re")  # fmt: skip
    add(ours, "a bound costs nothing beside round to nearest", "bound", "rtn", "rtn:coded")
    add(ours, "better than any base alone", "bound", "svd:f8", "mobe_fixed:f8", "rfid_re:f8",
        "d2_moe_fixed:f8:base5", "resmoe_fixed:f8:base5", "milo_fixed",
        "modegpt_re:q4")  # fmt: skip
    add(ours, "rounding by inputs beats every base", "calibrated", "modegpt_re:q4")
    for share in ("k0.9", "k0.7"):
        add(ours, "channels cut first, then rounding by inputs, beats rounding alone",
            f"modegpt_re:{share}+calibrated", "calibrated", "modegpt_re:q4")  # fmt: skip
    for kept in ("reap_re+calibrated", "hc_smoe_fixed+calibrated", "modegpt_re:k0.7+calibrated"):
        add(ours, "statistics again after routing has moved beat the first", f"again:{kept}", kept)
    add(ours, "better than leaving experts out and coding the rest", "bound", "reap_re+bound",
        "mone_re+bound", "hc_smoe_fixed+bound", "puzzle_moe_re:seed0+rtn")  # fmt: skip
    return tuple(found)


CLAIMS = _claims()


@dataclass(frozen=True)
class Found:
    """A claim at one size. difference: KL of the worse less KL of the better, nats a token, so that
    above 0 the claim holds. p: corrected for all that were looked at. pia: problems solved in any
    format, from the worse to the better."""

    bits: float
    removed: float | None
    difference: Interval
    p: float
    pia: Paired

    @property
    def holds(self) -> bool | None:
        """None where it cannot be told."""
        if not self.p < SIGNIFICANT:
            return None
        return self.difference.value > 0

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "removed": self.removed,
            "kl_difference": self.difference.to_json(),
            "p": self.p,
            "holds": self.holds,
            "pia": self.pia.to_json(),
        }


@dataclass(frozen=True)
class Judged:
    """A claim, wherever both of its methods were measured at one size."""

    claim: Claim
    found: tuple[Found, ...]

    @property
    def verdict(self) -> Verdict:
        if not self.found:
            return "not measured"
        told = {one.holds for one in self.found} - {None}
        if not told:
            return "cannot be told"
        if len(told) == 2:
            return "depends on the size"
        return "holds" if told == {True} else "does not hold"

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self.claim),
            "verdict": self.verdict,
            "sizes": [one.to_json() for one in self.found],
        }


def judge(report: MethodsReport, claims: Sequence[Claim] = CLAIMS) -> list[Judged]:
    """Every claim, beside what was measured."""
    rows: dict[tuple[str, float, float | None], MethodRow] = {
        (row.method, row.bits, row.removed): row for row in report.rows if row.score is not None
    }
    sizes = list(dict.fromkeys((row.bits, row.removed) for row in report.rows))
    judged = []
    for claim in claims:
        pairs = [
            (size, rows[claim.better, *size], rows[claim.worse, *size])
            for size in sizes
            if (claim.better, *size) in rows and (claim.worse, *size) in rows
        ]
        found = [_found(report, *size, better, worse) for size, better, worse in pairs]
        judged.append(Judged(claim, tuple(found)))
    corrected = iter(holm([one.p for each in judged for one in each.found]))
    return [
        replace(each, found=tuple(replace(one, p=next(corrected)) for one in each.found))
        for each in judged
    ]


def _found(
    report: MethodsReport, bits: float, removed: float | None, better: MethodRow, worse: MethodRow
) -> Found:
    interval, p = difference(report, better, worse)
    assert better.evaluation is not None
    assert worse.evaluation is not None
    pia = compare_to(worse.evaluation, better.evaluation).pia
    return Found(bits, removed, interval, p, pia)


def difference(
    report: MethodsReport, better: MethodRow, worse: MethodRow
) -> tuple[Interval, float]:
    """KL of the worse less KL of the better, over all tokens, in pairs; and p of no difference.

    Where one of them says nothing any more (an infinite KL) the interval is infinite, and p 0 if
    the other does not.
    """
    counts = [float(whole) for whole, _ in report.lengths]
    first, second = ([whole for whole, _ in row.kl_sums] for row in (better, worse))
    if not all(map(math.isfinite, (*first, *second))):
        lost = [not all(map(math.isfinite, sums)) for sums in (first, second)]
        if all(lost):
            return Interval(math.nan, math.nan, math.nan), 1.0
        value = -math.inf if lost[0] else math.inf
        return Interval(value, value, value), 0.0
    apart = [b - a for a, b in zip(first, second, strict=True)]
    value, error = sum(apart) / sum(counts), ratio_stderr(apart, counts)
    if math.isnan(error):  # of one problem nothing can be told
        return Interval(value, -math.inf, math.inf), 1.0
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    p = 1.0 if not error and not value else 0.0
    if error:
        p = 2 * NormalDist().cdf(-abs(value) / error)
    return Interval(value, value - reach, value + reach), p


def to_json(report: MethodsReport) -> dict[str, Any]:
    """The report with its claims judged."""
    found = report.to_json()
    return {**found, "claims": [one.to_json() for one in judge(report)]}
