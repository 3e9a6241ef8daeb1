"""Plans of widths: each paper's rule where its answer is known, in real bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moebound.errors import MethodError, PlanError
from moebound.plan import (
    Budget,
    Deciding,
    Evidence,
    ExpertWidths,
    Family,
    Offers,
    make_plan,
    make_width_plan,
)
from moebound.plan.knapsack import knapsack
from moebound.plan.planners import WIDTH_SCHEMES, Asked, WidthScheme, choose
from moebound.types import ExpertKey

from .conftest import ROLES, experts

WIDTHS = tuple(range(1, 9))
N = 2048
ALL = (*WIDTH_SCHEMES, "rfid", "frequency")


def offers(per_layer: int = 8, n_layers: int = 3, *, seed: int = 0) -> Offers:
    """Of `experts`' shapes: b bits, and a float16 scale in groups of 128; errors of 4^-b with a
    factor of each matrix' own."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in range(1, n_layers + 1):
        sent = rng.integers(1, 200, per_layer)
        for at in range(per_layer):
            sizes = np.array([N * b // 8 + 2 * N // 128 for b in WIDTHS])
            found.append(
                ExpertWidths(
                    ExpertKey(layer, at),
                    dict.fromkeys(ROLES, N),
                    3 * N * 2,
                    dict.fromkeys(ROLES, sizes),
                    {r: rng.lognormal(0, 1) * 4.0 ** -np.array(WIDTHS) for r in ROLES},
                    float(sent[at]),
                    float(sent[at]) / 2,
                    float(rng.uniform(20, 60)),
                )
            )
    return Offers(Family("rtn"), WIDTHS, tuple(found), 1000)


def with_errors(one: Offers, scale: list[float]) -> Offers:
    """All matrices of an expert with one factor."""
    changed = [
        replace(
            e, errors=dict.fromkeys(ROLES, s * s * 4.0 ** -np.array(WIDTHS)), sent=1.0, gates=1.0
        )
        for e, s in zip(one.experts, scale, strict=True)
    ]
    return replace(one, experts=tuple(changed))


def bytes_of(found: Offers, chosen: dict[ExpertKey, dict[str, int]]) -> int:
    return sum(
        int(e.sizes[role][WIDTHS.index(width)])
        for e in found.experts
        for role, width in chosen[e.key].items()
    )


def per_expert(chosen: dict[ExpertKey, dict[str, int]]) -> list[int]:
    assert all(len(set(widths.values())) == 1 for widths in chosen.values())
    return [widths["down"] for widths in chosen.values()]


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.cumsum(rng.integers(1, 9, (5, 3)), axis=1)
    loss = rng.uniform(0, 1, (5, 3))
    budget = int(sizes.mean(axis=1).sum())
    required = (1, 2) if seed % 2 else ()
    best = min(
        sum(loss[i, c] for i, c in enumerate(columns))
        for columns in product(range(3), repeat=5)
        if sum(sizes[i, c] for i, c in enumerate(columns)) <= budget
        and set(required) <= set(columns)
    )
    found = knapsack(sizes, loss, budget, required=required)
    assert loss[np.arange(5), found].sum() == pytest.approx(best)
    assert sizes[np.arange(5), found].sum() <= budget
    with pytest.raises(PlanError, match=f"the smallest is {sizes[:, 0].sum()} bytes"):
        knapsack(sizes, loss, int(sizes[:, 0].sum()) - 1)


def test_knapsack_of_sizes_with_no_common_divisor_keeps_the_budget() -> None:
    rng = np.random.default_rng(0)
    sizes = np.cumsum(rng.integers(10_000, 90_001, (40, 4)), axis=1)
    loss = np.sort(rng.uniform(0, 1, (40, 4)), axis=1)[:, ::-1]
    budget = int(sizes[:, 2].sum())
    found = knapsack(sizes, loss, budget)
    assert 0.99 * budget < sizes[np.arange(40), found].sum() <= budget


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4, 6, 7.9])
@pytest.mark.parametrize("scheme", ALL)
def test_all_fill_the_same_budget(scheme: str, bits: float) -> None:
    found = offers()
    plan = make_width_plan(Deciding(found), scheme, Budget(bpw=bits), source="tiny", made={})
    # The step that is left open is less than one of an expert's, of 24.
    assert bits * (1 - 0.04) < plan.bits_per_weight <= bits
    assert plan.n_bytes == bytes_of(
        found, choose(scheme, found, Asked(int(bits * found.n_weights / 8)))
    )
    assert plan.source_bytes == found.n_weights * 2
    assert {p.key for p in plan.experts} == {e.key for e in found.experts}
    assert not plan.bounds
    assert plan.scheme == scheme


