"""Neighbours' rules for deciding widths, all in one budget of real bytes.

    pmq_re      MC-MoE's PMQ: an integer program a layer, by frequency, gates and output errors
    mxmoe_re    MxMoE: a knapsack a layer, a width for each linear block
    edgemoe_re  EdgeMoE: one width, and one less for so many of the least important experts
    mptqs_re    MoE-MPTQS: two widths, who gets which is random: the control
    milo_re     MiLo's ranks by frequency, as bits
    rfid        RFID-MoE's score, as bits; so they are of codecs (`schemes.py`)
    frequency   the scheme of that name, as bits

Each gives every block of an expert (gate and up; down) a width. What a width is in the end is the
method's: integers of so many bits of `rtn` or `hqq`; of a method that keeps bounds, a rate of
λ · 2^-width, with the λ at which all together fill the budget, since halving a bound costs a bit a
weight. So a codec gets the same differences of bits between experts, and the same bytes in all.

No paper's figures are claimed: they are of other models, at ratios of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moebound.errors import PlanError
from moebound.plan.items import Floats, Ints
from moebound.plan.knapsack import knapsack
from moebound.plan.schemes import RFID_FUSION
from moebound.plan.widths import Offers
from moebound.types import ExpertKey

WidthScheme = Literal["pmq_re", "mxmoe_re", "edgemoe_re", "mptqs_re", "milo_re"]
"""Those that are of widths whatever the method is."""
WIDTH_SCHEMES: tuple[WidthScheme, ...] = get_args(WidthScheme)
BY_OUTPUTS = ("pmq_re", "mxmoe_re", "edgemoe_re")
"""Those that need statistics for what rounding does to outputs."""
BY_COUNTS = ("pmq_re", "milo_re", "rfid", "frequency")

PMQ_ALPHA, PMQ_BETA = 1.0, 1.5
PMQ_WIDTHS = (1, 2, 3)
MXMOE_WIDTHS = (1, 2, 3, 4, 8)
"""MxMoE's 1.25, 2.25, 3.25 and 4.25 bits with groups' scales, 4 and 8."""
MILO_WIDTH = 3
_HALVINGS = 60

Widths = dict[ExpertKey, dict[str, int]]
"""Of every matrix of every expert, by role."""
_Solve = Callable[[list[int], int], Ints]
"""Units, by their places, and bytes -> the column of each."""


@dataclass(frozen=True)
class Asked:
    """budget_bytes: the most. widths: to choose among; None for the scheme's own. seed: of
    mptqs_re. shares: of its layer's routing that each expert has; None for what the statistics
    counted."""

    budget_bytes: int
    widths: tuple[int, ...] | None = None
    seed: int = 0
    shares: Mapping[ExpertKey, float] | None = None


def choose(scheme: str, offers: Offers, asked: Asked) -> Widths:
    """Raises PlanError for a budget that cannot be met, and for what a scheme needs and lacks."""
    if scheme == "mxmoe_re":
        return _mxmoe(offers, asked)
    if scheme == "pmq_re":
        found = _pmq(offers, asked)
    elif scheme == "edgemoe_re":
        found = _edgemoe(offers, asked)
    elif scheme == "mptqs_re":
        found = _mptqs(offers, asked)
    elif scheme in ("milo_re", "rfid", "frequency"):
        found = _scored(scheme, offers, asked)
    else:
        raise PlanError(
            f"scheme {scheme!r} chooses bounds, and {offers.family} has widths: expected one of "
            f"{', '.join((*WIDTH_SCHEMES, 'rfid', 'frequency'))}"
        )
    return {
        expert.key: dict.fromkeys(expert.roles, offers.widths[column])
        for expert, column in zip(offers.experts, found.tolist(), strict=True)
    }


def _pmq(offers: Offers, asked: Asked) -> Ints:
    """Pre-loading mixed-precision quantization of MC-MoE (Huang et al., 2410.06270), section 3.2.

        min Σ φ_e^α w_e^β ε_e(b_e),  Σ bytes(b_e) ≤ B,  b_e of {1, 2, 3}, α = 1, β = 1.5

    φ: the share of tokens, w: of gates; ε: |Y - Ŷ| of the block's output with only e at b bits. In
    each layer at least one expert has 2 bits and one 3. Deviations: exact dynamic programming in
    real bytes where the paper has a solver and Σ b; ε is √ of what the statistics' second moments
    say, tr(E H Eᵀ) summed over the matrices, where the paper runs the block; the exponent of ε is
    the released code's 1, where the paper has γ = 2; gates are as the model uses them, where the
    code has them before they are renormalised. Unseen experts: φ and w are 1/(2T) at least, T
    tokens of the text, and ε has the layer's moments in it. What a layer leaves of its share of the
    budget goes to the next. Budgets that {1, 2, 3} would not fill move the three widths up: the
    middle one is the widest that all experts could have. The two wider ones are asked for in every
    layer, unless there is no room.
    """
    columns = _middle(offers, asked, PMQ_WIDTHS)
    shares, floor = _shares(offers, asked), 1 / (2 * max(offers.n_tokens, 1))
    gates = _of_layer(offers, [_known(e.gates, e.key, "gates") for e in offers.experts])
    weight = np.maximum(shares, floor) ** PMQ_ALPHA * np.maximum(gates, floor) ** PMQ_BETA
    sizes = np.array([expert.size()[columns] for expert in offers.experts])
    loss = weight[:, None] * np.array([e.output_errors()[columns] for e in offers.experts])
    wider = range(max(len(columns) - 2, 0), len(columns))

    def of_layer(places: list[int], most: int) -> Ints:
        try:
            return knapsack(sizes[places], loss[places], most, required=wider)
        except PlanError:
            return knapsack(sizes[places], loss[places], most)

    found = _by_layer(offers.layers, sizes, asked.budget_bytes, of_layer)
    return np.array(columns)[found]


def _mxmoe(offers: Offers, asked: Asked) -> Widths:
    """MxMoE (Duanmu et al., 2505.05799), section 4.2, with r = 1: accuracy alone.

        min Σ L(e, block, b),  Σ bytes ≤ B;  blocks: gate and up, which have one width, and down

    L: |Y - Ŷ| of the layer's output with only this block at b bits. Layer by layer, as released.
    Deviations: exact dynamic programming where the paper has Gurobi; L is √tr(E H Eᵀ) by the
    statistics' moments, where the paper runs the layer; no time of kernels (r < 1), which are a
    GPU's; no rotation. What a layer leaves of its share of the budget goes to the next.
    """
    wanted = asked.widths or [w for w in MXMOE_WIDTHS if w in offers.widths]
    columns = offers.columns(wanted)
    units: list[tuple[int, tuple[str, ...]]] = []
    layers: dict[int, list[int]] = {}
    for place, expert in enumerate(offers.experts):
        first = tuple(role for role in expert.roles if role != "down")
        for roles in (first, ("down",)):
            layers.setdefault(expert.key.layer, []).append(len(units))
            units.append((place, roles))
    sizes = np.array([offers.experts[place].size(roles)[columns] for place, roles in units])
    loss = np.array([offers.experts[place].output_errors(roles)[columns] for place, roles in units])
    found = _by_layer(
        layers,
        sizes,
        asked.budget_bytes,
        lambda places, most: knapsack(sizes[places], loss[places], most),
    )
    widths: Widths = {expert.key: {} for expert in offers.experts}
    for (place, roles), at in zip(units, found.tolist(), strict=True):
        width = offers.widths[columns[at]]
        widths[offers.experts[place].key].update(dict.fromkeys(roles, width))
    return widths


def _edgemoe(offers: Offers, asked: Asked) -> Ints:
    """EdgeMoE (Yi et al., 2308.14352), section 4.1: expert-wise bitwidth adaptation.

    1. importance: what is lost when one expert alone goes to INT2; 2. all experts at one width;
    3. the K least important of the model one width lower, K as small as can be. Deviations: what is
    lost is |Y - Ŷ| of the block's output, where the paper measures accuracy, n · L times; K ends
    where the bytes fit, where the paper's ends at an accuracy; the first width is the narrowest at
    which all experts do not fit, where the paper has 4 or 8.
    """
    columns = offers.columns(asked.widths or offers.widths)
    at = offers.widths.index(2) if 2 in offers.widths else 0
    important = np.array([expert.output_errors()[at] for expert in offers.experts])
    sizes = np.array([expert.size() for expert in offers.experts])
    return _two_widths(sizes, columns, np.argsort(-important, kind="stable"), asked.budget_bytes)


def _mptqs(offers: Offers, asked: Asked) -> Ints:
    """MoE-MPTQS (Imani et al., 2407.14417): a random set of experts has more bits. The control.

    N = so many as fit have the wider width, the others the narrower; who does is drawn (`seed`),
    the router is as it was. Deviations: bytes are real, where the paper has S16 = 4 · S4; the two
    widths are next to the budget, or --widths, where the paper has 16 bits and NF4's 4.
    """
    order = np.random.default_rng(asked.seed).permutation(len(offers.experts))
    sizes = np.array([expert.size() for expert in offers.experts])
    return _two_widths(
        sizes, offers.columns(asked.widths or offers.widths), order, asked.budget_bytes
    )


def _scored(scheme: str, offers: Offers, asked: Asked) -> Ints:
    """Bits by a score that would fill the budget, rounded down, and then up where that took most,
    as long as bytes allow.

    rfid (2602.09316): λ · (ξ·E + (1 - ξ)·F), see `schemes.rfid`. frequency: λ + ½ log2(share), see
    `schemes.by_frequency`. milo_re (Huang et al., 2504.02658), section 3.3: ranks of compensators
    in proportion to an expert's share of tokens, above integers of 3 bits; here what ranks would
    take is bits: 3 + λ · share, or above the widest width that leaves a bit of the budget where
    that is less. Ranks by kurtosis are for models whose attention is compressed too, and are left
    out; method milo_fixed has ranks themselves.
    """
    columns = np.array(offers.columns(asked.widths or offers.widths))
    widths = np.array([offers.widths[column] for column in columns], np.float64)
    sizes = np.array([expert.size() for expert in offers.experts])
    share = _shares(offers, asked)
    share = np.maximum(share, 1 / (2 * max(offers.n_tokens, len(share))))
    score = _over_mean(offers, share)
    base = 0.0
    if scheme == "rfid":
        ranks = [_known(e.effective_rank, e.key, "effective rank") for e in offers.experts]
        score = RFID_FUSION * _over_mean(offers, ranks) + (1 - RFID_FUSION) * score
    elif scheme == "milo_re":
        bits = 8 * asked.budget_bytes / offers.n_weights
        base = float(max(widths[widths <= min(MILO_WIDTH, bits - 1)], default=widths[0]))

    def wanted(scale: float) -> Floats:
        if scheme == "frequency":
            return np.asarray(scale + np.log2(share) / 2)
        return np.asarray(base + scale * score)

    rows = np.arange(len(sizes))
    least = sizes[:, columns[0]]
    if least.sum() > asked.budget_bytes:
        _too_small(least, asked.budget_bytes)
    low, high = 0.0, 1e3
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        between = (
            np.interp(w, widths, row[columns]) for w, row in zip(wanted(middle), sizes, strict=True)
        )
        low, high = (middle, high) if sum(between) <= asked.budget_bytes else (low, middle)
    below = np.searchsorted(widths, wanted(low) + 1e-9, side="right") - 1
    found = columns[np.maximum(below, 0)]
    left = asked.budget_bytes - int(sizes[rows, found].sum())
    places = np.searchsorted(columns, found)
    lost = wanted(low) - widths[places]
    for place in np.argsort(-lost, kind="stable").tolist():
        if places[place] + 1 == len(columns):
            continue
        wider = columns[places[place] + 1]
        more = int(sizes[place, wider] - sizes[place, found[place]])
        if 0 <= more <= left:
            found[place], left = wider, left - more
    return found


def _two_widths(sizes: Ints, columns: Sequence[int], order: Ints, budget_bytes: int) -> Ints:
    """The widest width at which all fit, and the next for the first of an order, as many as fit."""
    totals = sizes.sum(axis=0)
    fitting = [at for at, column in enumerate(columns) if totals[column] <= budget_bytes]
    if not fitting:
        _too_small(sizes[:, columns[0]], budget_bytes)
    narrow = columns[fitting[-1]]
    found = np.full(len(sizes), narrow)
    if fitting[-1] + 1 < len(columns):
        wide = columns[fitting[-1] + 1]
        spent = totals[narrow] + np.cumsum((sizes[:, wide] - sizes[:, narrow])[order])
        found[order[: int((np.maximum.accumulate(spent) <= budget_bytes).sum())]] = wide
    return found


def _middle(offers: Offers, asked: Asked, own: tuple[int, ...]) -> list[int]:
    """Columns of the widths asked for, or of the scheme's own three, moved up until the middle one
    is the widest that all could have."""
    if asked.widths is not None:
        return offers.columns(asked.widths)
    fitting = [
        w for w, n in zip(offers.widths, offers.totals(), strict=True) if n <= asked.budget_bytes
    ]
    up = max(0, min(max(fitting, default=0) - own[1], offers.widths[-1] - own[-1]))
    return offers.columns([w + up for w in own if w + up in offers.widths])


def _by_layer(
    layers: Mapping[int, list[int]], sizes: Ints, budget_bytes: int, solve: _Solve
) -> Ints:
    """Units of each layer by themselves, in its share of the budget, and what was left before.

    layers: places of units. A layer's share is as its units are of all at their widest.
    """
    least, widest = sizes.min(axis=1), sizes.max(axis=1)
    if least.sum() > budget_bytes:
        _too_small(least, budget_bytes)
    found, spent, shared = np.zeros(len(sizes), np.int64), 0, 0.0
    last, done = list(layers)[-1], set[int]()
    for layer, places in layers.items():
        done.add(layer)
        shared += budget_bytes * float(widest[places].sum() / widest.sum())
        rest = sum(int(least[there].sum()) for after, there in layers.items() if after not in done)
        allowed = budget_bytes if layer == last else int(shared)
        most = min(max(allowed - spent, int(least[places].sum())), budget_bytes - spent - rest)
        found[places] = solve(places, most)
        spent += int(sizes[places, found[places]].sum())
    return found


def _shares(offers: Offers, asked: Asked) -> Floats:
    """[N] of each layer's routing."""
    if asked.shares is not None:
        return np.array([asked.shares[expert.key] for expert in offers.experts])
    return _of_layer(offers, [_known(e.sent, e.key, "tokens") for e in offers.experts])


def _of_layer(offers: Offers, values: Sequence[float]) -> Floats:
    """[N] over the layer's sum; 0 of one without any."""
    found = np.array(values, np.float64)
    for places in offers.layers.values():
        total = found[places].sum()
        found[places] /= total if total > 0 else 1.0
    return found


def _over_mean(offers: Offers, values: Sequence[float] | Floats) -> Floats:
    found = np.array(values, np.float64)
    for places in offers.layers.values():
        found[places] /= found[places].mean() or 1.0
    return found


def _known(value: float | None, key: ExpertKey, what: str) -> float:
    if value is None:
        raise PlanError(f"{key}: its {what} are not known: give --calibration")
    return value


def _too_small(least: Ints, budget_bytes: int) -> None:
    raise PlanError(
        f"a budget of {budget_bytes} bytes cannot be met: the smallest is {int(least.sum())} bytes"
    )