def test_pmq_has_a_2_and_a_3_in_every_layer_and_gives_bits_to_the_busy() -> None:
    # 8 experts at a budget of 16 bits together, of {1, 2, 3}, as the paper's: and the scales.
    found = offers(n_layers=1)
    budget = int((16 / 8 + 16 / 128) * found.n_weights / 8)
    widths = per_expert(choose("pmq_re", found, Asked(budget)))
    assert sum(widths) <= 16
    assert set(widths) <= {1, 2, 3}
    assert {2, 3} <= set(widths)
    same = with_errors(found, [1.0] * 8)
    busy = [replace(e, sent=float(at), gates=float(at)) for at, e in enumerate(same.experts)]
    widths = per_expert(choose("pmq_re", replace(same, experts=tuple(busy)), Asked(budget)))
    assert widths == sorted(widths)
    assert (widths[0], widths[-1]) == (1, 3)
    # One expert's φ^1 w^1.5 ε twice another's, in a budget for one more bit: all are alike else.
    one_more = budget + 3 * N // 8
    hurt = with_errors(found, [1, 1, 1, 2, 1, 1, 1, 1])
    assert per_expert(choose("pmq_re", hurt, Asked(one_more)))[3] == 3


def test_pmq_is_the_integer_program() -> None:
    found = offers(4, 1, seed=3)
    budget = int(2.2 * found.n_weights / 8)
    shares = np.array([e.sent for e in found.experts], np.float64)
    shares /= shares.sum()
    loss = [shares[i] ** 2.5 * e.output_errors()[:3] for i, e in enumerate(found.experts)]
    best = min(
        sum(loss[i][w - 1] for i, w in enumerate(widths))
        for widths in product((1, 2, 3), repeat=4)
        if sum(int(e.size()[w - 1]) for e, w in zip(found.experts, widths, strict=True)) <= budget
        and {2, 3} <= set(widths)
    )
    widths = per_expert(choose("pmq_re", found, Asked(budget)))
    assert sum(loss[i][w - 1] for i, w in enumerate(widths)) == pytest.approx(best)


def test_an_expert_without_tokens_is_not_free() -> None:
    found = with_errors(offers(n_layers=1), [1.0] * 8)
    unseen = [
        replace(e, sent=0.0, gates=0.0) if at < 4 else e for at, e in enumerate(found.experts)
    ]
    hurt = replace(unseen[2], errors={r: 100 * e for r, e in unseen[2].errors.items()})
    unseen[2] = hurt
    # Room for all who are seen at 3 bits, and for one bit more of those who are not.
    budget = int((4 * 3 + 4 * 1 + 1 + 8 * 16 / 128) * 3 * N / 8)
    widths = per_expert(choose("pmq_re", replace(found, experts=tuple(unseen)), Asked(budget)))
    assert widths[4:] == [3, 3, 3, 3]
    assert widths[:4] == [1, 1, 2, 1]


def test_mxmoe_has_a_width_for_each_block() -> None:
    found = offers(seed=1)
    chosen = choose("mxmoe_re", found, Asked(int(2.5 * found.n_weights / 8)))
    assert all(widths["gate"] == widths["up"] for widths in chosen.values())
    assert any(widths["gate"] != widths["down"] for widths in chosen.values())
    assert {w for widths in chosen.values() for w in widths.values()} <= {1, 2, 3, 4, 8}
    plan = make_width_plan(Deciding(found), "mxmoe_re", Budget(bpw=2.5), source="", made={})
    assert any("-" in method for method in plan.methods)
    assert plan.made["bound_per"] == "matrix"
    of_hqq = replace(found, family=Family("hqq"), widths=WIDTHS)
    with pytest.raises(PlanError, match="gives each linear block a width, and method hqq:g128"):
        make_width_plan(Deciding(of_hqq), "mxmoe_re", Budget(bpw=2.5), source="", made={})


def test_edgemoe_lowers_the_least_important_by_one() -> None:
    scale = list(np.random.default_rng(4).permutation(24) + 1.0)
    found = with_errors(offers(), scale)
    widths = per_expert(choose("edgemoe_re", found, Asked(int(3.5 * found.n_weights / 8))))
    assert set(widths) == {3, 4}
    # 3.5 bits are 9 of 24 experts at 4 and 16/128 for scales; the most important of the model.
    high = [at for at, width in enumerate(widths) if width == 4]
    assert sorted(high) == sorted(np.argsort(scale)[-9:].tolist())


def test_random_control_is_reproducible_and_draws() -> None:
    found = offers()
    asked = Asked(int(3.5 * found.n_weights / 8), seed=1)
    first = per_expert(choose("mptqs_re", found, asked))
    assert first == per_expert(choose("mptqs_re", found, asked))
    other = per_expert(choose("mptqs_re", found, replace(asked, seed=2)))
    assert first != other
    assert sorted(first) == sorted(other) == [3] * 15 + [4] * 9
    # N16 of the paper, with real bytes: so many of the wider width as fit.
    wide = per_expert(choose("mptqs_re", found, replace(asked, widths=(2, 8))))
    assert sorted(wide) == [2] * 19 + [8] * 5
    plan = make_width_plan(Deciding(found, seed=1), "mptqs_re", Budget(bpw=3), source="", made={})
    assert plan.made["seed"] == 1


def test_scores_are_bits() -> None:
    found = with_errors(offers(4, 1), [1.0] * 4)
    counts = [
        replace(e, sent=s) for e, s in zip(found.experts, (70.0, 10.0, 10.0, 10.0), strict=True)
    ]
    found = replace(found, experts=tuple(counts))
    budget = int((3 * 4 + 4 + 16 / 128 * 4) * 3 * N / 8)
    # MiLo: 4 bits' worth of ranks above 3 bits, by share of tokens.
    assert per_expert(choose("milo_re", found, Asked(budget))) == [6, 4, 3, 3]
    # Bits by half the logarithm of the share: log2(7) / 2 is 1.4 bits.
    assert per_expert(choose("frequency", found, Asked(budget))) == [5, 4, 4, 3]


def test_what_is_missing_is_named() -> None:
    bare = offers()
    bare = replace(bare, experts=tuple(replace(e, errors={}) for e in bare.experts))
    for scheme in ("pmq_re", "mxmoe_re", "edgemoe_re"):
        with pytest.raises(PlanError, match="outputs' errors were not measured"):
            choose(scheme, bare, Asked(10**5))
    bare = replace(bare, experts=tuple(replace(e, sent=None) for e in bare.experts))
    for scheme in ("pmq_re", "milo_re", "frequency"):
        with pytest.raises(PlanError, match=r"tokens are not known: give --calibration"):
            choose(scheme, bare, Asked(10**5))
    found = offers()
    for scheme in ALL:
        with pytest.raises(PlanError, match=r"--bpw 1 cannot be met.* 1\.125 bits per weight"):
            make_width_plan(Deciding(found), scheme, Budget(bpw=1), source="", made={})
        with pytest.raises(PlanError, match="give --bpw or --ratio"):
            make_width_plan(Deciding(found), scheme, Budget(max_kl=1), source="", made={})
    with pytest.raises(PlanError, match="chooses bounds, and rtn:g128 has widths"):
        make_width_plan(Deciding(found), "uniform", Budget(bpw=3), source="", made={})
    with pytest.raises(PlanError, match="width 9: expected some of 1, 2"):
        make_width_plan(Deciding(found, (2, 9)), "pmq_re", Budget(bpw=3), source="", made={})


@pytest.mark.parametrize("scheme", WIDTH_SCHEMES)
def test_codecs_get_the_same_differences_of_bits(scheme: WidthScheme) -> None:
    sizes, found = experts(3, 8), offers()
    deciding = Deciding(found, seed=3)
    plan = make_plan(
        sizes, Evidence(), Budget(bpw=3), source="tiny", scheme=scheme, deciding=deciding
    )
    assert 2.99 < plan.bits_per_weight <= 3
    chosen = choose(scheme, found, Asked(int(3 * found.n_weights / 8), seed=3))
    scales = {
        plan[key].bounds[role].value * 2.0**width
        for key, widths in chosen.items()
        for role, width in widths.items()
    }
    assert max(scales) == pytest.approx(min(scales))
    with pytest.raises(PlanError, match="give --bpw or --ratio"):
        make_plan(sizes, Evidence(), Budget(max_kl=1), source="", scheme=scheme, deciding=deciding)
    with pytest.raises(PlanError, match="nobody measured"):
        make_plan(sizes, Evidence(), Budget(bpw=3), source="", scheme=scheme)


def test_families() -> None:
    assert Family.of("rtn") == Family("rtn", 128)
    assert Family.of("rtn:int4:g64:coded").setting(3, 5) == "rtn:int3-5:g64:coded"
    assert Family.of("rtn").setting(3, 3) == "rtn:int3:g128"
    assert Family.of("rtn").widths == WIDTHS
    assert Family.of("hqq:g64").widths == WIDTHS[1:]
    assert not Family.of("hqq").by_block
    for text in ("bound", "calibrated", "svd:b4", "none"):
        with pytest.raises(MethodError):
            Family.of(text)
